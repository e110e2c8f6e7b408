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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from labpkg.planning.configuration import PRECISIONS, Configuration
from labpkg.planning.estimates import Estimate, estimate
from labpkg.planning.hardware import Hardware, find_hardware
from labpkg.planning.memory import peak_memory, usable_bytes
from labpkg.planning.models import find_model
from labpkg.planning.plans import Plan, describe, schedule_choices
from labpkg.planning.shapes import ModelShape

_CHOICES = (
    *("dp", "tp", "pp", "cp", "zero", "micro_batch_size", "grad_accum_steps"),
    *("recompute", "schedule", "num_virtual_stages", "sequence_parallel"),
)
_RECOMPUTE = ("none", "full")
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
    task = _Task(
        model=shape,
        hardware=find_hardware(hardware) if isinstance(hardware, str) else hardware,
        world_size=world_size,
        tokens_per_step=tokens_per_step,
        precision=precision,
        max_cp=max_cp,
        fixed=fixed,
    )
    for name, value in (("num_plans", num_plans), ("variants", variants)):
        if value < 1:
            raise ValueError(f"{name}={value} is below 1; choose 1 or more")
    best, leanest = _search(task, num_plans, variants)
    if leanest is None:
        raise ValueError(_nothing_divides(task))
    if not best:
        raise ValueError(_nothing_fits(task, leanest))
    return [Plan(estimate=own, place=place) for place, own in enumerate(best, 1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """What is to be divided, and the ways to do it."""

    model: ModelShape
    hardware: Hardware
    world_size: int
    tokens_per_step: int
    precision: str
    max_cp: int
    fixed: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in ("world_size", "tokens_per_step", "max_cp"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value} must be an integer of at least 1")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision={self.precision!r} is unknown; choose one of "
                f"{', '.join(PRECISIONS)}"
            )
        for name in self.fixed:
            if name not in _CHOICES:
                raise ValueError(
                    f"{name}={self.fixed[name]!r} cannot be fixed; the planner chooses "
                    f"{', '.join(_CHOICES)}"
                )
        self._check_multiples()

    def _check_multiples(self) -> None:
        per_node = self.hardware.gpus_per_node
        for name, value, what, size in (
            ("tokens_per_step", self.tokens_per_step, "sequence_length", self._length),
            ("world_size", self.world_size, "gpus_per_node", per_node),
        ):
            below = value - value % size
            if below == value or (name == "world_size" and not below):
                continue  # one node may be used in part
            near = f"{below} or {below + size}" if below else str(size)
            raise ValueError(
                f"{name}={value} is not a multiple of {what}={size}; choose {near}"
            )

    @property
    def _length(self) -> int:
        return self.model.sequence_length

    @property
    def sequences(self) -> int:
        """Sequences of a step."""
        return self.tokens_per_step // self._length

    def jobs(self) -> Iterator[Configuration]:
        """Yield every way to divide the work."""
        per_node = min(self.hardware.gpus_per_node, self.world_size)
        for axes in self._axes():
            passes = self.sequences // axes["dp"]
            for size in self._open("micro_batch_size", _divisors(passes)):
                batch = {"micro_batch_size": size, "grad_accum_steps": passes // size}
                for rest in self._rest(axes) if self._allows(batch) else ():
                    yield Configuration(
                        model=self.model,
                        nodes=self.world_size // per_node,
                        gpus_per_node=per_node,
                        precision=self.precision,
                        sequence_parallel=self.fixed.get("sequence_parallel"),
                        **axes,
                        **batch,
                        **rest,
                    )

    def _axes(self) -> Iterator[dict[str, int]]:
        """Yield the sizes of axes that divide the model and the batch."""
        model = self.model
        for tp in self._open("tp", _divisors(self.world_size)):
            if model.num_heads % tp or model.ffn_width % tp:
                continue
            for pp in self._open("pp", _divisors(self.world_size // tp)):
                if pp > model.num_layers:
                    continue
                for cp in self._open("cp", _divisors(self.world_size // (tp * pp))):
                    dp = self.world_size // (tp * pp * cp)
                    if self._allows({"dp": dp}) and self._divides(dp, tp, cp):
                        yield {"dp": dp, "tp": tp, "pp": pp, "cp": cp}

    def _divides(self, dp: int, tp: int, cp: int) -> bool:
        if cp > self.max_cp and "cp" not in self.fixed:
            return False
        piece = cp * tp if self.fixed.get("sequence_parallel", tp > 1) else cp
        return self.sequences % dp == 0 and self._length % piece == 0

    def _rest(self, axes: Mapping[str, int]) -> list[dict[str, Any]]:
        sharers = axes["dp"] * axes["cp"]  # of the parameters
        zero = self._open("zero", range(4 if sharers > 1 else 1))
        # Attention keeps no scores, so selective recomputation would save nothing.
        how = [self.fixed["recompute"]] if "recompute" in self.fixed else _RECOMPUTE
        return [
            {"zero": stage, "recompute": recompute, **schedule}
            for stage, recompute, schedule in product(
                zero, how, self._schedules(axes["pp"])
            )
        ]

    def _schedules(self, pp: int) -> list[dict[str, Any]]:
        named, virtual = map(self.fixed.get, ("schedule", "num_virtual_stages"))
        if pp > 1 and (named == "gpipe" or (named and virtual)):
            return [{"schedule": named, "num_virtual_stages": virtual or 1}]
        choices = schedule_choices(self.model.num_layers, pp)
        return [choice for choice in choices if self._allows(choice)]

    def _allows(self, choice: Mapping[str, Any]) -> bool:
        return all(self.fixed.get(name, v) == v for name, v in choice.items())

    def _open(self, name: str, values: Any) -> list[Any]:
        return [value for value in values if self._allows({name: value})]


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _search(
    task: _Task, num_plans: int, variants: int
) -> tuple[list[Estimate], Configuration | None]:
    """Return the best that fit, and the job that needs least memory of those seen."""
    best: list[Estimate] = []
    leanest, least_bytes = None, math.inf
    most_bytes = usable_bytes(task.hardware)
    too_large: dict[tuple[Any, ...], int] = {}  # the smallest micro-batch that was
    bounds = [(_least_time(job, task.hardware), job) for job in task.jobs()]
    for least_s, job in sorted(bounds, key=lambda pair: pair[0]):
        if len(best) == num_plans and least_s > best[-1].step_s:
            break
        # Half the micro-batch never needs more: twice as many micro-batches fill what a
        # schedule keeps at most. Between divisors that are closer, an uneven group of
        # the interleaved schedule can.
        others = _all_but_batch(job)
        if 2 * too_large.get(others, job.micro_batch_size) <= job.micro_batch_size:
            continue
        num_bytes = peak_memory(job).num_bytes
        if num_bytes < least_bytes:
            leanest, least_bytes = job, num_bytes
        if num_bytes > most_bytes:
            size = job.micro_batch_size
            too_large[others] = min(size, too_large.get(others, size))
            continue
        own = estimate(job, task.hardware)
        insort(best, own, key=_order)
        alike = [other for other in best if _axes(other) == _axes(own)]
        if len(alike) > variants:
            best.remove(alike[-1])
        del best[num_plans:]
    return best, leanest


def _all_but_batch(job: Configuration) -> tuple[Any, ...]:
    schedule = job.schedule, job.num_virtual_stages
    return job.dp, job.tp, job.pp, job.cp, job.zero, job.recompute, *schedule


def _axes(own: Estimate) -> tuple[int, ...]:
    job = own.configuration
    return job.dp, job.tp, job.pp, job.cp


def _order(own: Estimate) -> tuple[Any, ...]:
    """Sort by time, then memory, then what is easiest to run."""
    job = own.configuration
    simplest = (job.pp, job.tp, job.zero, job.num_virtual_stages, job.schedule)
    return own.step_s, own.memory_bytes, simplest, job.recompute, job.micro_batch_size


def _least_time(job: Configuration, hardware: Hardware) -> float:
    """Return seconds that no step undercuts: matrix products, and an ideal bubble."""
    rate = hardware.peak_flops[job.precision] * hardware.matmul_fraction
    work_s = job.model.flops_per_token * job.tokens_per_step / job.world_size / rate
    bubble = 0.0
    if job.schedule in ("1f1b", "gpipe"):
        bubble = (job.pp - 1) / job.grad_accum_steps
    return work_s * (1 + bubble)


# refusals ----------------------------------------------------------------------------


def _nothing_divides(task: _Task) -> str:
    model, T = task.model, task.model.sequence_length
    chosen = "".join(f" with {name}={value}" for name, value in task.fixed.items())
    return (
        f"no dp x tp x pp = world_size={task.world_size}{chosen} divides the batch of "
        f"{task.sequences} sequences, {model.num_heads} heads, ffn_width="
        f"{model.ffn_width} and {model.num_layers} layers; choose tokens_per_step="
        f"{task.world_size * T} or a multiple, or a world_size that is a power of 2"
    )


def _nothing_fits(task: _Task, leanest: Configuration) -> str:
    needed = peak_memory(leanest).num_bytes / _GIB
    usable = usable_bytes(task.hardware) / _GIB
    remedies = [f"GPUs with {needed:.0f} GiB to use"]
    if task.fixed and _fits_somewhere(replace(task, fixed={})):
        names = ", ".join(f"{name}={value!r}" for name, value in task.fixed.items())
        remedies.insert(0, f"other values than {names}")
    if task.max_cp == 1 and _fits_somewhere(replace(task, max_cp=_MOST_CP)):
        remedies.insert(0, f"max_cp={_MOST_CP}, which divides sequences")
    if more := _world_size_that_fits(task):
        remedies.insert(0, f"world_size={more}")
    return (
        f"no way to divide this job fits {task.world_size} x {task.hardware.name}: the "
        f"leanest ({describe(leanest)}) needs {needed:.1f} GiB on its fullest rank, of "
        f"{usable:.1f}; choose {' or '.join(remedies)}"
    )


def _world_size_that_fits(task: _Task) -> int | None:
    per_node, times = task.hardware.gpus_per_node, 2
    while times <= _MOST_TIMES_MORE:
        size = task.world_size * times
        is_whole = size <= per_node or size % per_node == 0
        if is_whole and _fits_somewhere(replace(task, world_size=size)):
            return size
        times *= 2
    return None


def _fits_somewhere(task: _Task) -> bool:
    """Whether any job fits, asked of those that keep least for backward."""
    lean = {"recompute": "full", **task.fixed}
    if "grad_accum_steps" not in lean:
        lean = {"micro_batch_size": 1, **lean}
    most = usable_bytes(task.hardware)
    jobs = replace(task, fixed=lean).jobs()
    return any(peak_memory(job).num_bytes <= most for job in jobs)
