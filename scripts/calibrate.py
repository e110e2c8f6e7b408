"""Fit the time constants of the planner; say how far held-out predictions are off.

    python -m scripts.calibrate [FOLDER]      (make calibrate DATA=FOLDER)

writes `book/data/planner_validation.json`, the same bytes for the same tables. The
defaults in `labpkg/planning/constants.py` are the fit on all rows, rounded by hand; the
file says what both lose. Where the loss is flat they take what is also known otherwise:
no overlap and half the bandwidth for ZeRO lose as much as an overlap of 0.2 and 0.3 of
it, and half is what all_gather reaches beside all_reduce in the playbook's benchmark on
two nodes. Memory is fitted by `scripts/calibrate_memory.py`.

Rules, stated before any fit:

- Rows: those of `scripts.measured_jobs` that ran. The rows of fms-fsdp are left out: it
  is not said how much they compute again.
- Loss: the mean of |ln(predicted / measured)|, at most ln 2 for each row, so that a row
  that went wrong pulls no more than one that is off by two. The collections weigh 0.6
  (playbook), 0.25 (MosaicML) and 0.15 (Megatron), however many rows they have.
- Two scaling series of the playbook are in no fit.
- Held out are one model at a time (with the MPT model of its size), one number of nodes
  at a time (in all collections), and the A100 as a whole. Errors are those of rows that
  the fit has not seen.
- Artefacts are called so by a rule on measured numbers alone (`artefacts`). They are
  counted, never left out of a fit.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from labpkg.planning.configuration import Configuration
from labpkg.planning.constants import FITTED, Constants, constant_ranges
from labpkg.planning.hardware import HARDWARE
from labpkg.planning.memory import peak_memory, usable_bytes
from labpkg.planning.scoring import log_error, quantile, rank_correlation
from scripts.calibrate_memory import memory_validation
from scripts.measured_jobs import (
    Job,
    artefacts,
    megatron_jobs,
    merged,
    scaling_jobs,
)
from scripts.published_runs import ROOT, data_folder, mosaicml_runs, playbook_runs

OUT = ROOT / "book" / "data" / "planner_validation.json"
WEIGHTS = {"playbook": 0.6, "mosaicml": 0.25, "megatron": 0.15}
NAMES = (
    "sustained_clock",
    "attention_efficiency",
    "activation_passes",
    "launch_s",
    "optimizer_passes",
    "overlap",
    "pipeline_wait",
    "network_share",
)
RULE = (
    "of two jobs that differ only in zero the slower one, if the other is more than "
    "2 x as fast; a job with less than half the speed of the same job with half the "
    "micro-batch"
)


REGIONS: dict[str, Callable[[Configuration], bool]] = {
    "tp across nodes, in a pipeline": lambda c: c.tp > c.gpus_per_node and c.pp > 1,
    "tp across nodes": lambda c: c.tp > c.gpus_per_node,
    "pipeline with M < 2 P": lambda c: c.pp > 1 and c.grad_accum_steps < 2 * c.pp,
    "tp in a pipeline over nodes": lambda c: c.tp > 1 and c.pp > 1 and c.nodes > 1,
    "pipeline": lambda c: c.pp > 1,
    "zero=1 over 32 ranks or more": lambda c: c.zero > 0 and c.dp >= 32,
    "one sequence in a micro-batch": lambda c: c.micro_batch_size == 1,
    "everything else": lambda c: True,
}
"""Kinds of jobs; each belongs to the first that is true of it."""


def region_of(configuration: Configuration) -> str:
    """Return the name of the region of a job."""
    return next(name for name, is_one in REGIONS.items() if is_one(configuration))


# ---- fit -------------------------------------------------------------------------


def loss(jobs: Sequence[Job], constants: Constants) -> float:
    """Return the weighted mean of capped log errors."""
    errors: dict[str, list[float]] = defaultdict(list)
    for job in jobs:
        error = abs(math.log(job.predicted(constants) / job.measured))
        errors[job.source].append(min(error, math.log(2)))
    weight = sum(WEIGHTS[source] for source in errors)
    return sum(WEIGHTS[name] * fmean(found) for name, found in errors.items()) / weight


def fit(jobs: Sequence[Job]) -> Constants:
    """Return the constants of least loss, by the pattern search of Hooke and Jeeves."""
    ranges = [constant_ranges()[name] for name in NAMES]
    known: dict[tuple[float, ...], float] = {}

    def constants_at(point: Sequence[float]) -> Constants:
        values = [
            r.low + x * (r.high - r.low) for r, x in zip(ranges, point, strict=True)
        ]
        return replace(FITTED, **dict(zip(NAMES, values, strict=True)))

    def loss_at(point: Sequence[float]) -> float:
        key = tuple(round(x, 6) for x in point)
        if key not in known:
            known[key] = loss(jobs, constants_at(key))
        return known[key]

    best, step = [0.5] * len(NAMES), 0.2
    while step > 0.004:
        point = _explored(best, step, loss_at)
        if loss_at(point) < loss_at(best):
            # Go on in the same direction: it follows a valley.
            further = [
                _inside(2 * new - old) for new, old in zip(point, best, strict=True)
            ]
            further = _explored(further, step, loss_at)
            best = min(point, further, key=loss_at)
        else:
            step /= 2
    return constants_at(best)


def _explored(
    start: Sequence[float], step: float, loss_at: Callable[[Sequence[float]], float]
) -> list[float]:
    point = list(start)
    for axis in range(len(point)):
        tried = []
        for move in (0.0, step, -step):
            moved = list(point)
            moved[axis] = _inside(moved[axis] + move)
            tried.append(moved)
        point = min(tried, key=loss_at)
    return point


def _inside(x: float) -> float:
    return min(1.0, max(0.0, x))


# ---- report ----------------------------------------------------------------------


def held_out(jobs: Sequence[Job], key: Callable[[Job], Any]) -> dict[Any, Constants]:
    """Return for each group of the playbook constants that have not seen it."""
    groups = dict.fromkeys(key(job) for job in jobs if job.source == "playbook")
    ran = [job for job in jobs if job.tok_s_gpu]
    return {group: fit([job for job in ran if key(job) != group]) for group in groups}


def summary(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return the errors of pairs (predicted, measured)."""
    errors = [log_error(predicted, measured) for predicted, measured in pairs]
    return {
        "rows": len(pairs),
        "median": quantile(errors, 0.5),
        "p75": quantile(errors, 0.75),
        "p90": quantile(errors, 0.9),
        "bias": median(predicted / measured for predicted, measured in pairs),
    }


def cross_validation(
    jobs: Sequence[Job], constants_of: Callable[[Job], Constants]
) -> dict[str, float]:
    """Return errors, ranks and regret of the playbook with held-out constants."""
    jobs = [job for job in jobs if job.source == "playbook"]
    called = artefacts(jobs)
    speeds = {job.configuration: job.predicted(constants_of(job)) for job in jobs}
    ran = [job for job in jobs if job.tok_s_gpu]
    plain = [job for job in ran if job.configuration not in called]
    cells: dict[tuple[str, int], list[Job]] = defaultdict(list)
    for job in jobs:
        cells[job.model, job.nodes].append(job)
    of_cells = [_cell(cell, speeds) for cell in cells.values()]
    return {
        **summary([(speeds[job.configuration], job.measured) for job in ran]),
        "p90_without_artefacts": summary(
            [(speeds[job.configuration], job.measured) for job in plain]
        )["p90"],
        **{
            name: median(cell[name] for cell in of_cells)
            for name in ("rank_correlation", "regret", "regret_of_ran")
        },
        "regret_mean": fmean(cell["regret"] for cell in of_cells),
        "cells": len(of_cells),
        "chosen_crashed": sum(cell["regret"] == 1 for cell in of_cells),
    }


def _cell(jobs: Sequence[Job], speeds: dict[Configuration, float]) -> dict[str, float]:
    """Return ranks and regret inside one model on one number of nodes."""
    ran = [job for job in jobs if job.tok_s_gpu]
    fastest = max(job.measured for job in ran)

    def regret(choices: Sequence[Job]) -> float:
        chosen = max(choices, key=lambda job: speeds[job.configuration])
        return 1 - (chosen.tok_s_gpu or 0.0) / fastest

    correlation = rank_correlation(
        [speeds[job.configuration] for job in ran], [job.measured for job in ran]
    )
    return {
        "rank_correlation": correlation or 0.0,
        "regret": regret([job for job in jobs if _fits(job)]),
        "regret_of_ran": regret(ran),
    }


def _fits(job: Job) -> bool:
    needed = peak_memory(job.configuration).num_bytes
    return needed <= usable_bytes(HARDWARE[job.hardware])


def baselines(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Return what two predictions without a model miss, at their best on all rows."""
    jobs = [job for job in jobs if job.source == "playbook" and job.tok_s_gpu]
    flops = [job.measured * job.configuration.model.flops_per_token for job in jobs]
    cells: dict[tuple[str, int], list[float]] = defaultdict(list)
    for job in jobs:
        cells[job.model, job.nodes].append(job.measured)
    by_cell = [
        pair for speeds in cells.values() for pair in _with_best_constant(speeds)
    ]
    return [
        {
            "name": "one MFU for all",
            "median": summary(_with_best_constant(flops))["median"],
        },
        {
            "name": "one speed for each model and number of nodes",
            "median": summary(by_cell)["median"],
        },
    ]


def _with_best_constant(values: Sequence[float]) -> list[tuple[float, float]]:
    """Return pairs of the constant of least median error, and each value.

    It is the middle, in logarithms, of the shortest interval that has half of them.
    """
    ordered = sorted(math.log(value) for value in values)
    half = len(ordered) // 2
    pairs = zip(ordered, ordered[half:], strict=False)
    low, high = min(pairs, key=lambda ends: ends[1] - ends[0])
    return [(math.exp((low + high) / 2), value) for value in values]


def regions(
    jobs: Sequence[Job], constants_of: Callable[[Job], Constants]
) -> list[dict[str, Any]]:
    """Return errors by kind of job, of held-out predictions."""
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in REGIONS}
    for job in jobs:
        if job.source == "playbook" and job.tok_s_gpu:
            pair = job.predicted(constants_of(job)), job.measured
            pairs[region_of(job.configuration)].append(pair)
    return [{"name": name, **summary(found)} for name, found in pairs.items()]


def _constants() -> list[dict[str, Any]]:
    return [
        {"name": name, "value": getattr(FITTED, name)}
        | {"low": known.low, "high": known.high}
        | {"unit": known.unit, "meaning": known.meaning}
        for name, known in constant_ranges().items()
    ]


def _pairs(
    jobs: Sequence[Job], constants_of: Callable[[Job], Constants]
) -> list[dict[str, Any]]:
    called = artefacts(jobs)
    return [
        {
            "model": job.model,
            "nodes": job.nodes,
            "region": region_of(job.configuration),
            "artefact": job.configuration in called,
            "predicted": round(job.predicted(constants_of(job)), 1),
            "measured": job.measured,
        }
        for job in jobs
        if job.tok_s_gpu
    ]


def _scaling(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "series": job.source,
            "gpus": job.configuration.world_size,
            "predicted": round(job.predicted(FITTED), 1),
            "measured": job.measured,
        }
        for job in scaling_jobs(folder)
    ]


def _speeds(jobs: Sequence[Job], constants: Constants) -> dict[str, float]:
    return summary([(job.predicted(constants), job.measured) for job in jobs])


def validation(folder: Path) -> dict[str, Any]:
    """Fit, hold out, and return what the file holds."""
    playbook = merged("playbook", playbook_runs(folder))
    mosaicml = merged("mosaicml", mosaicml_runs(folder))
    jobs = [*playbook, *mosaicml, *megatron_jobs(folder)]
    ran = [job for job in jobs if job.tok_s_gpu]
    fitted = fit(ran)
    by_model = held_out(jobs, lambda job: job.model)
    by_nodes = held_out(jobs, lambda job: job.nodes)
    on_h100 = fit([job for job in ran if job.hardware == "h100"])
    pairs = _pairs(playbook, lambda job: by_model[job.model])
    return {
        "command": "make calibrate DATA=FOLDER",
        "constants": _constants(),
        "fit": {name: getattr(fitted, name) for name in NAMES}
        | {"loss": loss(ran, fitted), "loss_of_constants": loss(ran, FITTED)},
        "cross_validation": {
            "model": cross_validation(jobs, lambda job: by_model[job.model]),
            "nodes": cross_validation(jobs, lambda job: by_nodes[job.nodes]),
            "hardware": _speeds([j for j in ran if j.hardware != "h100"], on_h100),
        },
        "collections": {
            source: _speeds([job for job in ran if job.source == source], FITTED)
            for source in WEIGHTS
        },
        "scaling": _scaling(folder),
        "baselines": baselines(jobs),
        "artefacts": {
            "rule": RULE,
            "rows": sum(pair["artefact"] for pair in pairs),
            "of": len(pairs),
        },
        "regions": regions(jobs, lambda job: by_model[job.model]),
        "memory": memory_validation(folder),
        "pairs": pairs,
    }


def rounded(value: Any) -> Any:
    """Return a value with its numbers rounded to five significant digits."""
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def as_text(report: dict[str, Any]) -> str:
    """Return a report as JSON with one line for each row of a list."""
    lines = []
    for name, value in rounded(report).items():
        if isinstance(value, list):
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            lines.append(f" {json.dumps(name)}: [\n{rows}\n ]")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    """Write the file and print what it says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=data_folder())
    report = validation(parser.parse_args().folder)
    OUT.write_text(as_text(report))
    for name in ("fit", "cross_validation", "collections", "baselines", "artefacts"):
        print(name, json.dumps(rounded(report[name]), indent=1))
    for region in rounded(report["regions"]):
        print(region)


if __name__ == "__main__":
    main()
