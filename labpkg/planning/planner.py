"""The planner: all ways to divide a job, those that fit, the fastest first.

The ways are dp x tp x pp (x cp) with each stage of ZeRO, micro-batch, recomputation and
schedule. They are estimated in the order of a lower bound of their time, and the search
ends when no bound is below the plans it has: the result is that of estimating all.

Standard library only. Chapter: planning/planner. References: Narayanan et al. 2021,
arXiv:2104.04473; Zheng et al. 2022, Alpa, arXiv:2201.12023 (automatic division).
"""

from __future__ import annotations

import math
from bisect import insort
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from labpkg.planning.configuration import Configuration
from labpkg.planning.divisions import Task, check_size
from labpkg.planning.estimates import Estimate, estimate
from labpkg.planning.hardware import Hardware, find_hardware
from labpkg.planning.memory import peak_memory
from labpkg.planning.models import find_model
from labpkg.planning.plans import MEMORY_ERROR, Plan, describe
from labpkg.planning.shapes import ModelShape
from labpkg.planning.step_time import layer_seconds

_GIB = 2**30
_MOST_TIMES_MORE = 1024  # GPUs, in the search for a world size that fits
_MOST_CP = 64


def plan(
    model: ModelShape | str,
    hardware: Hardware | str,
    world_size: int,
    tokens_per_step: int,
    *,
    sequence_length: int | None = None,
    precision: str = "bf16",
    max_cp: int = 1,
    num_plans: int = 10,
    variants: int = 1,
    spare_memory: float = MEMORY_ERROR,
    **fixed: Any,
) -> list[Plan]:
    """Return the fastest ways to train a model that fit, the best first.

    All dp x tp x pp (x cp) = `world_size` are compared, with each stage of ZeRO,
    micro-batch, recomputation and schedule; all train on `tokens_per_step` tokens in a
    step, so the optimizer sees the same. Plans of equal time are ordered by memory.

    Args:
        model: Sizes, or a name of `MODEL_SHAPES`.
        hardware: A machine, a name of `HARDWARE`, or the path of its JSON file.
        world_size: GPUs: whole nodes, or a part of one.
        tokens_per_step: Of all ranks; a multiple of the sequence length.
        sequence_length: T, in place of the model's own.
        precision: Of the matrix products: bf16, fp16 or fp32.
        max_cp: The most ranks that may share a sequence; 1 keeps sequences whole.
        num_plans: The most plans that are returned.
        variants: The most plans with the same dp, tp, pp and cp: 1 tells divisions
            apart, more also show what else they could choose.
        spare_memory: Share of the usable memory that a plan must leave free. Predicted
            peaks are wrong by 10 % in the median, and the fastest ways are often the
            fullest: with 0 some of those would crash.
        fixed: Fields of `Configuration` that are not to be chosen, such as `tp=8`.

    Returns:
        Plans, each of which fits.

    Raises:
        ValueError: If a name or number is none, nothing divides so, or nothing fits;
            then with the closest way and what would help.

    Reference: Narayanan et al. 2021, arXiv:2104.04473.
    """
    shape = find_model(model) if isinstance(model, str) else model
    if sequence_length is not None:
        shape = replace(shape, sequence_length=sequence_length)
    task = Task(
        model=shape,
        hardware=find_hardware(hardware) if isinstance(hardware, str) else hardware,
        world_size=world_size,
        tokens_per_step=tokens_per_step,
        precision=precision,
        max_cp=max_cp,
        spare_memory=spare_memory,
        fixed=fixed,
    )
    for name, value in (("num_plans", num_plans), ("variants", variants)):
        check_size(name, value)
    search = _Search(task, num_plans=num_plans, variants=variants).run()
    if search.leanest is None:
        raise ValueError(_nothing_divides(task))
    if not search.best:
        raise ValueError(_nothing_fits(task, search.leanest))
    return [Plan(estimate=own, place=place) for place, own in enumerate(search.best, 1)]


class _Search:
    """Look at jobs in the order of a lower bound of their time; keep the best.

    Args:
        task: What is divided.
        num_plans: How many are kept.
        variants: How many of them may have the same axes.

    Attributes:
        best: The best that fit, in order.
        leanest: The job that needs least memory of those seen.
        least_bytes: What it needs.
    """

    def __init__(self, task: Task, *, num_plans: int, variants: int) -> None:
        self.task, self.num_plans, self.variants = task, num_plans, variants
        self.best: list[Estimate] = []
        self.leanest: Configuration | None = None
        self.least_bytes = math.inf
        self._too_large: dict[tuple[Any, ...], float] = {}  # the smallest micro-batch
        self._bytes: dict[tuple[Any, ...], float] = {}
        self._is_open = task.fixed.keys().isdisjoint(_BATCH)
        self._alike = defaultdict[_Axes, list[Estimate]](list)
        self._layer_s: dict[tuple[Any, ...], float] = {}

    def run(self) -> _Search:
        """Search to the end: until no job can be better than those that are kept."""
        families = [(self._family_s(family), family) for family in self.task.families()]
        for least_s, family in sorted(families, key=lambda pair: pair[0]):
            axes = tuple(map(family[0].get, _AXES))
            if self._is_too_slow(least_s):
                break
            for choices in family:
                least_s = self._least_s(choices, _fill(choices))
                if not self._is_too_slow(least_s, axes):
                    self._consider(choices, axes)
        return self

    def _family_s(self, family: Sequence[Mapping[str, Any]]) -> float:
        return self._least_s(family[0], min(map(_fill, family)))

    def _least_s(self, choices: Mapping[str, Any], fill: float) -> float:
        """Return seconds that no step undercuts: its layers, and an ideal bubble."""
        pp, passes = choices["pp"], choices["grad_accum_steps"]
        is_split = choices["schedule"].startswith("zb")
        key = *map(choices.get, _WORK), pp > 1, is_split, choices["zero"] > 1
        if key not in self._layer_s:
            job = self.task.job(choices)
            self._layer_s[key] = layer_seconds(job, self.task.hardware)
        layers = self.task.model.num_layers / pp
        return layers * self._layer_s[key] * (passes + fill * (pp - 1))

    def _is_too_slow(self, least_s: float, axes: _Axes | None = None) -> bool:
        """Whether the list, or its part with these axes, is full of faster plans."""
        least_s *= 1 - 1e-9  # rounding must not make a bound of what it bounds
        if len(self.best) == self.num_plans and least_s > self.best[-1].step_s:
            return True
        alike = self._alike[axes] if axes else []
        return len(alike) == self.variants and least_s > alike[-1].step_s

    def _consider(self, choices: Mapping[str, Any], axes: _Axes) -> None:
        # Half the micro-batch never needs more: twice as many micro-batches fill what
        # a schedule keeps at most. Between divisors that are closer, an uneven group of
        # the interleaved schedule can. So if not even single sequences fit, none do.
        size: int = choices["micro_batch_size"]
        others = (axes, *map(choices.get, _REST))
        if others not in self._too_large:
            is_hopeless = self._is_open and self._excess(choices, 1) > 1
            self._too_large[others] = 1 if is_hopeless else math.inf
        if 2 * self._too_large[others] <= size:
            return
        if self._excess(choices, size) <= 1:
            own = estimate(self.task.job(choices), self.task.hardware)
            self._keep(own, self._alike[axes])
        else:
            while self._is_open and size % 2 == 0:
                if self._excess(choices, size // 2) <= 1:
                    break
                size //= 2
            self._too_large[others] = min(size, self._too_large[others])

    def _excess(self, choices: Mapping[str, Any], size: int) -> float:
        """Return what a job with micro-batches of this size needs over what it may."""
        passes = choices["micro_batch_size"] * choices["grad_accum_steps"] // size
        key = *map(choices.get, _AXES), *map(choices.get, _REST), size
        if key not in self._bytes:
            batch = {"micro_batch_size": size, "grad_accum_steps": passes}
            job = self.task.job({**choices, **batch})
            self._bytes[key] = num_bytes = peak_memory(job).num_bytes
            if num_bytes < self.least_bytes:
                self.leanest, self.least_bytes = job, num_bytes
        return self._bytes[key] / self.task.most_bytes

    def _keep(self, own: Estimate, alike: list[Estimate]) -> None:
        """Put an estimate into the list, unless enough with its axes are better."""
        insort(alike, own, key=_order)
        insort(self.best, own, key=_order)
        if len(alike) > self.variants:
            worst = alike.pop()
            if worst in self.best:
                self.best.remove(worst)
        del self.best[self.num_plans :]


_Axes = tuple[Any, ...]
_AXES = ("dp", "tp", "pp", "cp")
_REST = ("zero", "recompute", "schedule", "num_virtual_stages")
_BATCH = ("micro_batch_size", "grad_accum_steps")
_WORK = ("tp", "cp", "micro_batch_size", "recompute")  # besides, whether pp > 1 etc.


def _fill(choices: Mapping[str, Any]) -> float:
    """Return the least bubble of a schedule, as a share of that of 1F1B."""
    stages = choices["num_virtual_stages"]
    return (1 / 3 if choices["schedule"].startswith("zb") else 1) / stages


def _order(own: Estimate) -> tuple[Any, ...]:
    """Sort by time, then memory, then what is easiest to run."""
    job = own.configuration
    simplest = (job.pp, job.tp, job.zero, job.num_virtual_stages, job.schedule)
    return own.step_s, own.memory_bytes, simplest, job.recompute, job.micro_batch_size


# refusals ----------------------------------------------------------------------------


def _nothing_divides(task: Task) -> str:
    model, tokens = task.model, task.world_size * task.model.sequence_length
    chosen = _named(task.fixed)
    free, larger = replace(task, fixed={}), replace(task, tokens_per_step=tokens)
    remedies = [f"other values than {chosen}"] * (bool(chosen) and _divides(free))
    remedies += [f"tokens_per_step={tokens} or a multiple"] * _divides(larger)
    if not remedies:
        remedies = [f"other values than {chosen} and tokens_per_step={tokens}"]
    return (
        f"no dp x tp x pp = world_size={task.world_size}{chosen and f' with {chosen}'} "
        f"divides the batch of {task.sequences} sequences, {model.num_heads} heads, "
        f"ffn_width={model.ffn_width} and {model.num_layers} layers; choose "
        f"{', or '.join(remedies)}"
    )


def _named(fixed: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in fixed.items())


def _divides(task: Task) -> bool:
    return next(task.families(), None) is not None


def _nothing_fits(task: Task, leanest: Configuration) -> str:
    needed = peak_memory(leanest).num_bytes / _GIB
    to_use = needed / (1 - task.spare_memory)
    remedies = [f"GPUs with {to_use:.0f} GiB to use"]
    if task.spare_memory and _fits_somewhere(replace(task, spare_memory=0.0)):
        remedies.insert(0, "spare_memory=0, which may crash")
    if task.fixed and _fits_somewhere(replace(task, fixed={})):
        remedies.insert(0, f"other values than {_named(task.fixed)}")
    if task.max_cp == 1 and _fits_somewhere(replace(task, max_cp=_MOST_CP)):
        remedies.insert(0, f"max_cp={_MOST_CP}, which divides sequences")
    if more := _world_size_that_fits(task):
        remedies.insert(0, f"world_size={more}")
    return (
        f"no way to divide this job fits {task.world_size} x {task.hardware.name}: the "
        f"leanest ({describe(leanest)}) needs {needed:.1f} GiB on its fullest rank, of "
        f"{task.most_bytes / _GIB:.1f}; choose {' or '.join(remedies)}"
    )


def _world_size_that_fits(task: Task) -> int | None:
    per_node, times = task.hardware.gpus_per_node, 2
    while times <= _MOST_TIMES_MORE:
        size = task.world_size * times
        is_whole = size <= per_node or size % per_node == 0
        if is_whole and _fits_somewhere(replace(task, world_size=size)):
            return size
        times *= 2
    return None


def _fits_somewhere(task: Task) -> bool:
    """Whether any job fits, asked of those that keep least for backward."""
    lean = {"recompute": "full", **task.fixed}
    if "grad_accum_steps" not in lean:
        lean = {"micro_batch_size": 1, **lean}
    jobs = replace(task, fixed=lean).jobs()
    return any(peak_memory(job).num_bytes <= task.most_bytes for job in jobs)
