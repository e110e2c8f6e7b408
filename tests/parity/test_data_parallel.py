"""PyTorch as referee: `DataParallel` against DistributedDataParallel, rank by rank."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.model_averaging import utils as torch_averaging
from torch.nn.parallel import DistributedDataParallel

import labpkg as lab
from labpkg.processes.replicas import average_parameters

CONFIG = {"num_layers": 2, "width": 32, "num_heads": 2, "sequence_length": 16}


def train(engine: str, dtype: torch.dtype, steps: int = 5) -> list[torch.Tensor]:
    """Train a small GPT with one of the engines and return its parameters."""
    mesh = lab.make_mesh(dp=torch.distributed.get_world_size())["dp"]
    torch.manual_seed(mesh.get_local_rank())  # the engine must make the starts equal
    model: nn.Module = lab.GPT(lab.GPTConfig(**CONFIG)).to(dtype)
    if engine == "ddp":
        model = DistributedDataParallel(model, process_group=mesh.get_group())
    else:
        model = lab.DataParallel(model, mesh, bucket_bytes=2**14)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        generator = torch.Generator(device="cpu").manual_seed(
            100 * step + mesh.get_local_rank()
        )
        tokens = torch.randint(256, (4, 17), generator=generator, device="cpu")
        loss = lab.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)]
)
def test_parameters_equal_those_of_ddp(world2, dtype, tolerance):
    ours = world2.run(train, "labpkg", dtype)
    theirs = world2.run(train, "ddp", dtype)
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert (a - b).norm() <= tolerance * b.norm()


def test_two_ranks_agree_bit_by_bit_with_ddp(world2):
    """Two terms have one order, and halves are exact."""
    ours, theirs = (world2.run(train, e, torch.float32)[0] for e in ("labpkg", "ddp"))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def compressed(engine: str) -> list[torch.Tensor | None]:
    """Train with gradients that travel in bfloat16, as torch's own hook does it."""
    mesh = lab.make_mesh(dp=2)["dp"]
    torch.manual_seed(0)
    model: nn.Module = lab.GPT(lab.GPTConfig(**CONFIG))
    if engine == "ddp":
        model = DistributedDataParallel(model, process_group=mesh.get_group())
        # By its own name, DDP refuses the hook without NCCL.
        hook = lambda group, bucket: bf16_compress_hook(group, bucket)
        model.register_comm_hook(mesh.get_group(), hook)
    else:
        model = lab.DataParallel(
            model, mesh, bucket_bytes=2**14, reduce_dtype=torch.bfloat16
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        torch.manual_seed(100 * step + mesh.get_local_rank())
        tokens = torch.randint(256, (4, 17))
        loss = lab.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [p.grad for p in model.parameters()] + [
        p.detach() for p in model.parameters()
    ]


def test_bfloat16_gradients_equal_those_of_torch_bit_by_bit(world2):
    for ours, theirs in zip(
        world2.run(compressed, "labpkg"), world2.run(compressed, "ddp"), strict=True
    ):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


def with_statistics(engine: str, broadcast_buffers: bool) -> dict[str, torch.Tensor]:
    """Train a norm with running statistics, two micro-batches per step."""
    mesh = lab.make_mesh(dp=2)["dp"]
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
    ).double()
    inner, options = model, {"broadcast_buffers": broadcast_buffers}
    if engine == "ddp":
        model = DistributedDataParallel(
            model, process_group=mesh.get_group(), **options
        )
    else:
        model = lab.DataParallel(model, mesh, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        torch.manual_seed(100 * step + mesh.get_local_rank())
        optimizer.zero_grad()
        for last in (False, True):
            x = torch.randn(5, 6, dtype=torch.float64)
            with nullcontext() if last else model.no_sync():
                model(x).square().mean().backward()
        optimizer.step()
    return inner.state_dict()


@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_running_statistics_equal_those_of_ddp(world2, broadcast_buffers):
    ours = world2.run(with_statistics, "labpkg", broadcast_buffers)
    theirs = world2.run(with_statistics, "ddp", broadcast_buffers)
    for mine, other in zip(ours, theirs, strict=True):
        for name, tensor in mine.items():
            assert torch.allclose(tensor, other[name], rtol=1e-12, atol=1e-14), name
    name = "1.running_mean"
    assert not torch.equal(ours[0][name], ours[1][name])


def averaged(engine: str) -> list[torch.Tensor]:
    mesh = lab.make_mesh(dp=2)["dp"]
    torch.manual_seed(mesh.get_local_rank())
    model = lab.MLP(4, 5, 2)
    if engine == "torch":
        torch_averaging.average_parameters(model.parameters(), mesh.get_group())
    else:
        average_parameters(model, mesh)
    return [p.detach() for p in model.parameters()]


def test_averaged_parameters_equal_those_of_torch(world2):
    ours, theirs = (world2.run(averaged, engine) for engine in ("labpkg", "torch"))
    for a, b in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        assert torch.allclose(a, b, rtol=1e-6)
