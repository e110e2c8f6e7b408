"""Jobs that differ in one choice from a given one, and train on as many tokens.

A plan is best only beside its neighbours: each shows what one choice costs. Standard
library only. Chapter: planning/planner.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from typing import Any

from labpkg.planning.configuration import RECOMPUTE, Configuration
from labpkg.planning.estimates import Estimate, estimate

_AXES = ("dp", "tp", "pp", "cp")


def neighbours(own: Estimate) -> list[Estimate]:
    """Return estimates of all jobs that differ in one choice, the fastest first.

    Args:
        own: The estimate of a job.
    """
    jobs = dict.fromkeys(_changed_jobs(own.configuration))
    jobs.pop(own.configuration, None)
    found = [estimate(job, own.hardware) for job in jobs]
    return sorted(found, key=lambda other: (not other.fits, other.step_s))


def _changed_jobs(job: Configuration) -> Iterator[Configuration]:
    for change in _changes(job):
        passes, rest = divmod(
            job.sequences_per_step,
            change.get("dp", job.dp)
            * change.get("micro_batch_size", job.micro_batch_size),
        )
        if rest or not passes:
            continue  # the batch cannot be cut so: no neighbour
        try:
            yield replace(job, grad_accum_steps=passes, **change)
        except ValueError:
            continue  # heads, layers or the sequence cannot be cut so


def _changes(job: Configuration) -> Iterator[dict[str, Any]]:
    for giving, taking in permutations(_AXES, 2):
        size = getattr(job, giving)
        if size == 1 or (taking == "cp" and job.cp == 1):
            continue
        factor = next(n for n in range(2, size + 1) if size % n == 0)
        moved = {giving: size // factor, taking: getattr(job, taking) * factor}
        if moved.get("pp", job.pp) == 1:
            moved |= {"schedule": "1f1b", "num_virtual_stages": 1}
        yield moved
    yield from ({"zero": zero} for zero in range(4) if job.dp * job.cp > 1)
    yield from ({"recompute": how} for how in RECOMPUTE)
    for size in (2 * job.micro_batch_size, job.micro_batch_size // 2):
        if size:
            yield {"micro_batch_size": size}
    if job.pp > 1:
        yield from schedule_choices(job.model.num_layers, job.pp)


def schedule_choices(num_layers: int, num_ranks: int) -> list[dict[str, Any]]:
    """Return the schedules that are worth comparing, as fields of `Configuration`.

    GPipe is none of them: it takes as long as 1F1B and keeps more.

    Args:
        num_layers: Of the model.
        num_ranks: P, ranks of the pipeline.
    """
    if num_ranks == 1:
        return [{"schedule": "1f1b", "num_virtual_stages": 1}]
    layers = num_layers // num_ranks  # of a rank, at least
    virtual = [v for v in range(2, layers + 1) if v == 2 or layers % v == 0]
    choices = [("1f1b", 1), *(("interleaved", v) for v in virtual), ("zb-h1", 1)]
    choices += [("zb-v", 2)] * (layers > 1)
    return [{"schedule": name, "num_virtual_stages": v} for name, v in choices]
