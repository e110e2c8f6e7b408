"""A plan: one way to divide a job that fits, with every number behind it.

A plan explains itself: what a step's seconds and a rank's bytes consist of, and what
each single change would cost, because the best plan is best only beside its neighbours.
It also says how the engines of this library run it, or why they cannot.

Standard library only. Chapter: planning/planner. Reference: Narayanan et al. 2021,
arXiv:2104.04473 (dividing a job over clusters).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from labpkg.planning.configuration import Configuration
from labpkg.planning.constants import FITTED, constant_ranges
from labpkg.planning.estimates import Estimate, estimate
from labpkg.planning.hardware import Hardware
from labpkg.planning.layout import Layout
from labpkg.planning.neighbours import neighbours
from labpkg.planning.terms import Term

_AXES = ("dp", "tp", "pp", "cp")
_GIB = 2**30
MEMORY_ERROR = 0.1
"""Median error of predicted peaks, by models and node counts that were held out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One way to run a job on a machine where it fits.

    Args:
        estimate: What it takes.
        place: 1 for the fastest plan of the list that `plan` returned, and so on.
    """

    estimate: Estimate
    place: int = 1

    @property
    def configuration(self) -> Configuration:
        """The job, divided."""
        return self.estimate.configuration

    def __str__(self) -> str:
        """Return the division and what it takes, in one line."""
        return f"{describe(self.configuration)}: {_result(self.estimate)}"

    def layout(self) -> Layout:
        """Return how `labpkg.compose` runs this plan, for a model of the same sizes.

        Raises:
            ValueError: If no engine of this library can, with the reason.
        """
        problem = next(_obstacles(self.estimate), None)
        if problem is not None:
            raise ValueError(problem)
        job = self.configuration
        is_pipeline, virtual = job.pp > 1, {}
        if job.schedule == "interleaved":  # the only one that chooses
            virtual = {"num_virtual_stages": job.num_virtual_stages}
        return Layout(
            pp=job.pp,
            dp=job.dp,
            tp=job.tp,
            zero=job.zero if job.dp > 1 else 0,
            schedule=job.schedule if is_pipeline else None,
            num_micro_batches=job.grad_accum_steps if is_pipeline else None,
            **virtual,
            sequence_parallel=job.cuts_sequence and job.tp > 1,
            grad_accum_steps=1 if is_pipeline else job.grad_accum_steps,
            recompute=job.recompute == "full",
        )

    def command(self) -> str:
        """Return the line that divides `labpkg train` in this way, on all its ranks.

        That command trains its own small models; one of these sizes is handed to
        `labpkg.compose` with the same layout.

        Raises:
            ValueError: As `layout`.
        """
        layout, job = self.layout(), self.configuration
        options = [f"--{axis} {getattr(layout, axis)}" for axis in ("pp", "dp", "tp")]
        options += [f"--zero {layout.zero}"] * (layout.zero > 0)
        if layout.schedule is not None:
            options += [f"--schedule {layout.schedule}"]
            options += [f"--num-micro-batches {layout.num_micro_batches}"]
        if layout.schedule == "interleaved":
            options += [f"--num-virtual-stages {layout.num_virtual_stages}"]
        options += ["--sequence-parallel"] * layout.sequence_parallel
        if layout.grad_accum_steps > 1:
            options += [f"--grad-accum {layout.grad_accum_steps}"]
        options += ["--recompute"] * layout.recompute
        options += [f"--global-batch-size {job.sequences_per_step}"]
        return " ".join(["labpkg train", *options, f"--precision {job.precision}"])

    def explain(self) -> str:
        """Return where the seconds and the bytes go, and why the neighbours lost.

        A neighbour differs in one choice: a factor moved from one axis to another, the
        stage of ZeRO, the micro-batch, recomputation, or the schedule. All of them
        train on as many tokens in a step.
        """
        own = self.estimate
        hardware = own.hardware
        lines = [
            f"{describe(own.configuration)}, on {own.configuration.world_size} x "
            f"{hardware.name}",
            _result(own),
            "",
            f"Time of a step, {own.step_s:.4g} s:",
            *_table(own.time_terms, 1, "s"),
            "",
            f"Memory of the fullest rank, {own.memory_bytes / _GIB:.1f} GiB of "
            f"{own.usable_bytes / _GIB:.1f}:",
            *_table(own.memory_terms, _GIB, "GiB"),
            *_tightness(own),
            "",
            "Neighbours, that differ in one choice:",
            *(_verdict(own, other) for other in neighbours(own)),
            "",
            _engines(self),
            "",
            f"Numbers of {hardware.name}:",
            *_numbers(hardware),
            "",
            "Fitted numbers, to published runs:",
            *(
                f"  {name} {getattr(FITTED, name):.4g}: {known.meaning} ({known.unit})"
                for name, known in constant_ranges().items()
            ),
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as values that JSON knows."""
        own = self.estimate
        try:
            engines = {"command": self.command(), "obstacle": None}
        except ValueError as problem:
            engines = {"command": None, "obstacle": str(problem)}
        return {
            "place": self.place,
            "configuration": asdict(own.configuration),
            "step_s": own.step_s,
            "tokens_per_s_per_gpu": own.tokens_per_s_per_gpu,
            "mfu": own.mfu,
            "memory_bytes": own.memory_bytes,
            "usable_bytes": own.usable_bytes,
            "time_terms": [term._asdict() for term in own.time_terms],
            "memory_terms": [term._asdict() for term in own.memory_terms],
            **engines,
        }


def format_plans(plans: Sequence[Plan]) -> str:
    """Return plans as a table for a terminal.

    Args:
        plans: As `plan` returns them.

    Returns:
        A line of names, and one for each plan.
    """
    head = (
        *("#", *_AXES, "zero", "micro-batch", "passes", "schedule", "recompute"),
        *("step", "tokens/s/GPU", "MFU", "memory"),
    )
    rows = [head, *(_row(plan) for plan in plans)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def _row(plan: Plan) -> tuple[str, ...]:
    job, own = plan.configuration, plan.estimate
    return (
        str(plan.place),
        *(str(getattr(job, axis)) for axis in (*_AXES, "zero", "micro_batch_size")),
        str(job.grad_accum_steps),
        _schedule(job),
        job.recompute,
        f"{own.step_s:.4g} s",
        f"{own.tokens_per_s_per_gpu:,.0f}",
        f"{own.mfu:.1%}",
        f"{own.memory_bytes / _GIB:.1f} GiB",
    )


def _schedule(job: Configuration) -> str:
    if job.pp == 1:
        return "-"
    virtual = job.num_virtual_stages
    return f"{job.schedule} v{virtual}" if virtual > 1 else job.schedule


def describe(job: Configuration) -> str:
    """Return how a job is divided, in one line.

    Args:
        job: The job.

    Returns:
        What differs from one GPU without any division.
    """
    words = [f"{axis} {size}" for axis in _AXES if (size := getattr(job, axis)) > 1]
    words = words or ["one GPU"]
    words += [f"ZeRO {job.zero}"] * (job.zero > 0)
    words += [_schedule(job)] * (job.pp > 1)
    words += [f"{job.recompute} recomputation"] * (job.recompute != "none")
    passes = f"{job.grad_accum_steps} " + ("micro-batch" if job.pp > 1 else "pass")
    if job.grad_accum_steps > 1:
        passes += "es"
    words += [f"{passes} of size {job.micro_batch_size}"]
    return ", ".join(words)


def _result(own: Estimate) -> str:
    return (
        f"{own.step_s:.4g} s a step, {own.tokens_per_s_per_gpu:,.0f} tokens/s/GPU, MFU "
        f"{own.mfu:.1%}, {own.memory_bytes / _GIB:.1f} GiB"
    )


def _table(terms: Iterable[Term], unit: float, name: str) -> list[str]:
    terms = sorted((term for term in terms if term.value), key=lambda t: -t.value)
    whole = sum(term.value for term in terms) or 1.0
    width = max((len(term.name) for term in terms), default=0)
    return [
        f"  {term.name:{width}} {term.value / unit:9.4g} {name} "
        f"{term.value / whole:5.0%}  {term.formula}  [{term.source}]"
        for term in terms
    ]


# explanations ------------------------------------------------------------------------


def _tightness(own: Estimate) -> Iterator[str]:
    share = own.memory_bytes / own.usable_bytes
    if share > 1 - MEMORY_ERROR:
        yield (
            f"  Tight: {share:.0%} of what tensors can fill, and predicted peaks are "
            f"wrong by {MEMORY_ERROR:.0%} in the median. spare_memory={MEMORY_ERROR} "
            "leaves room."
        )


def _numbers(hardware: Hardware) -> Iterator[str]:
    for entry in fields(hardware):
        if entry.name in ("name", "sources"):
            continue
        value = getattr(hardware, entry.name)
        source = hardware.sources.get(entry.name, "given without a source")
        yield f"  {entry.name} {_short(value)}  [{source}]"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_short(each)}" for key, each in value.items())
    return str(value) if isinstance(value, bool) else f"{value:.4g}"


def _verdict(own: Estimate, other: Estimate) -> str:
    before, after = _choices(own.configuration), _choices(other.configuration)
    changed = ", ".join(
        f"{name} {after[name]} for {before[name]}"
        for name in after
        if after[name] != before[name] and after[name] != "-"
    ).replace(" for -", "")
    if not other.fits:
        return (
            f"  {changed}: does not fit, {other.memory_bytes / _GIB:.1f} GiB of "
            f"{other.usable_bytes / _GIB:.1f}"
        )
    change = other.step_s / own.step_s - 1
    word = "slower" if change >= 0 else "faster"
    reasons = _largest_changes(own.time_terms, other.time_terms)
    tight = ""
    if change < 0 and other.memory_bytes > (1 - MEMORY_ERROR) * other.usable_bytes:
        tight = (
            f", but tight: {other.memory_bytes / _GIB:.1f} GiB of "
            f"{other.usable_bytes / _GIB:.1f}"
        )
    return f"  {changed}: {abs(change):.1%} {word}, {reasons}{tight}"


def _choices(job: Configuration) -> dict[str, Any]:
    return {
        **{axis: getattr(job, axis) for axis in _AXES},
        "ZeRO": job.zero,
        "micro-batch": job.micro_batch_size,
        "schedule": _schedule(job),
        "recompute": job.recompute,
    }


def _largest_changes(before: Iterable[Term], after: Iterable[Term]) -> str:
    changes: dict[str, float] = {}
    for sign, terms in ((-1, before), (1, after)):
        for term in terms:
            changes[term.name] = changes.get(term.name, 0.0) + sign * term.value
    largest = sorted(changes.items(), key=lambda item: -abs(item[1]))[:2]
    told = [f"{name} {value:+.3g} s" for name, value in largest if value]
    return " and ".join(told) or "with the same terms"


# engines -----------------------------------------------------------------------------


def _engines(plan: Plan) -> str:
    try:
        return f"Engines of this library: {plan.layout()}; {plan.command()}"
    except ValueError as problem:
        return f"Engines of this library cannot run it: {problem}"


def _obstacles(own: Estimate) -> Iterator[str]:
    """Yield why no `Layout` runs a job: what no engine does, and what cannot be cut."""
    job, model = own.configuration, own.configuration.model
    if job.cp > 1:
        yield (
            f"cp={job.cp} divides sequences, which no engine here does; plan with "
            "max_cp=1"
        )
    if job.zero == 3 and job.pp > 1 and model.tied:
        yield (
            f"zero=3 slices parameters, but stages of the pipeline (pp={job.pp}) share "
            "the tied embedding; plan with zero=1, or untie the weights"
        )
    if job.zero == 2 and job.grad_accum_steps > 1:
        yield from _whole_gradients(own)
    for name in ("num_kv_heads", "vocab_size"):
        if getattr(model, name) % job.tp:
            yield (
                f"{name}={getattr(model, name)} is not divisible by tp={job.tp}, and "
                "engines here cut evenly; plan with a smaller tp, or change the model"
            )
    if job.cuts_sequence and model.sequence_length % job.tp:
        yield (
            f"sequence_length={model.sequence_length} is not divisible by tp={job.tp}; "
            "plan with sequence_parallel=False"
        )


def _whole_gradients(own: Estimate) -> Iterator[str]:
    job = own.configuration
    whole = estimate(replace(job, zero=1), own.hardware)
    if not whole.fits:
        yield (
            f"zero=2 divides gradients {job.grad_accum_steps} times a step, but "
            "engines here add them up whole and divide once, which takes "
            f"{whole.memory_bytes / _GIB:.1f} GiB; plan with zero=1"
        )
