"""Stages: a model cut into consecutive parts, which keep the names of the whole.

A model that is a chain of units, a `Sequential` or a module with `pipeline_units()`, is
cut between units so that the largest part is as small as can be. A `Stage` computes its
units one after the other; its parameters have the names and numbers that they have in
the whole model, so the `state_dict`s of all stages together are that of the model, and
a parameter that several stages hold, a tied one, is known by its number.

Chapter: parallelism/pipeline. Reference: Press and Wolf 2017, Using the Output
Embedding to Improve Language Models, arXiv:1608.05859 (tied embeddings).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labpkg.processes.messages import all_gather_object
from labpkg.processes.trials import undisturbed

_NUM_TIMINGS = 5


@dataclass(frozen=True, eq=False, slots=True)
class Origin:
    """Where tensors that have no values yet come from.

    Attributes:
        model: The whole model, of which nothing needs memory.
        names: Name there of each parameter and buffer, by all names that it has in a
            part; of a tied one the first.
    """

    model: nn.Module
    names: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module, part: nn.Module | None = None) -> Origin:
        """Return the origin of what a part has, or the model itself."""
        first: dict[int, str] = {}
        for name, tensor in tensors_of(model):
            first.setdefault(id(tensor), name)
        own = tensors_of(part or model)
        return cls(model, {name: first[id(tensor)] for name, tensor in own})


class Stage(nn.Module):
    """Consecutive units of a model, under the names that they have there.

    The units are those of the model, not copies; made by `split_stages`.

    Args:
        model: The whole model.
        units: For each unit of the model its names there; a module may have several.
        part: Which of the units are those of the stage.

    Attributes:
        numbers: Where each parameter stands in `model.parameters()`, by its name.
        part: Number of the first unit, of the one after the last, and of all.
        module_names: Of the whole model, for plans that name more than this stage.
        origin: Where values come from, of a model that has none yet; else None.

    Shape:
        What the first unit takes -> what the last one returns.
    """

    def __init__(
        self, model: nn.Module, units: Sequence[Sequence[str]], part: range
    ) -> None:
        super().__init__()
        own = [units[i] for i in part]
        for name in sorted({name for names in own for name in names}):
            _place(self, name, model.get_submodule(name))
        # By name, so that whoever replaces a layer in place replaces it here too.
        self._order = [names[0] for names in own]
        self.part = part.start, part.stop, len(units)
        order = {id(p): i for i, p in enumerate(model.parameters())}
        named = self.named_parameters(remove_duplicate=False)
        self.numbers = {name: order[id(p)] for name, p in named}
        names = model.named_modules(remove_duplicate=False)
        self.module_names = frozenset(name for name, _ in names)
        is_empty = any(tensor.is_meta for _, tensor in tensors_of(self))
        self.origin = Origin.of(model, self) if is_empty else None
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """Return what the units make of `x`."""
        for name in self._order:
            x = self.get_submodule(name)(x)
        return x


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers under all of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _place(root: nn.Module, name: str, unit: nn.Module) -> None:
    """Put a unit where its name says, below modules that only hold others."""
    *parents, last = name.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    if last not in root._modules:  # else it came along inside another unit
        root.add_module(last, unit)


def split_stages(
    model: nn.Module,
    num_stages: int,
    *,
    balance: str = "parameters",
    sample: Tensor | None = None,
) -> list[Stage]:
    """Cut a model into stages of consecutive units, the largest as small as possible.

    Among such cuts the one of the most equal stages is taken. The stages share the
    parameters of the model; a rank keeps those that it runs and drops the others. Make
    the same call on every rank. A model on "meta" costs no memory; `materialize` gives
    values to the stages that are kept.

    Args:
        model: An `nn.Sequential`, whose units are its layers, or a module with
            `pipeline_units()`, which returns submodules whose composition is forward.
        num_stages: At least 1, at most the number of units.
        balance: What makes a unit large: its `parameters` (those of a tied one count in
            each unit that holds it, as in memory), or the `time` of its forward and
            backward, measured here and averaged over all ranks, if there are several.
        sample: With `balance="time"` a micro-batch to measure with.

    Returns:
        The stages, in order.

    Raises:
        ValueError: If there are fewer units than stages, if the model has no units, if
            its units are not all of it, or if `sample` is missing or has no effect.

    Communication: with `balance="time"` one number per unit from every rank.
    """
    if balance not in ("parameters", "time"):
        raise ValueError(f"balance={balance!r}; choose 'parameters' or 'time'")
    if (balance == "time") != (sample is not None):
        raise ValueError(
            f"balance={balance!r} with sample={'None' if sample is None else '...'}; "
            "a sample is what time is measured with: give both or none"
        )
    if sample is not None and any(tensor.is_meta for _, tensor in tensors_of(model)):
        raise ValueError(
            "balance='time' runs the model, which lies on 'meta' and cannot; choose "
            "balance='parameters', or build it with memory"
        )
    units = _units_of(model)
    if not 1 <= num_stages <= len(units):
        raise ValueError(
            f"num_stages={num_stages} of a model with {len(units)} units; choose 1 to "
            f"{len(units)}, or cut the model into more units"
        )
    modules = [model.get_submodule(names[0]) for names in units]
    if sample is None:
        sizes = [float(sum(p.numel() for p in unit.parameters())) for unit in modules]
    else:
        sizes = _seconds(modules, sample)
    cuts = (0, *_cut(sizes, num_stages), len(units))
    stages = [Stage(model, units, range(a, b)) for a, b in pairwise(cuts)]
    _check_complete(model, stages)
    return stages


def _units_of(model: nn.Module) -> list[list[str]]:
    """Return the names of each unit, in order of forward."""
    if isinstance(model, nn.Sequential):
        return [[name] for name in model._modules]
    make_units = getattr(model, "pipeline_units", None)
    if make_units is None:
        raise ValueError(
            f"{type(model).__name__} has no units to cut between; write it as "
            "nn.Sequential or give it a method pipeline_units() that returns the "
            "submodules whose composition is forward"
        )
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    found = []
    for i, unit in enumerate(make_units()):
        if not names.get(id(unit), [""])[0]:
            raise ValueError(
                f"pipeline unit {i}, {type(unit).__name__}, is not a submodule of "
                f"{type(model).__name__}; make it one in __init__, so that its "
                "parameters have names"
            )
        found.append(names[id(unit)])
    return found


def _check_complete(model: nn.Module, stages: list[Stage]) -> None:
    held = {name for stage in stages for name in stage.state_dict()}
    missing = [name for name in model.state_dict() if name not in held]
    if missing:
        raise ValueError(
            f"{missing[0]} is in no pipeline unit, so no stage would hold it; let "
            "pipeline_units() return all of the model"
        )


def _cut(sizes: Sequence[float], num_stages: int) -> list[int]:
    """Return where the second and later parts begin.

    First the smallest possible largest part; then, below it, the smallest sum of
    squares, which is the most equal of the cuts.
    """
    ends = [0.0, *accumulate(sizes)]
    largest = _best(ends, num_stages, max, lambda size: size)[0]
    # The same sums in the same order: the bound is met exactly.
    bounded = lambda size: size**2 if size <= largest else float("inf")
    return _best(ends, num_stages, lambda a, b: a + b, bounded)[1]


def _best(
    ends: list[float],
    num_stages: int,
    combine: Callable[[float, float], float],
    cost: Callable[[float], float],
) -> tuple[float, list[int]]:
    """Minimise the combined cost of the parts, by dynamic programming."""
    n = len(ends) - 1
    best: list[tuple[float, list[int]] | None] = [
        (cost(ends[i]), []) if i else None for i in range(n + 1)
    ]
    for _ in range(num_stages - 1):
        best = [
            min(
                (
                    (combine(before[0], cost(ends[i] - ends[j])), [*before[1], j])
                    for j in range(1, i)
                    if (before := best[j]) is not None
                ),
                default=None,
            )
            for i in range(n + 1)
        ]
    found = best[n]
    assert found is not None
    return found


def _seconds(units: list[nn.Module], sample: Tensor) -> list[float]:
    """Measure forward and backward of each unit, the same answer on all ranks."""
    seconds, x = [], sample
    for unit in units:
        x = x.detach()
        with undisturbed([unit], x.device):
            runs = [_time_once(unit, x) for _ in range(1 + _NUM_TIMINGS)]
        seconds.append(min(time_s for time_s, _ in runs[1:]))
        x = runs[-1][1]
    if dist.is_initialized():
        ranks = all_gather_object(seconds)
        seconds = [sum(times) / len(ranks) for times in zip(*ranks, strict=True)]
    return seconds


def _time_once(unit: nn.Module, x: Tensor) -> tuple[float, Tensor]:
    leaf = x.detach().requires_grad_(x.is_floating_point())
    x = leaf.clone()  # which the unit may change in place
    _synchronize(x)
    start = time.perf_counter()
    y = unit(x)
    inputs = [t for t in (leaf, *unit.parameters()) if t.requires_grad]
    if y.requires_grad and inputs:
        torch.autograd.grad(y, inputs, torch.ones_like(y), allow_unused=True)
    _synchronize(x)
    return time.perf_counter() - start, y.detach()


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
