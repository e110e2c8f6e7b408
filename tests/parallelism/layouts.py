"""A model that is cut, dealt out and sliced by hand, in every way at once.

Its loss is linear in the parameters, so every engine and every layout of it has the
same gradients, which nothing needs to compute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import labpkg as lab
from labpkg.parallelism.fsdp import fully_shard
from labpkg.parallelism.whole import param_groups
from labpkg.parallelism.zero import ZeroOptimizer
from labpkg.processes.cuts import Cut, Place, mark_cut, mark_place

# Each is a layout of the chain over the ranks; the axes make the number of ranks.
LAYOUTS: dict[str, dict[str, int]] = {
    "tp": {"tp": 4},
    "pp": {"pp": 4},
    "pp tp": {"pp": 2, "tp": 2},
    "tp stage 1": {"tp": 2, "dp": 2},
    "tp stage 2": {"tp": 2, "dp": 2},
    "tp stage 3": {"tp": 2, "dp": 2},
    "pp stage 2": {"pp": 2, "dp": 2},
    "pp stage 3": {"pp": 2, "dp": 2},
}
PAIRS: dict[str, dict[str, int]] = {"tp": {"tp": 2}, "pp": {"pp": 2}}
ALONE: dict[str, dict[str, int]] = {"tp": {"tp": 1}, "pp": {"pp": 1}}

# Where tensor parallelism would cut: dim, and the lengths of stacked matrices.
CUTS = {
    "embed.weight": (0, (12,)),
    "up.weight": (0, (8, 4, 4)),
    "up.bias": (0, (8, 4, 4)),
    "down.weight": (1, (8,)),
}
UNITS = ("embed", "norm", "up", "act", "down", "frozen", "head")
# The units of each stage. On two ranks one has the first and the last, on four one has
# no parameters; and none has them in the order of the model.
STAGES = {
    1: (UNITS,),
    2: (("norm", "frozen"), ("embed", "up", "act", "down", "head")),
    4: (("norm", "down"), ("embed", "frozen"), ("act",), ("up", "head")),
}


class Chain(nn.Module):
    """Tied, frozen, stacked and unused parameters, buffers, and a unit without any."""

    def __init__(self, units: tuple[str, ...] = UNITS) -> None:
        super().__init__()
        make = {
            "embed": lambda: nn.Embedding(12, 4, dtype=torch.float64),
            "norm": lambda: nn.BatchNorm1d(3, dtype=torch.float64),
            "up": lambda: nn.Linear(4, 16, dtype=torch.float64),
            "act": nn.ReLU,
            "down": lambda: nn.Linear(8, 3, dtype=torch.float64),
            "frozen": lambda: nn.Linear(2, 2, dtype=torch.float64),
            "head": lambda: nn.Linear(4, 12, bias=False, dtype=torch.float64),
        }
        for name in units:
            self.add_module(name, make[name]())
        if "frozen" in units:
            self.get_submodule("frozen").requires_grad_(False)
        if {"embed", "head"} <= {*units}:
            embed, head = self.get_submodule("embed"), self.get_submodule("head")
            head.weight = embed.weight
        self.cuts: dict[str, Cut] = {}

    def forward(self, step: int) -> Tensor:
        """Return a loss whose gradients are the directions of a step."""
        loss = torch.zeros((), dtype=torch.float64)
        for name, p in self.named_parameters():
            whole = direction(name, step)
            if p.requires_grad and whole is not None:
                cut = self.cuts.get(name)
                loss = loss + (p * (whole if cut is None else cut.take(whole))).sum()
        return loss


def whole_chain(seed: int = 0) -> Chain:
    """Return the model of one process."""
    torch.manual_seed(seed)
    return Chain()


def direction(name: str, step: int) -> Tensor | None:
    """Return the gradient of a parameter; `down.bias` is used by no rank."""
    if name == "down.bias":
        return None
    name = "embed.weight" if name == "head.weight" else name
    shape = dict(Chain().named_parameters())[name].shape
    generator = torch.Generator("cpu").manual_seed(100 * step + len(name))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def laid_out(layout: str, sizes: dict[str, int], seed: int) -> tuple[Chain, DeviceMesh]:
    """Return what this rank holds of a model under a layout, and the mesh."""
    mesh = lab.make_mesh(**sizes)
    model = whole_chain(seed)
    if "pp" in layout:
        model = dealt_out(model, mesh["pp"])
    if "tp" in layout:
        cut_by_hand(model, mesh["tp"])
    if "stage 3" in layout:
        fully_shard(model, mesh["dp"])
    return model, mesh


def dealt_out(model: Chain, mesh: DeviceMesh) -> Chain:
    """Return the stage of this rank, with marks."""
    stages = STAGES[mesh.size()]
    part = Chain(stages[mesh.get_local_rank()])
    mark_place(part, Place(mesh))
    part.load_state_dict({n: model.state_dict()[n] for n in part.state_dict()})
    numbers = {id(p): i for i, p in enumerate(model.parameters())}
    everywhere = dict(model.named_parameters(remove_duplicate=False))
    first_holder: dict[int, int] = {}
    for rank, units in enumerate(stages):
        for name, p in everywhere.items():
            if name.partition(".")[0] in units:
                first_holder.setdefault(numbers[id(p)], rank)
    for name, p in part.named_parameters():
        number = numbers[id(everywhere[name])]
        counts = first_holder[number] == mesh.get_local_rank()
        mark_place(p, Place(mesh, counts=counts, number=number))
    return part


def cut_by_hand(model: Chain, mesh: DeviceMesh) -> None:
    """Cut parameters in place, as tensor parallelism does."""
    named = dict(model.named_parameters())
    for name, p in named.items():
        known_as = "embed.weight" if name == "head.weight" else name
        if known_as in CUTS:
            dim, blocks = CUTS[known_as]
            cut = Cut(mesh, dim, p.shape, blocks)
            p.data = cut.take(p.data)
            mark_cut(p, cut)
            model.cuts[name] = cut


def optimizer_for(
    layout: str, model: Chain, mesh: DeviceMesh, kind: Any, **options: Any
) -> torch.optim.Optimizer:
    """Return the optimizer of a layout, in two groups."""
    groups = param_groups(model, weight_decay=0.3)
    if "stage 1" in layout or "stage 2" in layout:
        options |= {"stage": int(layout[-1]), "bucket_bytes": 64}
        return ZeroOptimizer(groups, kind, mesh["dp"], **options)
    return kind(groups, **options)
