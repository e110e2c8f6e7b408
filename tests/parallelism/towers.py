"""A tower of units and what tests of `fully_shard` do with it, on ranks and alone."""

import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import labpkg as lab
from labpkg.parallelism.fsdp import fully_shard
from labpkg.processes.flat import shard_of

TOLERANCE = 1e-12
WIDTH = 6


class Block(nn.Module):
    """A residual block with a unit inside it; checkpoints as it is told."""

    def __init__(self, recompute: str = "") -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 11)
        self.inner = nn.Sequential(nn.Linear(11, 11), nn.Tanh())
        self.down = nn.Linear(11, WIDTH)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if self.recompute == "inside":
            hidden = checkpoint(self.inner, hidden, use_reentrant=False)
        else:
            hidden = self.inner(hidden)
        return x + self.down(hidden)


class Tower(nn.Module):
    """Units in a list, a tied head, a branch for some ranks, a buffer."""

    def __init__(self, recompute: str = "", num_blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList(Block(recompute) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embed.weight
        self.sometimes = nn.Linear(WIDTH, WIDTH)
        self.never = nn.Linear(WIDTH, 1)
        self.register_buffer("scale", torch.rand(1))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        for block in self.blocks:
            if self.recompute == "around":
                y = checkpoint(block, y, use_reentrant=False)
            else:
                y = block(y)
        y = self.norm(y)
        if (x[:, 0] > 0).any():  # the first ranks never take the branch
            y = y + self.sometimes(y) * (x[:, :1] > 0)
        return self.head(y) * self.scale


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator(device="cpu").manual_seed(1000 + step)
    x, y = torch.randn(2, 12, WIDTH, dtype=torch.float64, generator=g, device="cpu")
    x[:, 0] = torch.linspace(-1, 1, 12)
    return x, y


def build(kind=Tower, *args, **kwargs) -> Any:
    torch.manual_seed(42 + (dist.get_rank() if dist.is_initialized() else 0))
    return kind(*args, **kwargs).double()


def axis():
    return lab.make_mesh(dp=dist.get_world_size())["dp"]


def sharded(kind=Tower, *args, units="default", **options) -> Any:
    model = build(kind, *args)
    if units == "nested":
        options["units"] = [*model.blocks, *(b.inner for b in model.blocks)]
    elif units == "none":
        options["units"] = []
    return fully_shard(model, axis(), **options)


def loss_of(model: nn.Module, step: int = 0, *, shard: bool = True) -> Tensor:
    x, y = batch(step)
    if shard:
        n, rank = dist.get_world_size(), dist.get_rank()
        x, y = x.chunk(n)[rank], y.chunk(n)[rank]
    return ((model(x) - y) ** 2).mean()


def alone(kind=Tower, *args) -> dict:
    """Return the gradients of one process."""
    model = build(kind, *args)
    loss_of(model, shard=False).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def deviation(got: dict, want: dict) -> float:
    """Return the largest relative norm of a difference; None must meet None."""
    assert got.keys() == want.keys()
    worst = 0.0
    for name, w in want.items():
        g = got[name]
        assert (g is None) == (w is None), name
        if w is not None:
            worst = max(worst, float((g - w).norm() / (w.norm() + 1e-30)))
    return worst


def whole_bytes() -> int:
    """Return the bytes of the buffers in which parameters are whole now."""
    gc.collect()
    flats = {}
    for o in gc.get_objects():
        if type(o) is nn.Parameter and shard_of(o) is None:
            storage = o.untyped_storage()
            flats[storage.data_ptr()] = storage.nbytes()
    return sum(flats.values())
