"""Score predictions against measurements: errors, ranks, regret and false promises.

Predicted and measured tables hold the same jobs in the same order. The error of a pair
is exp(|ln(predicted / measured)|) - 1: twice as much and half as much are both 100 %.
What a planner is for is told by three other numbers, taken inside each cell, which is
one model on one number of nodes: whether it ranks configurations rightly, what is lost
by taking its best one (regret), and whether it knows what does not fit.

Standard library only. Chapter: planning/planner. Reference: Spearman 1904,
doi:10.2307/1412159 (rank correlation).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, median

from labpkg.planning.joined_rows import Joined, join_tables
from labpkg.planning.tables import Table

_FEWEST_RANKED = 3  # of two rows any order has a correlation of 1 or -1


def log_error(predicted: float, measured: float) -> float:
    """Return exp(|ln(predicted / measured)|) - 1, the error in either direction.

    Args:
        predicted: A positive number.
        measured: A positive number of the same unit.
    """
    return max(predicted / measured, measured / predicted) - 1


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile, linear between neighbours, so that 0.5 is the median.

    Args:
        values: At least one number, in any order.
        share: From 0 to 1.

    Raises:
        ValueError: If there is no value or `share` is outside.
    """
    if not values or not 0 <= share <= 1:
        raise ValueError(
            f"quantile {share} of {len(values)} values; give a value and 0 to 1"
        )
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation; equal values share their mean rank.

    Args:
        x: Numbers.
        y: As many numbers.

    Returns:
        From -1 to 1, or None if there are fewer than two pairs or all values of one
        side are equal: then nothing is ranked.
    """
    first, second = _ranks(x), _ranks(y)
    mean = (len(first) + 1) / 2
    pairs = zip(first, second, strict=True)
    product = sum((a - mean) * (b - mean) for a, b in pairs)
    squares = [sum((a - mean) ** 2 for a in ranks) for ranks in (first, second)]
    return product / math.sqrt(squares[0] * squares[1]) if all(squares) else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 1
    for _, group in groupby(order, key=values.__getitem__):
        tied = list(group)
        for index in tied:
            ranks[index] = start + (len(tied) - 1) / 2
        start += len(tied)
    return ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """How far predictions of one quantity are from what was measured.

    Attributes:
        rows: Pairs of a prediction and a measurement.
        median: Of exp(|ln(predicted / measured)|) - 1, like the two below.
        p75: 75th percentile.
        p90: 90th percentile.
        ratio: Median of predicted / measured, the bias.
        relative: Median of |predicted / measured - 1|.
    """

    rows: int
    median: float
    p75: float
    p90: float
    ratio: float
    relative: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One model on one number of nodes of one machine.

    Attributes:
        model: Its name or sizes.
        nodes: Machines.
        rows: Configurations, with at least one prediction among them.
        ran: Those of them that were measured to fit.
        rank_correlation: Of predicted and measured speeds of those that ran; None with
            fewer than three, or if all are equal.
        regret: Share of the best measured speed that is lost with the configuration of
            the best predicted speed among those predicted to fit; 1 if that one does
            not fit, or none was predicted to. Of equal speeds the one that needs less
            memory is taken, then the mean. A job in several rows ran if it ran in one.
            Jobs that ran with a speed that is not known are left out. None if nothing
            ran or there was no choice.
        regret_of_ran: The same, but the choice is among the rows that ran.
    """

    model: str
    nodes: str
    rows: int
    ran: int
    rank_correlation: float | None
    regret: float | None
    regret_of_ran: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdicts:
    """How well "does not fit" was predicted; a found one is a true positive.

    Attributes:
        true_positives: Did not fit, and was predicted so.
        false_positives: Fitted, but was predicted not to.
        false_negatives: Did not fit, but was predicted to.
        true_negatives: Fitted, and was predicted so.
    """

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int

    @property
    def precision(self) -> float | None:
        """Share of the predicted "does not fit" that were right."""
        found = self.true_positives + self.false_positives
        return self.true_positives / found if found else None

    @property
    def recall(self) -> float | None:
        """Share of the jobs that did not fit that were found."""
        there = self.true_positives + self.false_negatives
        return self.true_positives / there if there else None

    @property
    def f1(self) -> float | None:
        """Harmonic mean of both."""
        wrong = self.false_positives + self.false_negatives
        twice = 2 * self.true_positives
        return twice / (twice + wrong) if twice + wrong else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What `score_tables` found; a number that cannot be had is None.

    Attributes:
        rows: Rows of the tables.
        speed: Errors of `tok_s_gpu`.
        memory: Errors of `mem_gib`.
        cells: Each model on each number of nodes.
        verdicts: Of "does not fit".
        notes: What was left out, and why.
    """

    rows: int
    speed: Errors | None
    memory: Errors | None
    cells: tuple[Cell, ...]
    verdicts: Verdicts
    notes: tuple[str, ...]

    @property
    def rank_correlation(self) -> float | None:
        """Median over the cells."""
        return _median([cell.rank_correlation for cell in self.cells])

    @property
    def regret(self) -> float | None:
        """Median over the cells."""
        return _median([cell.regret for cell in self.cells])

    @property
    def regret_of_ran(self) -> float | None:
        """Median over the cells."""
        return _median([cell.regret_of_ran for cell in self.cells])


def score_tables(predicted: Table, measured: Table) -> Score:
    """Compare a table of predictions with one of measurements, row by row.

    Predictions are what `predict_table` added. Measured are `tok_s_gpu` and `mem_gib`;
    a job without either did not fit. A row with a cell that is no such number is left
    out and noted.

    Args:
        predicted: With the columns of jobs and of predictions.
        measured: As many rows; any column of a job that it has is compared.

    Returns:
        The errors, the cells and the verdicts; `notes` says what was left out.

    Raises:
        ValueError: If rows differ in number or in a column of a job, or a table has
            nothing to compare.
    """
    rows, notes = join_tables(predicted, measured)
    return Score(
        rows=len(predicted.rows),
        speed=_errors(row.speeds for row in rows),
        memory=_errors(row.memories for row in rows),
        cells=_cells(rows),
        verdicts=_verdicts(rows),
        notes=tuple(notes),
    )


def _both(
    pairs: Iterable[tuple[float | None, float | None]],
) -> list[tuple[float, float]]:
    return [(p, m) for p, m in pairs if p is not None and m is not None]


def _errors(pairs: Iterable[tuple[float | None, float | None]]) -> Errors | None:
    known = _both(pairs)
    if not known:
        return None
    errors = [log_error(p, m) for p, m in known]
    return Errors(
        rows=len(known),
        median=quantile(errors, 0.5),
        p75=quantile(errors, 0.75),
        p90=quantile(errors, 0.9),
        ratio=median(p / m for p, m in known),
        relative=median(abs(p / m - 1) for p, m in known),
    )


def _cells(rows: Sequence[Joined]) -> tuple[Cell, ...]:
    groups: dict[tuple[str, ...], list[Joined]] = {}
    for row in rows:
        groups.setdefault(row.cell, []).append(row)
    return tuple(
        _cell(group)
        for group in groups.values()
        if any(row.speeds[0] is not None for row in group)
    )


def _cell(rows: Sequence[Joined]) -> Cell:
    pairs = _both(row.speeds for row in rows)
    enough = len(pairs) >= _FEWEST_RANKED
    # A job of which only memory was measured ran, but nobody knows how fast.
    timed = [row for row in rows if row.speeds[1] is not None or not row.ran]
    return Cell(
        model=rows[0].model,
        nodes=rows[0].nodes,
        rows=len(rows),
        ran=sum(row.ran for row in rows),
        rank_correlation=rank_correlation(*zip(*pairs, strict=True))
        if enough
        else None,
        regret=_regret(timed, [row for row in timed if row.fits is not False]),
        regret_of_ran=_regret(timed, [row for row in timed if row.ran]),
    )


def _regret(rows: Sequence[Joined], choices: Sequence[Joined]) -> float | None:
    reached = _speeds(rows)
    fastest = max(reached.values(), default=0.0)
    if not fastest or len(rows) < 2:
        return None
    known = [row for row in choices if row.speeds[0] is not None]
    best = max(map(_preference, known), default=None)
    chosen = _speeds([row for row in known if _preference(row) == best])
    return 1 - fmean(chosen.values() or [0.0]) / fastest


def _preference(row: Joined) -> tuple[float, float]:
    return row.speeds[0] or 0.0, -(row.memories[0] or 0.0)


def _speeds(rows: Sequence[Joined]) -> dict[tuple, float]:
    """Return the measured speed of each job, 0 if it never ran.

    A job that was tried several times ran if it ran once: the median of those counts.
    """
    tries: dict[tuple, list[float]] = {}
    for row in rows:
        key = (row.job, row.speeds[0], row.memories[0])
        speeds = tries.setdefault(key, [])
        if row.speeds[1] is not None:
            speeds.append(row.speeds[1])
    return {key: median(speeds or [0.0]) for key, speeds in tries.items()}


def _verdicts(rows: Sequence[Joined]) -> Verdicts:
    # (did not fit, was predicted not to fit)
    known = [(not row.ran, not row.fits) for row in rows if row.fits is not None]
    return Verdicts(
        true_positives=known.count((True, True)),
        false_positives=known.count((False, True)),
        false_negatives=known.count((True, False)),
        true_negatives=known.count((False, False)),
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
