"""Checkers of the exercises of the chapter planning/measuring.

Notation: n ranks, N parameters, L layers, D width, T sequence length, V vocabulary.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from labpkg.check.result import CheckResult, Exercise


def serial_fraction(fn: Callable[..., Any]) -> CheckResult:
    """Check `serial_fraction(one_s, many_s, n)`: what n ranks did not divide.

    Args:
        fn: your function; it returns the fraction of `one_s` by Karp and Flatt.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _SERIAL_FRACTION.check(fn)


def rotation(fn: Callable[..., Any]) -> CheckResult:
    """Check `rotation(names, num_rounds)`: A B C, B C A, C A B and so on, one list.

    Args:
        fn: your function; it returns the names in the order of their turns.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _ROTATION.check(fn)


def quiet_ratio(fn: Callable[..., Any]) -> CheckResult:
    """Check `quiet_ratio(base, new, base_share, new_share, limit)` of paired samples.

    Args:
        fn: your function; it returns the median of new / base over the rounds in which
            neither share is above the limit, nan without such a round.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _QUIET_RATIO.check(fn)


def mfu_once(fn: Callable[..., Any]) -> CheckResult:
    """Check `mfu_once(percent, num_parameters, L, D, T, V)`: mend a published table.

    The table took 6 N + 12 L D T FLOPs per token with an N that counts V D numbers
    twice.

    Args:
        fn: your function; it returns the percent with these numbers counted once.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _MFU_ONCE.check(fn)


def mean_in_flight(fn: Callable[..., Any]) -> CheckResult:
    """Check `mean_in_flight(arrivals, departures, start, stop)`: the mean of N(t).

    Args:
        fn: your function; it returns the mean number in flight from `start` to `stop`.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _MEAN_IN_FLIGHT.check(fn)


_SERIAL_FRACTION = Exercise(
    name="serial_fraction",
    arguments=("one_s", "many_s", "n"),
    reference=lambda one, many, n: (many / one - 1 / n) / (1 - 1 / n),
    cases=[
        (10.0, 6.0, 2),
        (10.0, 5.0, 2),
        (10.0, 10.0, 4),
        (3.0, 1.0, 4),
        (100.0, 6.484375, 64),
        (2.0, 3.0, 2),
        (1e-3, 3e-4, 8),
    ],
    mistakes={
        "this is the fraction that was divided; return the other one": (
            lambda one, many, n: 1 - (many / one - 1 / n) / (1 - 1 / n)
        ),
        "1/n of the time of one rank would be left if all were divided; take it off": (
            lambda one, many, n: many / one
        ),
        "if nothing is divided the fraction is 1: divide by 1 - 1/n": (
            lambda one, many, n: many / one - 1 / n
        ),
        "S is one_s / many_s; the formula has 1/S": (
            lambda one, many, n: (one / many - 1 / n) / (1 - 1 / n)
        ),
        "this is what the ranks lost, 1 - E; the serial fraction is smaller": (
            lambda one, many, n: 1 - one / (n * many)
        ),
    },
    hint="(1/S - 1/n) / (1 - 1/n), with the speed-up S = one_s / many_s",
)


def _rotated(names: Sequence[str], num_rounds: int) -> list[str]:
    order: list[str] = []
    for i in range(num_rounds):
        shift = i % len(names)
        order += [*names[shift:], *names[:shift]]
    return order


_ROTATION = Exercise(
    name="rotation",
    arguments=("names", "num_rounds"),
    reference=_rotated,
    cases=[
        (["A", "B", "C"], 3),
        (["A", "B"], 4),
        (["A", "B", "C"], 1),
        (["A"], 3),
        (["A", "B", "C", "D"], 11),
        (["peer", "ours", "limit"], 5),
    ],
    mistakes={
        "this is not rotated: A is always the first": (
            lambda names, k: [*names] * k  # the same order in each round
        ),
        "first all of A, then all of B: what happens later hits B alone": (
            lambda names, k: [name for name in names for _ in range(k)]
        ),
        "each round begins with the next name, not with the one before": (
            lambda names, k: [
                names[(j - i) % len(names)] for i in range(k) for j in range(len(names))
            ]
        ),
        "reversed rounds leave the middle in the middle; rotate": (
            lambda names, k: [x for i in range(k) for x in names[:: (-1) ** i]]
        ),
        "after as many rounds as names it starts again with the first": (
            lambda names, k: _rotated(names, min(k, len(names)))
        ),
        "one list, not a list for each round": (
            lambda names, k: [
                names[i % len(names) :] + names[: i % len(names)] for i in range(k)
            ]
        ),
    },
    hint="round i is names[i % len(names):] followed by names[:i % len(names)]",
)


def _ratios(base: Any, new: Any, x: Any, y: Any, limit: float) -> list[float]:
    rounds = zip(base, new, x, y, strict=True)
    return [b / a for a, b, p, q in rounds if max(p, q) <= limit]


def _quiet_ratio(
    base: Any,
    new: Any,
    x: Any,
    y: Any,
    limit: float,
    middle: Callable[[list[float]], float] = statistics.median,
) -> float:
    ratios = _ratios(base, new, x, y, limit)
    return middle(ratios) if ratios else math.nan


def _ratio_of_medians(base: Any, new: Any, x: Any, y: Any, limit: float) -> float:
    rounds = zip(base, new, x, y, strict=True)
    quiet = [(a, b) for a, b, p, q in rounds if max(p, q) <= limit]
    if not quiet:
        return math.nan
    a, b = zip(*quiet, strict=True)
    return statistics.median(b) / statistics.median(a)


def _rounds(seed: int, num: int, limit: float = 0.1) -> tuple[Any, ...]:
    draw = random.Random(seed)
    shares = [[draw.choice([0.0, 0.05, 0.6]) for _ in range(num)] for _ in range(2)]
    slow = [draw.uniform(1, 3) for _ in range(num)]
    base = [s * (1 + x) for s, x in zip(slow, shares[0], strict=True)]
    new = [
        s * draw.uniform(0.8, 0.9) * (1 + y)
        for s, y in zip(slow, shares[1], strict=True)
    ]
    return base, new, *shares, limit


_QUIET_RATIO = Exercise(
    name="quiet_ratio",
    arguments=("base", "new", "base_share", "new_share", "limit"),
    reference=_quiet_ratio,
    cases=[
        ([1.0, 2.0, 4.0], [2.0, 4.0, 8.0], [0.0] * 3, [0.0] * 3, 0.1),
        ([1.0] * 4, [2.0, 3.5, 9.0, 4.0], [0.0, 0.8, 0, 0], [0.0, 0, 0.8, 0], 0.1),
        ([1.0, 9.0, 1.0], [2.0, 2.0, 2.2], [0.0, 0.8, 0.0], [0.0] * 3, 0.1),
        ([1.0, 1.0], [2.0, 3.0], [0.1, 0.2], [0.0, 0.0], 0.1),
        (*_rounds(0, 15),),
        (*_rounds(1, 16),),
        (*_rounds(2, 40, 0.0),),
        ([1.0, 1.0], [2.0, 3.0], [0.5, 0.0], [0.0, 0.5], 0.1),
    ],
    mistakes={
        "take only the rounds that nobody disturbed": (
            lambda a, b, x, y, limit: _quiet_ratio(a, b, x, y, 1.0)
        ),
        "a round is disturbed, too, if the base was": (
            lambda a, b, x, y, limit: _quiet_ratio(a, b, [0.0] * len(a), y, limit)
        ),
        "a round is disturbed, too, if the new program was": (
            lambda a, b, x, y, limit: _quiet_ratio(a, b, x, [0.0] * len(a), limit)
        ),
        "it is new by base": (
            lambda a, b, x, y, limit: _quiet_ratio(b, a, y, x, limit)
        ),
        "divide within each round, then take the median: what slows a whole round "
        "down cancels": _ratio_of_medians,
        "the median, not the mean": (
            lambda *c: _quiet_ratio(*c, middle=statistics.mean)
        ),
        "a share equal to the limit is quiet": (
            lambda a, b, x, y, limit: _quiet_ratio(a, b, x, y, limit - 1e-9)
        ),
        "without a quiet round the ratio is unknown: math.nan": (
            lambda *c: statistics.median(_ratios(*c) or [1.0])
        ),
    },
    hint="the median of new[i] / base[i] over the rounds with both shares <= limit",
)


def _counted(N: float, L: int, D: int, T: int) -> float:
    return 6 * N + 12 * L * D * T


def _mend(p: float, N: float, L: int, D: int, T: int, V: int, copies: float) -> float:
    whole = _counted(N, L, D, T)
    return p * (whole - 6 * copies * V * D) / whole


_MFU_ONCE = Exercise(
    name="mfu_once",
    arguments=(*("percent", "num_parameters", "L", "D", "T", "V"),),
    reference=lambda *case: _mend(*case, copies=1),
    cases=[
        (44.3, 1_610_678_272, 16, 2048, 4096, 131072),
        (46.7, 3_976_037_376, 28, 3072, 4096, 131072),
        (40.0, 2e9, 24, 2048, 128, 50257),
        (40.0, 2e9, 24, 2048, 65536, 50257),
        (55.0, 7e9, 32, 4096, 2048, 256),
        (12.5, 1e8, 12, 768, 1024, 50257),
    ],
    mistakes={
        "one copy is right, only the second one is too many": (
            lambda *case: _mend(*case, copies=2)
        ),
        "a matrix of V D numbers is 6 V D FLOPs for each token": (
            lambda *case: _mend(*case, copies=1 / 6)
        ),
        "attention is a part of the FLOPs, too": (
            lambda p, N, L, D, T, V: p * (N - V * D) / N
        ),
        "fewer FLOPs are a smaller utilisation": (
            lambda p, N, L, D, T, V: p * p / _mend(p, N, L, D, T, V, 1)
        ),
        "num_parameters is the number of the table, with both copies": (
            lambda p, N, L, D, T, V: (
                p * _counted(N, L, D, T) / _counted(N + V * D, L, D, T)
            )
        ),
        "the answer is in percent, as in the table": (
            lambda *case: _mend(*case, copies=1) / 100
        ),
    },
    hint="percent x (F - 6 V D) / F, with F = 6 N + 12 L D T as in the table",
)


def _overlap(
    come: Sequence[float], go: Sequence[float], start: float, stop: float
) -> float:
    inside = (
        max(0.0, min(b, stop) - max(a, start)) for a, b in zip(come, go, strict=True)
    )
    return math.fsum(inside) / (stop - start)


def _by_little(
    come: Sequence[float], go: Sequence[float], start: float, stop: float
) -> float:
    stays = [b - a for a, b in zip(come, go, strict=True) if start <= a and b <= stop]
    return math.fsum(stays) / (stop - start)


def _visits(seed: int, num: int) -> tuple[list[float], list[float]]:
    draw = random.Random(seed)
    come = [draw.uniform(0, 10) for _ in range(num)]
    return come, [a + draw.expovariate(1.0) for a in come]


_MEAN_IN_FLIGHT = Exercise(
    name="mean_in_flight",
    arguments=("arrivals", "departures", "start", "stop"),
    reference=_overlap,
    cases=[
        ([0.0, 1.0], [2.0, 3.0], 0.0, 4.0),
        ([0.0, 0.0, 0.0], [3.0, 2.0, 1.0], 0.0, 3.0),
        ([0.0, 1.0, 2.0], [10.0, 11.0, 12.0], 4.0, 6.0),
        ([0.0, 5.0, 20.0], [1.0, 8.0, 30.0], 4.0, 10.0),
        ([2.0], [4.0], 3.0, 13.0),
        (*_visits(0, 30), 0.0, 100.0),
        (*_visits(1, 50), 3.0, 7.0),
        ([1.0], [2.0], 5.0, 6.0),
    ],
    mistakes={
        "divide by stop - start, not by stop": (
            lambda a, b, start, stop: (
                _overlap(a, b, start, stop) * (stop - start) / stop
            )
        ),
        "count only the time between start and stop": (
            lambda a, b, start, stop: (
                math.fsum(go - come for come, go in zip(a, b, strict=True))
                / (stop - start)
            )
        ),
        "a request that came before or is answered after counts, too, for its time "
        "inside": _by_little,
        "this is the mean stay; add the stays up and divide by the seconds": (
            lambda a, b, start, stop: (
                _overlap(a, b, start, stop) * (stop - start) / len(a)
            )
        ),
        "a request that is not there at all counts 0, not less": (
            lambda a, b, start, stop: (
                math.fsum(
                    min(go, stop) - max(come, start)
                    for come, go in zip(a, b, strict=True)
                )
                / (stop - start)
            )
        ),
        "this is the throughput; weigh each request with its time inside": (
            lambda a, b, start, stop: (
                sum(start <= go <= stop for go in b) / (stop - start)
            )
        ),
    },
    hint="the sum of max(0, min(departure, stop) - max(arrival, start)), divided by "
    "stop - start",
)
