"""Checkers of the exercises of the chapter planning/planner.

Notation: 16 bytes for each parameter, of which 2 are the weight, 2 its gradient and 12
the optimizer's; None stands for a configuration that does not fit.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from labpkg.check.result import CheckResult, Exercise


def first_fit(fn: Callable[..., Any]) -> CheckResult:
    """Check `first_fit(elements, layer_elements, activation_bytes, memory_bytes, n)`.

    Args:
        fn: your function; it returns the first that fits of `replicas`, `zero1`,
            `zero2`, `zero3`, and `cut the layers` if none does.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _FIRST_FIT.check(fn)


def most_replicas(fn: Callable[..., Any]) -> CheckResult:
    """Check `most_replicas(tokens, gradient_bytes, flops_per_s, bytes_per_s)`.

    Args:
        fn: your function; it returns the largest number of replicas whose all-reduce
            takes no longer than backward, a whole number of at least 1.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _MOST_REPLICAS.check(fn)


def pareto_front(fn: Callable[..., Any]) -> CheckResult:
    """Check `pareto_front(plans)`: what is worth a look.

    Args:
        fn: your function; it gets pairs (seconds, bytes) and returns the ascending
            indices of those that no other pair beats.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _PARETO_FRONT.check(fn)


def plan_regret(fn: Callable[..., Any]) -> CheckResult:
    """Check `plan_regret(predicted, measured)`: what trust in a planner costs.

    Args:
        fn: your function; it gets tokens per second, None where a configuration does
            not fit, and returns the part of the best speed that is lost.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _PLAN_REGRET.check(fn)


def rank_correlation(fn: Callable[..., Any]) -> CheckResult:
    """Check `rank_correlation(predicted, measured)`: does the order agree?

    Args:
        fn: your function; it returns the correlation of the ranks, where equal values
            share the mean of their ranks.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _RANK_CORRELATION.check(fn)


_RUNGS = ("replicas", "zero1", "zero2", "zero3")


def _held(stage: int, elements: float, layer: float, n: int) -> float:
    divided = elements * (0, 12, 14, 16)[stage]
    gathered = 4 * layer if stage == 3 else 0
    return 16 * elements - divided + divided / n + gathered


def _first_fit(
    elements: float, layer: float, activations: float, memory: float, n: int
) -> str:
    for stage, name in enumerate(_RUNGS):
        if _held(stage, elements, layer, n) + activations <= memory:
            return name
    return "cut the layers"


def _cut_from_the_first_stage(
    elements: float, layer: float, activations: float, memory: float, n: int
) -> str:
    if 16 * elements + activations <= memory:
        return "replicas"
    fits = 16 * elements / n + activations <= memory
    return "zero1" if fits else "cut the layers"


def _last_fit(
    elements: float, layer: float, activations: float, memory: float, n: int
) -> str:
    for stage, name in reversed(list(enumerate(_RUNGS))):
        if _held(stage, elements, layer, n) + activations <= memory:
            return name
    return "cut the layers"


_FIRST_FIT = Exercise(
    name="first_fit",
    arguments=("elements", "layer_elements", "activation_bytes", "memory_bytes", "n"),
    reference=_first_fit,
    cases=[
        (1e9, 5e7, 1e10, 8e10, 8),
        (4.6e9, 2e8, 1e10, 8e10, 8),
        (7e9, 2e8, 1e10, 8e10, 8),
        (1.8e10, 3e8, 1e10, 8e10, 8),
        (1.3e10, 3e8, 1.8e10, 8e10, 8),
        (7e10, 9e8, 1e10, 8e10, 64),
        (7e10, 1.6e10, 1e10, 8e10, 64),
        (7e10, 9e8, 1e10, 8e10, 8),
        (1e9, 5e7, 6.5e10, 8e10, 8),
        (5e9, 1e8, 0, 8e10, 1),
        (1e10, 1e8, 0, 8e10, 1),
        (1.75e11, 1.8e9, 3e10, 8e10, 1024),
    ],
    mistakes={
        "activations take memory, too, whatever ZeRO divides": (
            lambda elements, layer, activations, memory, n: _first_fit(
                elements, layer, 0, memory, n
            )
        ),
        "at stage 3 a rank gathers a layer before it uses it: its weights and its "
        "gradient are there whole": lambda elements, layer, activations, memory, n: (
            _first_fit(elements, 0, activations, memory, n)
        ),
        "stage 1 divides the 12 bytes of the optimizer only, not all 16": (
            _cut_from_the_first_stage
        ),
        "take the first rung that fits: a later one saves memory that nobody needs, "
        "and stage 3 sends more": _last_fit,
    },
    hint="from stage 1 on 12 bytes are divided by n, from 2 on 14, from 3 on 16; then "
    "add 4 bytes for each element of a layer, and the activations",
)


def _most_replicas(tokens: float, itemsize: int, flops: float, bandwidth: float) -> int:
    return 1 + math.floor(2 * tokens * bandwidth / (itemsize * flops))


_MOST_REPLICAS = Exercise(
    name="most_replicas",
    arguments=("tokens", "gradient_bytes", "flops_per_s", "bytes_per_s"),
    rtol=0.0,  # whole numbers
    reference=_most_replicas,
    cases=[
        (2**20, 2, 4e14, 5e10),
        (2**20, 4, 4e14, 5e10),
        (2**22, 2, 4e14, 2.5e10),
        (2**20, 2, 1.5e14, 2.5e10),
        (2**18, 4, 4e14, 1e10),
        (1000, 4, 4e14, 5e10),
        (1, 2, 1, 1),
        (3, 2, 1, 1),
    ],
    mistakes={
        "backward takes 4 FLOP for each parameter and token; the 2 of forward are over "
        "when gradients travel": lambda tokens, itemsize, flops, bandwidth: (
            _most_replicas(1.5 * tokens, itemsize, flops, bandwidth)
        ),
        "a ring sends 2 (n - 1) / n bytes for each byte: the sum, and its way back": (
            lambda tokens, itemsize, flops, bandwidth: _most_replicas(
                2 * tokens, itemsize, flops, bandwidth
            )
        ),
        "(n - 1) / n is not 1: with n on both sides of the inequality it is n - 1 that "
        "has a bound": lambda tokens, itemsize, flops, bandwidth: max(
            1, _most_replicas(tokens, itemsize, flops, bandwidth) - 1
        ),
        "one replica more, and the all-reduce takes longer: round down": (
            lambda tokens, itemsize, flops, bandwidth: (
                1 + math.ceil(2 * tokens * bandwidth / (itemsize * flops))
            )
        ),
        "tokens are those of a step, of which each of n replicas has tokens / n": (
            lambda tokens, itemsize, flops, bandwidth: int(
                4 * tokens / flops >= 2 * itemsize / bandwidth
            )
        ),
    },
    hint="4 (tokens / n) / flops_per_s is at least 2 (n - 1) / n * gradient_bytes / "
    "bytes_per_s; the parameters cancel",
)

Plans = Sequence[tuple[float, float]]


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other


def _pareto_front(plans: Plans) -> list[int]:
    return [
        i
        for i, plan in enumerate(plans)
        if not any(_beats(other, plan) for other in plans)
    ]


def _without_ties(plans: Plans) -> list[int]:
    return [
        i
        for i, (seconds, size) in enumerate(plans)
        if not any(
            a <= seconds and b <= size for j, (a, b) in enumerate(plans) if j != i
        )
    ]


def _beaten_on_both(plans: Plans) -> list[int]:
    return [
        i
        for i, (seconds, size) in enumerate(plans)
        if not any(a < seconds and b < size for a, b in plans)
    ]


_PARETO_FRONT = Exercise(
    name="pareto_front",
    arguments=("plans",),
    rtol=0.0,
    reference=_pareto_front,
    cases=[
        ([(9.0, 70.0), (10.0, 40.0), (11.0, 50.0), (12.0, 20.0)],),
        ([(12.0, 20.0), (9.0, 70.0), (11.0, 50.0), (10.0, 40.0)],),
        ([(9.0, 70.0), (9.0, 60.0), (12.0, 60.0)],),
        ([(5.0, 5.0), (5.0, 5.0), (6.0, 4.0), (6.0, 5.0)],),
        ([(3.0, 1.0), (2.0, 2.0), (1.0, 3.0)],),
        ([(1.0, 1.0)],),
        ([],),
    ],
    mistakes={
        "a plan that is as fast as another and needs less memory beats it: less or "
        "equal on both, and not the same pair": _beaten_on_both,
        "equal plans do not beat each other: keep both": _without_ties,
        "return indices in ascending order, not the plans": (
            lambda plans: [plans[i] for i in _pareto_front(plans)]
        ),
        "return ascending indices": lambda plans: sorted(
            _pareto_front(plans), key=lambda i: plans[i]
        ),
        "the fastest plan is not all: a slower one that needs less memory stays": (
            lambda plans: [
                i for i, plan in enumerate(plans) if plan[0] == min(plans)[0]
            ]
        ),
        "these are the plans that are beaten; return the others": lambda plans: [
            i for i in range(len(plans)) if i not in _pareto_front(plans)
        ],
    },
    hint="plan i stays if no other is at most as slow and at most as large and "
    "differs from it",
)

Speeds = Sequence[float | None]


def _picked(predicted: Speeds) -> int:
    return max(
        (i for i, speed in enumerate(predicted) if speed is not None),
        key=lambda i: predicted[i] or 0.0,
    )


def _plan_regret(predicted: Speeds, measured: Speeds) -> float:
    best = max(speed for speed in measured if speed is not None)
    return 1 - (measured[_picked(predicted)] or 0.0) / best


def _promised_regret(predicted: Speeds, measured: Speeds) -> float:
    best = max(speed for speed in measured if speed is not None)
    return 1 - (predicted[_picked(predicted)] or 0.0) / best


def _predicted_of_the_best(predicted: Speeds, measured: Speeds) -> float:
    return 1 - (predicted[_picked(measured)] or 0.0) / (
        predicted[_picked(predicted)] or 1.0
    )


def _where(known: Speeds, speeds: Speeds) -> Speeds:
    pairs = zip(known, speeds, strict=True)
    return [None if k is None else speed for k, speed in pairs]


def _among_those_that_ran(predicted: Speeds, measured: Speeds) -> float:
    return _plan_regret(_where(measured, predicted), measured)


def _among_the_predicted(predicted: Speeds, measured: Speeds) -> float:
    return _plan_regret(predicted, _where(predicted, measured))


_PLAN_REGRET = Exercise(
    name="plan_regret",
    arguments=("predicted", "measured"),
    reference=_plan_regret,
    cases=[
        ([10.0, 9.0, 5.0], [8.0, 10.0, 4.0]),
        ([30.0, 20.0, 10.0], [3.0, 2.0, 1.0]),
        ([5.0, 9.0, 8.0], [None, 6.0, 9.0]),
        ([9.0, 8.0, 7.0], [None, 6.0, 5.0]),
        ([None, 8.0, 9.0], [12.0, 6.0, 5.0]),
        ([100.0, 1.0], [1.0, 100.0]),
        ([4.0], [7.0]),
    ],
    mistakes={
        "the speed of the chosen one is the measured one; what was predicted for it "
        "decides nothing any more": _promised_regret,
        "choose by the prediction, then look at the measurement, not the reverse": (
            _predicted_of_the_best
        ),
        "a choice that did not fit measures 0: all is lost": _among_those_that_ran,
        "compare with the best that was measured, also where the prediction said that "
        "it does not fit": _among_the_predicted,
        "the regret is what is lost: 1 minus this": lambda predicted, measured: (
            1 - _plan_regret(predicted, measured)
        ),
    },
    hint="1 - (measured speed of the largest prediction) / (largest measured speed)",
)


def _ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(other < value for other in values)
        + (1 + sum(other == value for other in values)) / 2
        for value in values
    ]


def _ordinal_ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda i: values[i])
    return [float(order.index(i)) for i in range(len(values))]


def _rank_correlation(predicted: Sequence[float], measured: Sequence[float]) -> float:
    return statistics.correlation(_ranks(predicted), _ranks(measured))


_RANK_CORRELATION = Exercise(
    name="rank_correlation",
    arguments=("predicted", "measured"),
    reference=_rank_correlation,
    cases=[
        ([1.0, 2.0, 3.0, 4.0], [10.0, 30.0, 20.0, 40.0]),
        ([1.0, 2.0, 3.0, 4.0], [2.0, 40.0, 60.0, 1e6]),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]),
        ([5.0, 5.0, 7.0, 9.0], [1.0, 2.0, 3.0, 4.0]),
        ([4.0, 4.0, 4.0, 9.0, 1.0], [2.0, 1.0, 2.0, 3.0, 2.0]),
        ([1.0, 2.0], [5.0, 6.0]),
    ],
    mistakes={
        "correlate the ranks, not the values: a prediction may be off by any factor": (
            lambda predicted, measured: statistics.correlation(predicted, measured)
        ),
        "equal values share the mean of their ranks": lambda predicted, measured: (
            statistics.correlation(_ordinal_ranks(predicted), _ordinal_ranks(measured))
        ),
        "this falls when the order agrees; change the sign": (
            lambda predicted, measured: -_rank_correlation(predicted, measured)
        ),
        "this is the square of the correlation": lambda predicted, measured: (
            _rank_correlation(predicted, measured) ** 2
        ),
    },
    hint="the rank of a value: how many are smaller, plus half of one more than how "
    "many are equal; then the correlation of both columns of ranks",
)
