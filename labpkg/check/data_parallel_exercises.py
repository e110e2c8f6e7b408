"""Checkers of the exercises of the chapter parallelism/data_parallel.

Notation: n ranks, B samples in the global batch, D numbers in a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from labpkg.check.result import CheckResult, Exercise


def shard_batch(fn: Callable[..., Any]) -> CheckResult:
    """Check `shard_batch(batch, num_ranks)`: each sample on exactly one rank, in order.

    Rank r gets the samples from B r // n up to B (r + 1) // n, so sizes differ by at
    most one and a rank may have none.

    Shape:
        batch (B, ...) -> list of n tensors (about B/n, ...)

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _SHARD_BATCH.check(fn)


def mean_gradients(fn: Callable[..., Any]) -> CheckResult:
    """Check `mean_gradients(gradients)`: what every rank holds after averaging.

    `gradients[r][i]` is the gradient of parameter i on rank r; all ranks have as many
    samples.

    Shape:
        gradients: n lists of tensors -> one list of tensors of the same shapes

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _MEAN_GRADIENTS.check(fn)


def loss_weights(fn: Callable[..., Any]) -> CheckResult:
    """Check `loss_weights(counts)`: the factor for the mean loss of each rank.

    With these factors, the plain mean over ranks is the mean over all samples.

    Shape:
        counts (n,) int64 -> (n,)

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _LOSS_WEIGHTS.check(fn)


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


def _shards(batch: Tensor, n: int) -> list[Tensor]:
    B = len(batch)
    return [batch[B * r // n : B * (r + 1) // n] for r in range(n)]


_SHARD_BATCH = Exercise(
    name="shard_batch",
    arguments=("batch", "num_ranks"),
    reference=_shards,
    cases=[
        (torch.arange(8.0, device="cpu"), 4),
        (torch.arange(10.0, device="cpu"), 4),
        (torch.arange(10.0, device="cpu"), 3),
        (torch.arange(4.0, device="cpu"), 1),
        (torch.arange(2.0, device="cpu"), 3),
        (torch.arange(7.0, device="cpu"), 7),
        (torch.arange(0.0, device="cpu"), 2),
        (_random(5, 2), 2),
    ],
    mistakes={
        "every rank gets the whole batch: n times the work, and no new "
        "sample": lambda batch, n: [batch] * n,
        "samples are lost when n does not divide B: the last rank ends at B": (
            lambda batch, n: [
                batch[len(batch) // n * r : len(batch) // n * (r + 1)] for r in range(n)
            ]
        ),
        "the last rank gets everything that remains; sizes may differ by one": (
            lambda batch, n: [
                batch[len(batch) // n * r :][: len(batch) // n if r < n - 1 else None]
                for r in range(n)
            ]
        ),
        "rank r gets every n-th sample; the pieces must be contiguous, so that they "
        "join to the batch in order": lambda batch, n: [batch[r::n] for r in range(n)],
        "torch.chunk may return fewer pieces than ranks, or an uneven last one": (
            lambda batch, n: list(batch.chunk(n))
        ),
        "the right sizes on other ranks: rank r starts at B r // n": (
            lambda batch, n: list(batch.tensor_split(n))
        ),
    },
    hint="rank r gets batch[B * r // n : B * (r + 1) // n], for r = 0 to n - 1",
)


def _totals(gradients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(of_ranks).sum(0) for of_ranks in zip(*gradients, strict=True)]


def _means(gradients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [total / len(gradients) for total in _totals(gradients)]


def _replicas(num_ranks: int, *shapes: tuple[int, ...]) -> list[list[Tensor]]:
    return [
        [_random(*shape) * (rank + 1) + rank for shape in shapes]
        for rank in range(num_ranks)
    ]


_MEAN_GRADIENTS = Exercise(
    name="mean_gradients",
    arguments=("gradients",),
    reference=_means,
    cases=[
        (_replicas(2, (3,), (2,), (1,)),),
        (_replicas(4, (2, 3), (2,)),),
        (_replicas(3, (2, 3), (2,), (1, 2), (1,)),),
        (_replicas(1, (4,), (2, 2)),),
        (_replicas(5, (1,), (1,)),),
        (_replicas(2, (2, 1, 2)),),
        (_replicas(8, (2,), (3,)),),
        (_replicas(3, (0,), (2,)),),
    ],
    mistakes={
        "this is the sum; n ranks make the step n times too long: divide by n": _totals,
        "these are the gradients of one rank; nothing was averaged": (
            lambda gradients: list(gradients[0])
        ),
        "average parameter i over the ranks, not rank r over its parameters": (
            lambda all_: [
                torch.cat([g.reshape(-1) for g in g_r]).mean() for g_r in all_
            ]
        ),
        "return one list, not one for each rank: all ranks hold the same": (
            lambda gradients: [_means(gradients)] * len(gradients)
        ),
        "divide by the number of ranks, not of parameters": lambda gradients: [
            total / len(gradients[0]) for total in _totals(gradients)
        ],
    },
    hint="for each parameter i, the mean of gradients[r][i] over the ranks r",
)

_LOSS_WEIGHTS = Exercise(
    name="loss_weights",
    arguments=("counts",),
    reference=lambda counts: len(counts) * counts / counts.sum(),
    cases=[
        (_counts(90, 10),),
        (_counts(34, 33, 33),),
        (_counts(8, 8, 8, 8),),
        (_counts(5),),
        (_counts(0, 3),),
        (_counts(1, 0, 0, 2),),
        (_counts(1, 2, 3, 4, 5),),
        (_counts(1000, 1),),
    ],
    mistakes={
        "the averaging divides by n as well: multiply by n": lambda counts: (
            counts / counts.sum()
        ),
        "equal weights ignore the counts": lambda counts: torch.ones(len(counts)),
        "this gives all ranks the same say; a rank with more samples weighs more": (
            lambda counts: counts.sum() / (len(counts) * counts)
        ),
        "divide by the number of all samples": lambda counts: len(counts) * counts,
    },
    hint="n * count / sum of the counts: 1 when all counts are equal, 0 for no samples",
)


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
    hint="sum of gradient x count over ranks and micro-batches / the sum of all counts",
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
        ([1.0, 2.0, 3.0], [2.0, 3.0, 1.0]),
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
    hint="end = max(ready[i], end) + durations[i], bucket by bucket, from end = 0",
)
