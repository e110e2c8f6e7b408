"""Checkers of the exercises of the chapter processes/communication_cost.

Notation: n ranks, S bytes, a message of S bytes takes alpha + S beta seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from labpkg.check.result import CheckResult, Exercise


def ring_time(fn: Callable[..., Any]) -> CheckResult:
    """Check `ring_time(num_bytes, n, alpha_s, beta_s_per_byte)`: a ring all-reduce.

    Args:
        fn: your function; it returns seconds.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _RING_TIME.check(fn)


def doubling_rounds(fn: Callable[..., Any]) -> CheckResult:
    """Check `doubling_rounds(n)`: rounds of recursive doubling for any n.

    With p the largest power of two that is not above n, the n - p last ranks hand their
    tensor over first, p ranks swap, and the last ranks are told the sum.

    Args:
        fn: your function; it returns a whole number.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _DOUBLING_ROUNDS.check(fn)


def ring_pays_from(fn: Callable[..., Any]) -> CheckResult:
    """Check `ring_pays_from(n, alpha_s, beta_s_per_byte)`: where two algorithms cross.

    n is a power of two, at least 2. Recursive doubling takes log2 n (alpha + S beta).

    Args:
        fn: your function; it returns the bytes from which a ring is at least as fast as
            recursive doubling, or infinity if it never is.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _RING_PAYS_FROM.check(fn)


def fit_alpha_beta(fn: Callable[..., Any]) -> CheckResult:
    """Check `fit_alpha_beta(num_bytes, seconds)`: the link behind measurements.

    Args:
        fn: your function; from two tensors of equal length it returns the pair (alpha,
            beta) that minimises the sum of squared relative errors.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _FIT_ALPHA_BETA.check(fn)


def num_pieces(fn: Callable[..., Any]) -> CheckResult:
    """Check `num_pieces(num_bytes, n, alpha_s, beta_s_per_byte)`: a pipelined chain.

    A broadcast goes from rank to rank along a chain, in k equal pieces that follow each
    other: it takes (n - 2 + k) (alpha + S beta / k) seconds, for n >= 2.

    Args:
        fn: your function; it returns the best whole number k >= 1, the smaller one of
            two that are equally good.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _NUM_PIECES.check(fn)


_LINKS = ((1e-4, 1e-9), (2e-6, 2.5e-12), (5e-4, 3e-9))


def _ring_s(S: float, n: int, alpha: float, beta: float) -> float:
    return 2 * (n - 1) * (alpha + S / n * beta)


_RING_TIME = Exercise(
    name="ring_time",
    arguments=("num_bytes", "n", "alpha_s", "beta_s_per_byte"),
    atol=0.0,  # seconds may be tiny
    reference=_ring_s,
    cases=[
        (1e6, 4, *_LINKS[0]),
        (1e6, 2, *_LINKS[0]),
        (0, 8, *_LINKS[0]),
        (1e6, 1, *_LINKS[0]),
        (1024, 64, *_LINKS[1]),
        (2.0**30, 64, *_LINKS[1]),
        (2.0**30, 3, *_LINKS[2]),
        (5e8, 1000, 0.0, 1e-9),
        (5e8, 1000, 1e-4, 0.0),
    ],
    mistakes={
        "this is half of it, a reduce-scatter; the finished pieces must go round as "
        "well": lambda S, n, a, b: _ring_s(S, n, a, b) / 2,
        "a round carries one piece of n, not the whole tensor": (
            lambda S, n, a, b: 2 * (n - 1) * (a + S * b)
        ),
        "every round pays alpha, not the all-reduce once": (
            lambda S, n, a, b: a + 2 * (n - 1) / n * S * b
        ),
        "n - 1 rounds bring every piece to every rank; the n-th would bring it home": (
            lambda S, n, a, b: 2 * n * (a + S / n * b)
        ),
        "all ranks send at the same time; their times do not add up": (
            lambda S, n, a, b: n * _ring_s(S, n, a, b)
        ),
    },
    hint="2 (n - 1) rounds, each of them a message of num_bytes / n",
)


def _rounds(n: int) -> int:
    k = n.bit_length() - 1
    return k if n == 2**k else k + 2


_DOUBLING_ROUNDS = Exercise(
    name="doubling_rounds",
    arguments=("n",),
    rtol=0.0,  # whole numbers
    reference=_rounds,
    cases=[(n,) for n in (8, 4, 2, 1, 3, 5, 6, 7, 16, 17, 1000, 1024, 2**29, 2**49)],
    mistakes={
        "with n ranks that is right only for powers of two: the ranks above hand over "
        "first and are told last, one round each": lambda n: n.bit_length() - 1,
        "rounding log2 n up counts one round too few: the ranks above the power of two "
        "hand over first, and are told last": lambda n: (n - 1).bit_length(),
        "powers of two need no extra rounds": lambda n: n.bit_length() + 1,
        "one round brings nothing to all ranks; count how often the number of summed "
        "ranks doubles": lambda n: n - 1,
        "rounds are whole: take the largest power of two that is not above n": (
            lambda n: math.log2(n)
        ),
        "it is a swap, both ways in one round": lambda n: 2 * (n - 1).bit_length(),
    },
    hint="n.bit_length() - 1 rounds of swaps, and two more if n is no power of two",
)


def _crossing(n: int, alpha: float, beta: float) -> float:
    k = math.log2(n)
    fewer = k - 2 * (n - 1) / n
    return math.inf if fewer <= 0 else (2 * (n - 1) - k) / fewer * alpha / beta


_RING_PAYS_FROM = Exercise(
    name="ring_pays_from",
    arguments=("n", "alpha_s", "beta_s_per_byte"),
    reference=_crossing,
    cases=[
        (4, *_LINKS[0]),
        (4, *_LINKS[1]),
        (8, *_LINKS[0]),
        (2, *_LINKS[0]),
        (16, *_LINKS[2]),
        (64, *_LINKS[1]),
        (1024, *_LINKS[1]),
        (8, 0.0, 1e-9),
    ],
    mistakes={
        "this is where one message is half latency; compare the rounds and the bytes "
        "of both algorithms": lambda n, a, b: a / b,
        "bytes are seconds divided by seconds per byte: alpha / beta": (
            lambda n, a, b: _crossing(n, b, a) if a else math.inf
        ),
        "a ring goes round twice, 2 (n - 1) rounds": (
            lambda n, a, b: (
                (n - 1 - math.log2(n)) / (math.log2(n) - 2 * (n - 1) / n) * a / b
                if n > 2
                else math.inf
            )
        ),
        "a ring sends 2 (n - 1) / n of the tensor, a little less than twice": (
            lambda n, a, b: (
                (2 * (n - 1) - math.log2(n)) / (math.log2(n) - 2) * a / b
                if n > 4
                else math.inf
            )
        ),
        "with two ranks both send the whole tensor, and the ring in twice as many "
        "rounds: it never pays, so return infinity": (
            lambda n, a, b: _crossing(n, a, b) if n > 2 else 0.0
        ),
    },
    hint="(2 (n - 1) - log2 n) / (log2 n - 2 (n - 1) / n) x alpha / beta",
)


def _least_squares(sizes: Tensor, seconds: Tensor, weights: Tensor) -> tuple[Any, Any]:
    """Minimise the sum of (weight x error)^2."""
    columns = torch.stack([weights, weights * sizes], 1)
    scale = columns.norm(dim=0)
    target = (weights * seconds)[:, None]
    alpha, beta = torch.linalg.lstsq(columns / scale, target).solution[:, 0] / scale
    return alpha, beta


def _relative_fit(sizes: Tensor, seconds: Tensor) -> tuple[Any, Any]:
    return _least_squares(sizes, seconds, 1 / seconds)


def _line(sizes: Tensor, seconds: Tensor) -> tuple[Any, Any]:
    """Draw a line through the first and the last point."""
    beta = (seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0])
    return seconds[0] - beta * sizes[0], beta


def _measured(link: tuple[float, float], num: int, noise: float) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(num)
    sizes = 4.0 ** torch.arange(3, 3 + num, dtype=torch.float64)
    factor = 1 + noise * torch.rand(num, generator=generator, dtype=torch.float64)
    return sizes, (link[0] + link[1] * sizes) * factor


_FIT_ALPHA_BETA = Exercise(
    name="fit_alpha_beta",
    arguments=("num_bytes", "seconds"),
    atol=0.0,  # beta is tiny
    reference=_relative_fit,
    cases=[
        _measured(_LINKS[0], 4, 0.0),
        _measured(_LINKS[0], 10, 0.2),
        _measured(_LINKS[1], 11, 0.1),
        _measured(_LINKS[2], 9, 0.3),
        _measured(_LINKS[0], 12, 0.5),
        _measured(_LINKS[2], 5, 0.1),
    ],
    mistakes={
        "the order is (alpha, beta)": lambda S, t: _relative_fit(S, t)[::-1],
        "these are absolute errors, which the largest messages decide alone; divide "
        "each by its measured time": (
            lambda S, t: _least_squares(S, t, torch.ones_like(t))
        ),
        "squared errors are divided by t squared: weight each error with 1 / t": (
            lambda S, t: _least_squares(S, t, 1 / t.sqrt())
        ),
        "use all points, not the first and the last": _line,
        "the second number is seconds per byte, not bytes per second": (
            lambda S, t: (_relative_fit(S, t)[0], 1 / _relative_fit(S, t)[1])
        ),
        "without a column for alpha the line goes through zero": (
            lambda S, t: (torch.zeros(()), (S / t).sum() / (S / t).square().sum())
        ),
    },
    hint="least squares of alpha / t + beta S / t = 1, one row for each measurement",
)


def _chain_s(S: float, n: int, alpha: float, beta: float, k: int) -> float:
    return (n - 2 + k) * (alpha + S * beta / k)


def _best_real(S: float, n: int, alpha: float, beta: float) -> float:
    return math.sqrt((n - 2) * S * beta / alpha)


def _best_pieces(S: float, n: int, alpha: float, beta: float) -> int:
    low = max(1, math.floor(_best_real(S, n, alpha, beta)))
    return min(low, low + 1, key=lambda k: _chain_s(S, n, alpha, beta, k))


_NUM_PIECES = Exercise(
    name="num_pieces",
    arguments=("num_bytes", "n", "alpha_s", "beta_s_per_byte"),
    rtol=0.0,  # whole numbers
    reference=_best_pieces,
    cases=[
        (1e8, 8, 1e-4, 1e-9),
        (1e3, 8, 1e-4, 1e-9),
        (1.2e6, 4, 1e-4, 1e-9),
        (2.1e5, 3, 1e-4, 1e-9),
        (1.9e5, 3, 1e-4, 1e-9),
        (1e9, 2, 1e-4, 1e-9),
        (2.0**30, 64, 2e-6, 2.5e-12),
        (0, 16, 1e-4, 1e-9),
        (1e7, 1000, 5e-4, 3e-9),
    ],
    mistakes={
        "pieces are whole: try the numbers below and above the real optimum": (
            _best_real
        ),
        "the nearest whole number is not always the best: compare the two times": (
            lambda *c: max(1, round(_best_real(*c)))
        ),
        "rounding down is not always the best: compare the two times": (
            lambda *c: max(1, math.floor(_best_real(*c)))
        ),
        "rounding up is not always the best: compare the two times": (
            lambda *c: max(1, math.ceil(_best_real(*c)))
        ),
        "the pipeline has n - 1 hops; the first piece has arrived after n - 1 messages,"
        " so k pieces need n - 2 + k": (
            lambda S, n, a, b: _best_pieces(S, n + 1, a, b)
        ),
        "at least one piece must be sent": lambda *c: math.floor(_best_real(*c)),
        "in one piece every hop waits for the whole tensor": lambda *c: 1,
    },
    hint="the minimum over k of (n - 2 + k) (alpha + S beta / k), near the square root "
    "of (n - 2) S beta / alpha",
)
