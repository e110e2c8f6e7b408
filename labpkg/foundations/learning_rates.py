"""Learning rates as pure functions of the step.

Contract: a rate depends on nothing but the arguments, so a run that resumes at step 301
needs no scheduler state, and every rank computes the same number. Steps count from 1.
The first `warmup` steps rise linearly, from peak / warmup at step 1 to the peak at step
`warmup`; the name of a function says how it goes on. The module needs no torch; in a
training loop: `for group in optimizer.param_groups: group["lr"] = rate`.

Chapter: foundations/gradient_descent.
References: Vaswani et al. 2017, arXiv:1706.03762 (warm-up, inverse root); Loshchilov
and Hutter 2017, arXiv:1608.03983 (cosine).
"""

from __future__ import annotations

import math
from collections.abc import Callable

_WARMUP = 0.05  # part of the steps, unless the caller says how many


def warmup_constant(step: int, *, peak: float, warmup: int = 0) -> float:
    """Return the learning rate of a step: the peak, after a linear rise.

    Args:
        step: From 1.
        peak: The highest rate, >= 0.
        warmup: Steps until the peak; 0 starts there.

    Returns:
        The learning rate.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check(step, peak, warmup)
    return peak * step / warmup if step < warmup else peak


def warmup_linear(
    step: int, *, peak: float, steps: int, warmup: int | None = None, floor: float = 0.1
) -> float:
    """Return the learning rate of a step: a linear rise, then a straight line down.

    Args:
        step: From 1 to `steps`.
        peak: The highest rate, >= 0.
        steps: Steps of the whole run.
        warmup: Steps until the peak; None takes a twentieth of `steps`, at least one.
        floor: The rate of the last step, as a part of the peak.

    Returns:
        The learning rate.

    Raises:
        ValueError: If an argument is out of range.
    """
    return _rise_and_fall(step, peak, steps, warmup, floor, lambda done: 1 - done)


def warmup_cosine(
    step: int, *, peak: float, steps: int, warmup: int | None = None, floor: float = 0.1
) -> float:
    """Return the learning rate of a step: a linear rise, then half a cosine down.

    Args:
        step: From 1 to `steps`.
        peak: The highest rate, >= 0.
        steps: Steps of the whole run.
        warmup: Steps until the peak; None takes a twentieth of `steps`, at least one.
        floor: The rate of the last step, as a part of the peak.

    Returns:
        The learning rate.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        Loshchilov and Hutter 2017, SGDR: Stochastic gradient descent with warm
        restarts, arXiv:1608.03983.
    """
    half_cosine = lambda done: (1 + math.cos(math.pi * done)) / 2
    return _rise_and_fall(step, peak, steps, warmup, floor, half_cosine)


def inverse_sqrt(step: int, *, peak: float, warmup: int) -> float:
    """Return the learning rate of a step: a linear rise, then peak sqrt(warmup / step).

    It needs no number of steps, so a run can always go on.

    Args:
        step: From 1.
        peak: The highest rate, >= 0.
        warmup: Steps until the peak, >= 1.

    Returns:
        The learning rate.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        Vaswani et al. 2017, Attention is all you need, arXiv:1706.03762.
    """
    if warmup < 1:
        raise ValueError(
            f"warmup={warmup} must be 1 or more: the rate falls from there on; choose "
            "e.g. warmup=100"
        )
    rate = warmup_constant(step, peak=peak, warmup=warmup)  # checks the step
    return rate * min(1.0, (warmup / step) ** 0.5)


def _rise_and_fall(
    step: int,
    peak: float,
    steps: int,
    warmup: int | None,
    floor: float,
    shape: Callable[[float], float],
) -> float:
    """Return the rate if `shape` falls from 1 to 0 while its argument rises to 1."""
    if warmup is None:
        warmup = max(1, round(_WARMUP * steps))
    _check(step, peak, warmup)
    if not (step <= steps and warmup <= steps):
        raise ValueError(
            f"step={step} and warmup={warmup} must be within steps={steps}; count from "
            "1 and pass the steps of the whole run"
        )
    if not 0 <= floor <= 1:
        raise ValueError(f"floor={floor} is a part of the peak; choose 0 to 1")
    if step <= warmup:
        return peak * step / warmup
    done = (step - warmup) / (steps - warmup)  # in (0, 1]
    return peak * (floor + (1 - floor) * shape(done))


def _check(step: int, peak: float, warmup: int) -> None:
    if not step >= 1:  # also refuses nan
        raise ValueError(f"step={step} must be 1 or more; count the first step as 1")
    if not 0 <= peak < math.inf:  # also refuses nan
        raise ValueError(
            f"peak={peak} must be a finite number >= 0; choose e.g. peak=1e-3"
        )
    if warmup < 0:
        raise ValueError(f"warmup={warmup} is a number of steps; choose 0 or more")
