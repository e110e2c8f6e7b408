"""Checkers of the exercises of the chapter runs/faults.

Notation: n ranks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from labpkg.check.result import CheckResult, Exercise


def goodput(fn: Callable[..., Any]) -> CheckResult:
    """Check `goodput(num_steps, every, step_s, save_s, down_s, faults)`.

    The share of a job's time that went into steps that count. It saves after every
    `every`-th step, which takes `save_s`. `faults[i]` is how many steps of the run were
    done, counted from its very start, when fault i came; detection and restart take
    `down_s`, and the run goes on from the last checkpoint.

    Args:
        fn: your function; it returns a number from 0 to 1.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _GOODPUT.check(fn)


def agree_to_skip(fn: Callable[..., Any]) -> CheckResult:
    """Check `agree_to_skip(norms)`: who takes the step, by the norms of all ranks.

    `norms[r]` is the norm of the gradient that rank r computed, possibly nan or inf.
    All ranks take the step, or none does.

    Args:
        fn: your function; it returns for each rank whether it skips the step.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _AGREE_TO_SKIP.check(fn)


def spikes(fn: Callable[..., Any]) -> CheckResult:
    """Check `spikes(losses, factor, window)`: the steps that a rule leaves out.

    Step i is left out if its loss is above `factor` times the median of the last
    `window` losses of steps that were done, as soon as there are five of them.

    Args:
        fn: your function; it returns the list of steps that are left out, rising.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _SPIKES.check(fn)


def find_stragglers(fn: Callable[..., Any]) -> CheckResult:
    """Check `find_stragglers(step_s, wait_s, factor)`: whom the others wait for.

    `step_s[r][i]` is how long step i took on rank r, `wait_s[r][i]` how much of that
    the rank waited for others. A rank is a straggler if the median of its own work is
    above `factor` times the median of the other ranks' medians.

    Args:
        fn: your function; it returns the list of stragglers, rising.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _FIND_STRAGGLERS.check(fn)


def stopped_rank(fn: Callable[..., Any]) -> CheckResult:
    """Check `stopped_rank(earlier, later, waits)`: who holds up a run.

    `earlier[r]` and `later[r]` are the numbers of the last heartbeat of rank r, read a
    while apart, and `waits[r]` says that it waited in a collective at its last one. To
    blame is a rank without a new heartbeat; if all have one, a rank that does not wait;
    if all wait, nobody, written -1. Of several the lowest.

    Args:
        fn: your function; it returns a rank or -1.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _STOPPED_RANK.check(fn)


def _goodput(
    num_steps: int,
    every: int,
    step_s: float,
    save_s: float,
    down_s: float,
    faults: Sequence[int],
) -> float:
    repeated = sum(done % every for done in faults)
    lost_s = repeated * step_s + len(faults) * down_s
    useful_s = num_steps * step_s
    return useful_s / (useful_s + num_steps // every * save_s + lost_s)


def _without(part: str) -> Callable[..., float]:
    """Return the answer of who forgets a part of the cost."""

    def answer(
        num_steps: int,
        every: int,
        step_s: float,
        save_s: float,
        down_s: float,
        faults: Sequence[int],
    ) -> float:
        if part == "steps":
            faults = [0] * len(faults)
        save_s, down_s = save_s * (part != "saves"), down_s * (part != "down")
        return _goodput(num_steps, every, step_s, save_s, down_s, faults)

    return answer


_GOODPUT = Exercise(
    name="goodput",
    arguments=("num_steps", "every", "step_s", "save_s", "down_s", "faults"),
    reference=_goodput,
    cases=[
        (100, 10, 1.0, 2.0, 30.0, [47]),
        (100, 10, 1.0, 2.0, 30.0, []),
        (100, 10, 1.0, 0.0, 0.0, [47, 53, 53]),
        (100, 10, 1.0, 0.0, 30.0, [50, 50]),
        (1000, 100, 0.5, 3.0, 60.0, [99, 199, 950]),
        (100, 10, 1.0, 2.0, 0.0, [47]),
        (95, 10, 1.0, 5.0, 30.0, [9]),
        (20, 50, 2.0, 1.0, 10.0, [19]),
        (200, 1, 1.0, 0.1, 5.0, [10, 150]),
        (7, 3, 1.0, 1.0, 1.0, [2, 5, 6]),
    ],
    mistakes={
        "the steps since the last checkpoint are done twice, and count once": (
            _without("steps")
        ),
        "each checkpoint takes save_s, too": _without("saves"),
        "each fault costs down_s besides the steps": _without("down"),
        "this is the share that is lost": lambda *case: 1 - _goodput(*case),
        "a fault goes back to the last checkpoint, not to the start": (
            lambda num_steps, every, step_s, save_s, down_s, faults: (
                num_steps
                * step_s
                / (
                    (num_steps + sum(faults)) * step_s
                    + num_steps // every * save_s
                    + len(faults) * down_s
                )
            )
        ),
    },
    hint="useful seconds / (useful + saves + restarts + steps done again)",
)

_nan, _inf = math.nan, math.inf


def _skips(norms: Sequence[float]) -> list[bool]:
    return [not all(map(math.isfinite, norms))] * len(norms)


_AGREE_TO_SKIP = Exercise(
    name="agree_to_skip",
    arguments=("norms",),
    rtol=0.0,
    reference=_skips,
    cases=[
        ([1.0, 2.0, 1.5, 1.0],),
        ([1.0, _nan, _inf, 1.0],),
        ([1.0, _nan, 1.5, 1.0],),
        ([1.0, 2.0, _inf, 1.0],),
        ([_nan, 1.0],),
        ([0.0, 0.0, 0.0],),
        ([_nan, _nan, _nan],),
        ([1e30, 1.0, 1.0],),
        ([_nan],),
        ([3.0],),
        ([1.0, -_inf, 1.0],),
    ],
    mistakes={
        "each rank for itself: the others take the step, and the replicas differ from "
        "then on": lambda norms: [not math.isfinite(norm) for norm in norms],
        "inf is no number to train with either; use math.isfinite": (
            lambda norms: [any(math.isnan(norm) for norm in norms)] * len(norms)
        ),
        "an inf is a rank's own overflow as well as a nan; use math.isfinite": (
            lambda norms: [any(math.isinf(norm) for norm in norms)] * len(norms)
        ),
        "one rank without a number is enough: its gradient is part of every mean": (
            lambda norms: [not any(map(math.isfinite, norms))] * len(norms)
        ),
        "a large norm is clipped, not skipped": (
            lambda norms: [not all(abs(n) < 1e10 for n in norms)] * len(norms)
        ),
        "True means that the rank skips the step": (
            lambda norms: [not skip for skip in _skips(norms)]
        ),
        "one answer for each rank": lambda norms: _skips(norms)[0],
    },
    hint="all ranks skip if the norm of any of them is not finite",
)


def _spikes(
    losses: Sequence[float],
    factor: float,
    window: int,
    middle: Callable[[Sequence[float]], float] = statistics.median,
    *,
    keeps_spikes: bool = False,
    first: int = 5,
) -> list[int]:
    done: list[float] = []
    found = []
    for step, loss in enumerate(losses):
        if len(done) >= first and loss > factor * middle(done[-window:]):
            found.append(step)
            if not keeps_spikes:
                continue
        done.append(loss)
    return found


_FALLING = [5.0, 4.0, 3.0, 2.5, 2.2, 2.0, 1.9, 1.8, 1.7, 1.6]

_SPIKES = Exercise(
    name="spikes",
    arguments=("losses", "factor", "window"),
    rtol=0.0,
    reference=_spikes,
    cases=[
        ([1.0] * 6 + [5.0, 1.0], 2.0, 5),
        ([1.0] * 8, 2.0, 5),
        ([1.0, 9.0, 1.0, 1.0, 1.0, 9.0, 1.0], 2.0, 10),
        ([1.0] * 5 + [3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0], 2.0, 5),
        ([*_FALLING, 4.0, 1.5], 2.0, 5),
        ([*_FALLING, 4.5, 1.5], 2.0, 100),
        ([1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.1], 2.0, 5),
        ([1.0, 1.0, 1.0, 1.0, 20.0, 1.0, 2.5, 1.0], 2.0, 5),
        ([3.0, 1.0], 2.0, 5),
        ([1.0] * 5 + [100.0] + [1.0] * 4 + [4.0], 2.0, 5),
    ],
    mistakes={
        "a step that was left out must not raise the median: keep the losses of steps "
        "that were done": lambda losses, factor, window: _spikes(
            losses, factor, window, keeps_spikes=True
        ),
        "one large loss among them moves the mean a lot and the median hardly": (
            lambda losses, factor, window: _spikes(
                losses, factor, window, statistics.fmean
            )
        ),
        "the rule starts when five steps were done": (
            lambda losses, factor, window: _spikes(losses, factor, window, first=1)
        ),
        "look back on the last window steps only: losses fall": (
            lambda losses, factor, window: _spikes(losses, factor, len(losses))
        ),
        "above factor times the median, not at it": (
            lambda losses, factor, window: _spikes(losses, factor - 1e-9, window)
        ),
    },
    hint="compare with factor times the median of the last losses that you have kept",
)


def _stragglers(
    step_s: Sequence[Sequence[float]],
    wait_s: Sequence[Sequence[float]],
    factor: float,
    middle: Callable[[Sequence[float]], float] = statistics.median,
) -> list[int]:
    own = [
        middle([step - wait for step, wait in zip(steps, waits, strict=True)])
        for steps, waits in zip(step_s, wait_s, strict=True)
    ]
    ranks = range(len(own))
    return [
        rank
        for rank in ranks
        if own[rank] > factor * middle([own[r] for r in ranks if r != rank])
    ]


def _all_steps(own_s: Sequence[Sequence[float]], factor: float) -> tuple:
    """Return a case: each step lasts as long as its slowest rank."""
    longest = [max(column) + 0.01 for column in zip(*own_s, strict=True)]
    step_s = [list(longest) for _ in own_s]
    wait_s = [
        [round(total - own, 6) for total, own in zip(longest, row, strict=True)]
        for row in own_s
    ]
    return step_s, wait_s, factor


_FIND_STRAGGLERS = Exercise(
    name="find_stragglers",
    arguments=("step_s", "wait_s", "factor"),
    rtol=0.0,
    reference=_stragglers,
    cases=[
        _all_steps([[0.4] * 3, [0.1] * 3], 2.0),
        _all_steps([[0.1] * 3, [0.1] * 3, [0.3] * 3, [0.1] * 3], 2.0),
        _all_steps([[0.1] * 3, [0.1] * 3, [0.1] * 3, [0.1] * 3], 1.5),
        _all_steps([[0.1] * 5, [0.1, 0.1, 0.9, 0.1, 0.1], [0.1] * 5], 2.0),
        _all_steps([[0.5] * 3, [0.1] * 3, [0.1] * 3, [0.5] * 3, [0.1] * 3], 2.0),
        _all_steps([[0.1] * 3, [0.1] * 3, [0.15] * 3, [0.1] * 3], 2.0),
        _all_steps([[0.1] * 3, [0.1] * 3, [0.15] * 3, [0.1] * 3], 1.2),
        _all_steps([[0.2, 0.2, 0.9], [0.1] * 3, [0.1] * 3], 1.9),
        _all_steps([[0.1], [0.1], [0.1], [0.7]], 3.0),
        _all_steps([[0.1] * 3, [0.1] * 3, [0.1] * 3, [1.0] * 3], 5.0),
    ],
    mistakes={
        "a step takes as long on every rank: look at what is left without the waits": (
            lambda step, wait, factor: _stragglers(
                step, [[0.0] * len(row) for row in wait], factor
            )
        ),
        "who waits most is the fastest; subtract the waits": (
            lambda step, wait, factor: _stragglers(
                wait, [[0.0] * len(row) for row in wait], factor
            )
        ),
        "one slow step is no slow rank: take the median, not the mean": (
            lambda step, wait, factor: _stragglers(step, wait, factor, statistics.fmean)
        ),
        "return the ranks as a list": (
            lambda step, wait, factor: (_stragglers(step, wait, factor) or [-1])[0]
        ),
    },
    hint="own = median of step - wait; compare it with factor times the median of the "
    "others",
)


def _stopped(
    earlier: Sequence[int], later: Sequence[int], waits: Sequence[bool]
) -> int:
    ranks = range(len(later))
    silent = [rank for rank in ranks if later[rank] == earlier[rank]]
    busy = [rank for rank in ranks if not waits[rank]]
    return (silent or busy or [-1])[0]


_STOPPED_RANK = Exercise(
    name="stopped_rank",
    arguments=("earlier", "later", "waits"),
    rtol=0.0,
    reference=_stopped,
    cases=[
        ([10, 10, 10], [13, 10, 13], [True, False, True]),
        ([10, 11, 10], [13, 14, 10], [True, True, True]),
        ([5, 6, 7, 8], [9, 9, 9, 9], [True, True, False, True]),
        ([5, 6, 4, 8], [9, 9, 7, 9], [True, True, True, True]),
        ([4, 90, 4], [7, 93, 4], [False, True, True]),
        ([1, 1], [1, 2], [True, False]),
        ([3, 3, 3], [3, 3, 5], [True, True, True]),
        ([3, 4, 5], [6, 7, 8], [True, False, False]),
        ([7], [9], [False]),
        ([2, 50, 50], [4, 52, 50], [True, True, False]),
    ],
    mistakes={
        "a process that is stopped writes no heartbeat: look at that before you ask "
        "who waits": lambda earlier, later, waits: _stopped(
            [it - 1 for it in later], later, waits
        ),
        "the rank with the fewest heartbeats may only have started last; who is "
        "stopped has no new one": lambda earlier, later, waits: later.index(min(later)),
        "if all live and wait, nobody can be blamed by this: return -1": (
            lambda earlier, later, waits: max(0, _stopped(earlier, later, waits))
        ),
        "who waits is a victim: the rank to blame does not": (
            lambda earlier, later, waits: waits.index(True) if any(waits) else -1
        ),
        "if all write heartbeats, a rank that does not wait is to blame": (
            lambda earlier, later, waits: _stopped(earlier, later, [True] * len(waits))
        ),
    },
    hint="first a rank with later == earlier, then one that does not wait, then -1",
)
