"""Fit the memory constants of the planner, and say how good they are on held-out runs.

Rules, stated before any fit:

- The error of a peak is |ln(predicted / measured)|, and its mean is minimised over the
  runs of the playbook that did not crash. No run is left out.
- MosaicML's runs fit on their GPUs, most with the largest micro-batch that did. A run
  that is predicted to need more than is usable counts `WEIGHT` times the logarithm of
  the excess: imprecise is bad, impossible is worse.
- `reserved_memory` has the best F1 of "does not fit" over both tables, from 3 to 8 %.
  A run without numbers counts as one that did not fit, whatever it died of.
- Held out are one model, or one number of nodes, of the playbook at a time.

What a rank holds at one moment is linear in the three other constants, and the fullest
moment of the fullest rank decides: a fit searches over maxima of fixed columns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from labpkg.planning.configuration import Configuration
from labpkg.planning.constants import Constants, constant_ranges
from labpkg.planning.hardware import HARDWARE
from labpkg.planning.memory import rank_moments
from scripts.published_runs import (
    Run,
    data_folder,
    mosaicml_runs,
    playbook_runs,
)

WEIGHT = 20.0
NAMES = ("activation_copies", "gathered_inputs", "logit_copies")
STARTS = (1.1, 0.3, 2.0)
STEPS = (0.1, 0.2, 0.4)
RESERVES = tuple(round(0.01 * step, 2) for step in range(3, 9))
REGIONS: dict[str, Callable[[Configuration], bool]] = {
    "no tensor parallelism": lambda c: c.tp == 1,
    "tp inside a node": lambda c: 1 < c.tp <= c.gpus_per_node,
    "tp across nodes": lambda c: c.tp > c.gpus_per_node,
    "eight stages or more": lambda c: c.pp >= 8,
    "micro-batches of eight or more": lambda c: c.micro_batch_size >= 8,
    "ZeRO": lambda c: c.zero > 0,
}

Values = Sequence[float] | np.ndarray


class Table:
    """Runs with, for each rank of their pipelines and moment, columns of a linear sum.

    Args:
        runs: Runs whose job is one.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = [run for run in runs if run.configuration is not None]
        self.measured = np.array([run.memory_bytes or np.nan for run in self.runs])
        self.ran = np.array([run.tok_s_gpu is not None for run in self.runs])
        self.capacity = np.array([HARDWARE[r.hardware].memory_bytes for r in self.runs])
        columns = [
            _columns(run.configuration) for run in self.runs if run.configuration
        ]
        self._columns = np.zeros((len(columns), max(map(len, columns)), len(NAMES) + 1))
        for row, ranks in zip(self._columns, columns, strict=True):
            row[: len(ranks)] = ranks

    def peaks(self, values: Values) -> np.ndarray:
        """Return the predicted peaks in bytes."""
        return (self._columns @ np.array([1.0, *values])).max(axis=1)


def _columns(c: Configuration) -> list[list[float]]:
    """For each moment of a rank what is fixed, and what a unit of each constant adds.

    Linear because a moment, unlike a peak, is no maximum.
    """
    low = {name: constant_ranges()[name].low for name in NAMES}
    high = {name: constant_ranges()[name].high for name in NAMES}
    base = replace(Constants(), **low)

    def moments(rank: int, constants: Constants) -> np.ndarray:
        return np.array([m.num_bytes for m in rank_moments(c, rank, constants)])

    rows = []
    for rank in range(c.pp):
        bottom = moments(rank, base)
        slopes = [
            (moments(rank, replace(base, **{name: high[name]})) - bottom)
            / (high[name] - low[name])
            for name in NAMES
        ]
        fixed = bottom - sum(low[n] * s for n, s in zip(NAMES, slopes, strict=True))
        rows += np.stack([fixed, *slopes], axis=1).tolist()
    return rows


class Fit(NamedTuple):
    """Fitted constants: those of `NAMES`, and the reserve."""

    values: tuple[float, ...]
    reserve: float


def fit(playbook: Table, chosen: np.ndarray, bounds: Table) -> Fit:
    """Fit on the chosen runs of the playbook and on all of MosaicML's.

    Args:
        playbook: Runs with peaks, and such that crashed.
        chosen: True where a run of the playbook may be used.
        bounds: Runs that fit.
    """
    best = None
    for reserve in RESERVES:
        values = _search(lambda v, r=reserve: _loss(v, r, playbook, chosen, bounds))
        candidate = Fit(values, reserve)
        over = _over(playbook, candidate)[chosen]
        ran = playbook.ran[chosen]
        alarms = _over(bounds, candidate)
        score = _verdicts(
            np.concatenate([over, alarms]),
            np.concatenate([~ran, np.zeros(len(alarms))]),
        )["f1"]
        if best is None or score > best[0]:
            best = score, candidate
    assert best is not None
    return best[1]


def _loss(
    values: Values, reserve: float, playbook: Table, chosen: np.ndarray, bounds: Table
) -> float:
    used = chosen & ~np.isnan(playbook.measured)
    errors = np.abs(np.log(playbook.peaks(values) / playbook.measured)[used])
    excess = np.log(bounds.peaks(values) / ((1 - reserve) * bounds.capacity))
    return float((errors.sum() + WEIGHT * np.maximum(excess, 0).sum()) / len(errors))


def _search(loss: Callable[[Values], float]) -> tuple[float, ...]:
    """Minimise by the simplex of Nelder and Mead, within the plausible ranges."""
    scale = np.array(STEPS)
    ranges = [constant_ranges()[name] for name in NAMES]
    low = np.array([known.low for known in ranges]) / scale
    high = np.array([known.high for known in ranges]) / scale

    def inside(point: np.ndarray) -> tuple[float, np.ndarray]:
        point = np.clip(point, low, high)
        return loss(point * scale), point

    start = np.array(STARTS) / scale
    simplex = [inside(start + step) for step in (0 * start, *np.eye(len(start)))]
    for _ in range(200):
        simplex.sort(key=lambda entry: entry[0])
        (best, _), (_, worst) = simplex[0], simplex[-1]
        if simplex[-1][0] - best < 1e-6:
            break
        centre = np.mean([point for _, point in simplex[:-1]], axis=0)
        moved = inside(2 * centre - worst)
        if moved[0] < best:
            moved = min(moved, inside(3 * centre - 2 * worst), key=lambda e: e[0])
        elif moved[0] >= simplex[-2][0]:
            moved = inside((centre + worst) / 2)
        if moved[0] < simplex[-1][0]:
            simplex[-1] = moved
        else:
            nearest = simplex[0][1]
            simplex = [inside((point + nearest) / 2) for _, point in simplex]
    return tuple(float(value) for value in min(simplex, key=lambda e: e[0])[1] * scale)


def _over(table: Table, fitted: Fit) -> np.ndarray:
    return table.peaks(fitted.values) > (1 - fitted.reserve) * table.capacity


def _verdicts(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """Return precision, recall and F1 of "does not fit"."""
    actual = actual.astype(bool)
    found = int((predicted & actual).sum())
    shares = {
        "precision": found / max(1, int(predicted.sum())),
        "recall": found / max(1, int(actual.sum())),
        "f1": 2 * found / max(1, int(predicted.sum() + actual.sum())),
    }
    return {name: round(share, 4) for name, share in shares.items()}


def _errors(peaks: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    known = ~np.isnan(measured)
    ratios = peaks[known] / measured[known]
    relative = np.abs(ratios - 1)
    found = {
        "median": np.median(relative),
        "p75": np.quantile(relative, 0.75),
        "p90": np.quantile(relative, 0.9),
        "bias": np.median(ratios),
    }
    return {"rows": int(known.sum())} | {
        k: round(float(x), 4) for k, x in found.items()
    }


def _held_out(playbook: Table, bounds: Table, key: Callable[[Run], Any]) -> Any:
    """Predict each group with constants that have not seen it."""
    groups = np.array([str(key(run)) for run in playbook.runs])
    peaks = np.zeros(len(groups))
    over = np.zeros(len(groups), bool)
    for group in sorted(set(groups)):
        here = groups == group
        fitted = fit(playbook, ~here, bounds)
        peaks[here] = playbook.peaks(fitted.values)[here]
        over[here] = _over(playbook, fitted)[here]
    return peaks, over


def memory_validation(folder: Path) -> dict[str, Any]:
    """Fit, hold out, and return what `book/data/planner_validation.json` keeps.

    Args:
        folder: Where the tables are.
    """
    playbook, bounds = Table(playbook_runs(folder)), Table(mosaicml_runs(folder))
    fitted = fit(playbook, np.ones(len(playbook.runs), bool), bounds)
    report: dict[str, Any] = {
        "constants": {
            name: round(value, 2)
            for name, value in zip(NAMES, fitted.values, strict=True)
        }
        | {"reserved_memory": fitted.reserve},
        "unit": "GiB of allocated tensors",
        "mosaicml": {
            "rows": len(bounds.runs),
            "predicted_not_to_fit": int(_over(bounds, fitted).sum()),
        },
    }
    for name, key in (
        ("model", lambda run: run.model),
        ("nodes", lambda run: run.configuration.nodes),
    ):
        peaks, over = _held_out(playbook, bounds, key)
        report[name] = _errors(peaks, playbook.measured) | _verdicts(
            over, ~playbook.ran
        )
        if name == "model":
            report["regions"] = _regions(playbook, peaks)
            report["pairs"] = _pairs(playbook, peaks)
    return report


def _regions(playbook: Table, peaks: np.ndarray) -> list[dict[str, Any]]:
    jobs = [run.configuration for run in playbook.runs if run.configuration]
    found = []
    for name, belongs in REGIONS.items():
        here = np.array([belongs(job) for job in jobs])
        found.append({"name": name} | _errors(peaks[here], playbook.measured[here]))
    return found


def _pairs(playbook: Table, peaks: np.ndarray) -> list[dict[str, Any]]:
    gib = 2**30
    return [
        {
            "model": run.model,
            "predicted": round(float(peak) / gib, 2),
            "measured": round(run.memory_bytes / gib, 1),
        }
        for run, peak in zip(playbook.runs, peaks, strict=True)
        if run.memory_bytes
    ]


def main() -> None:
    """Print what a fit on the tables gives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=data_folder())
    report = memory_validation(parser.parse_args().folder)
    report.pop("pairs")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
