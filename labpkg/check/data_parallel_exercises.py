"""Checkers of the exercises on one step of the chapter parallelism/data_parallel.

The gradient that it averages, the buckets that carry it, and when the last one arrives.

Notation: n ranks, M micro-batches, D numbers in a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from labpkg.check.result import CheckResult, Exercise


def accumulated_gradient(fn: Callable[..., Any]) -> CheckResult:
    """Check `accumulated_gradient(gradients, counts)`: the mean over all tokens.

    `gradients[r, m]` is the gradient of the mean loss of micro-batch m on rank r, which
    has `counts[r, m]` tokens.

    Shape:
        gradients (n, M, D), counts (n, M) int64 -> (D,)

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _ACCUMULATED_GRADIENT.check(fn)


def bucket_sizes(fn: Callable[..., Any]) -> CheckResult:
    """Check `bucket_sizes(sizes, bucket_bytes)`: the buckets in the order they leave.

    `sizes` are the bytes of the parameters in the order of the forward pass. Buckets
    are filled from the last parameter to the first; a bucket is closed by the parameter
    with which it reaches `bucket_bytes`, and the last bucket holds the rest.

    Args:
        fn: your function; it returns a list of bytes.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _BUCKET_SIZES.check(fn)


def end_of_step(fn: Callable[..., Any]) -> CheckResult:
    """Check `end_of_step(ready, durations)`: when the last bucket has arrived.

    Bucket i is complete at `ready[i]`, which rises with i, and takes `durations[i]` on
    the link, which carries one bucket at a time, in order.

    Args:
        fn: your function; it returns a time.

    Returns:
        A `CheckResult`, false with a hint when a case fails.

    Reference:
        Li et al. 2020, arXiv:2006.15704.
    """
    return _END_OF_STEP.check(fn)


def _random(*shape: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device="cpu")


def _counts(*numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _over_all(gradients: Tensor, counts: Tensor) -> Tensor:
    return (gradients * counts[..., None]).sum((0, 1)) / counts.sum()


def _over_each_rank(gradients: Tensor, counts: Tensor) -> Tensor:
    """Return the weighted mean of each rank, (n, D)."""
    return (gradients * counts[..., None]).sum(1) / counts.sum(1, keepdim=True)


_ACCUMULATED_GRADIENT = Exercise(
    name="accumulated_gradient",
    arguments=("gradients", "counts"),
    reference=_over_all,
    cases=[
        (_random(2, 2, 3), _counts([9, 1], [2, 4])),
        (_random(2, 3, 1), _counts([4, 4, 4], [4, 4, 4])),
        (_random(1, 4, 2), _counts([1, 2, 3, 4])),
        (_random(4, 1, 2), _counts([5], [1], [1], [1])),
        (_random(3, 2, 4), _counts([5, 0], [1, 7], [0, 3])),
        (_random(1, 1, 5), _counts([6])),
        (_random(2, 2, 2), _counts([100, 1], [1, 1])),
        (_random(4, 3, 2), _counts([1, 2, 3], [3, 2, 1], [9, 9, 9], [1, 1, 1])),
    ],
    mistakes={
        "M micro-batches make the step M times too long: the mean over micro-batches "
        "is missing": lambda g, counts: g.mean(0).sum(0),
        "this is the sum over all tokens; divide by their number": lambda g, counts: (
            g * counts[..., None]
        ).sum((0, 1)),
        "a micro-batch with more tokens weighs more: multiply each gradient by its "
        "count": lambda g, counts: g.mean((0, 1)),
        "right on each rank, but the ranks have different numbers of tokens: divide "
        "once, by all tokens": lambda g, counts: _over_each_rank(g, counts).mean(0),
        "every rank needs the mean over all ranks: add over the first dim too": (
            _over_each_rank
        ),
        "only the last micro-batch is left: gradients add up until the step": (
            lambda g, counts: (
                (g[:, -1] * counts[:, -1:]).sum(0) / counts[:, -1].sum().clamp(1)
            )
        ),
    },
    hint="each token counts once, wherever it is: weigh a gradient by its share of the "
    "tokens of all ranks and micro-batches",
)


def _buckets(sizes: Sequence[int], bucket_bytes: int) -> list[int]:
    buckets, filled = [], 0
    for size in reversed(sizes):
        filled += size
        if filled >= bucket_bytes:
            buckets.append(filled)
            filled = 0
    return buckets + [filled] * (filled > 0)


def _never_above(sizes: Sequence[int], bucket_bytes: int) -> list[int]:
    """Close a bucket before the parameter that would make it too large."""
    buckets: list[int] = []
    for size in reversed(sizes):
        if buckets and buckets[-1] + size <= bucket_bytes:
            buckets[-1] += size
        else:
            buckets.append(size)
    return buckets


_BUCKET_SIZES = Exercise(
    name="bucket_sizes",
    arguments=("sizes", "bucket_bytes"),
    reference=_buckets,
    cases=[
        ([4, 8, 4, 8], 12),
        ([10, 20, 30], 25),
        ([5, 5, 5, 5, 5], 10),
        ([100, 1, 1], 10),
        ([1, 1, 100], 10),
        ([7], 100),
        ([8192, 128, 1280, 40], 1024),
        ([401408, 512, 5120, 40], 2**20),
    ],
    mistakes={
        "the order: backward reaches the last parameter first, so begin with it": (
            lambda sizes, limit: _buckets(sizes[::-1], limit)
        ),
        "the order of the buckets: the one with the last parameter leaves first": (
            lambda sizes, limit: _buckets(sizes, limit)[::-1]
        ),
        "the parameter that reaches the limit still belongs to the bucket": (
            _never_above
        ),
        "the last bucket is missing: it holds the rest, however little": (
            lambda sizes, limit: [b for b in _buckets(sizes, limit) if b >= limit]
        ),
        "a bucket with exactly bucket_bytes is full": lambda sizes, limit: _buckets(
            sizes, limit + 1
        ),
        "a bucket with nothing in it does not leave": lambda sizes, limit: (
            [*_buckets(sizes, limit), 0]
        ),
        "a bucket is a group of parameters; add up their bytes": (
            lambda sizes, limit: sizes[::-1]
        ),
        "one bucket with everything cannot leave before backward has ended": (
            lambda sizes, limit: [sum(sizes)]
        ),
    },
    hint="add from the last size to the first; close at >= bucket_bytes; keep the rest",
)


def _end(ready: Sequence[float], durations: Sequence[float]) -> float:
    end = 0.0
    for start, duration in zip(ready, durations, strict=True):
        end = max(start, end) + duration
    return end


_END_OF_STEP = Exercise(
    name="end_of_step",
    arguments=("ready", "durations"),
    reference=_end,
    cases=[
        ([1.0, 2.0, 3.0], [0.5, 0.5, 0.5]),
        ([1.0, 2.0, 3.0], [2.0, 3.0, 0.5]),
        ([1.0, 2.0, 9.0], [3.0, 1.0, 1.0]),
        ([4.0], [2.5]),
        ([1.0, 1.5, 2.0, 2.5], [4.0, 0.1, 0.1, 0.1]),
        ([2.0, 4.0, 6.0], [1.0, 5.0, 0.0]),
        ([1.0, 5.0], [1.0, 7.0]),
        ([0.5, 1.0, 1.5, 10.0], [3.0, 3.0, 3.0, 3.0]),
    ],
    mistakes={
        "this is communication after backward; a bucket leaves when it is ready": (
            lambda ready, durations: ready[-1] + sum(durations)
        ),
        "the last bucket may have to wait for the link": lambda ready, durations: (
            ready[-1] + durations[-1]
        ),
        "the largest bucket need not be the last one: go through them in order": (
            lambda ready, durations: ready[-1] + max(durations)
        ),
        "the link carries one bucket at a time: a bucket waits for the one before": (
            lambda ready, durations: max(map(sum, zip(ready, durations, strict=True)))
        ),
        "a bucket cannot leave before it is ready": lambda ready, durations: sum(
            durations
        ),
        "this is the end of backward; the buckets are still on the link": (
            lambda ready, durations: ready[-1]
        ),
        "the link may also wait for backward: take the larger of both times bucket "
        "by bucket": lambda ready, durations: ready[0] + sum(durations),
    },
    hint="bucket by bucket: it leaves when it is complete and the one before it has "
    "arrived",
)
