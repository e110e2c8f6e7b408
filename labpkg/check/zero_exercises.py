"""Checkers of the exercises of the chapter parallelism/zero: who holds how much.

The exercises on the step itself are in `zero_step_exercises`. Notation: n ranks; a flat
bucket is cut into n slices as `torch.tensor_split` does it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from labpkg.check.result import CheckResult, Exercise


def zero_memory(fn: Callable[..., Any]) -> CheckResult:
    """Check `zero_memory(num_elements, stage, n)`: the bytes of one rank.

    Weights, gradients and the two moments of Adam are float32: 4, 4 and 8 bytes for
    each element. Stage 0 divides nothing, and `num_elements` is a multiple of n.

    Args:
        fn: your function; it returns a number of bytes.

    Returns:
        A `CheckResult`, false with a hint when a case fails.

    Reference:
        Rajbhandari et al. 2020, arXiv:1910.02054.
    """
    return _ZERO_MEMORY.check(fn)


def owned_ranges(fn: Callable[..., Any]) -> CheckResult:
    """Check `owned_ranges(sizes, n, rank)`: what a rank owns of each parameter.

    Parameters with `sizes` elements lie one after the other in a flat bucket, which is
    cut into n slices, in the order of the ranks. Their lengths differ by at most one:
    the first (number of elements) mod n ranks have one element more.

    Args:
        fn: your function; it returns for each parameter a pair (start, stop), counted
            from the parameter's own first element, (0, 0) where the rank owns nothing.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _OWNED_RANGES.check(fn)


def fewest_ranks(fn: Callable[..., Any]) -> CheckResult:
    """Check `fewest_ranks(num_elements, stage, memory_bytes)`: the least n that fits.

    Mixed precision: each element costs 2 bytes as a weight, 2 as a gradient and 12 in
    the optimizer. All that a rank holds must be at most `memory_bytes`; if no number of
    ranks is enough, the answer is -1. The cut is even, without padding.

    Args:
        fn: your function; it returns an int.

    Returns:
        A `CheckResult`, false with a hint when a case fails.

    Reference:
        Rajbhandari et al. 2020, arXiv:1910.02054, table 1.
    """
    return _FEWEST_RANKS.check(fn)


def _memory(num_elements: int, stage: int, n: int) -> float:
    weight, gradient, moments = (
        nbytes / (n if stage >= first else 1)
        for nbytes, first in ((4, 3), (4, 2), (8, 1))
    )
    return num_elements * (weight + gradient + moments)


_ZERO_MEMORY = Exercise(
    name="zero_memory",
    arguments=("num_elements", "stage", "n"),
    reference=_memory,
    cases=[
        (100, 1, 4),
        (100, 0, 4),
        (100, 2, 4),
        (100, 3, 4),
        (101_770, 1, 2),
        (101_770, 3, 1),
        (10**9, 2, 8),
        (7_500_000_000, 3, 64),
    ],
    mistakes={
        "one stage too far: stage 0 divides nothing, stage 1 the moments": (
            lambda K, stage, n: _memory(K, min(stage + 1, 3), n)
        ),
        "one stage too few: only stage 0 divides nothing": lambda K, stage, n: _memory(
            K, max(stage - 1, 0), n
        ),
        "Adam keeps two numbers for each element, of 4 bytes each": (
            lambda K, stage, n: _memory(K, stage, n) - 4 * K / (n if stage else 1)
        ),
        "these are the bytes of all ranks together": lambda K, stage, n: (
            n * _memory(K, stage, n)
        ),
        "only stage 3 divides everything": lambda K, stage, n: _memory(
            K, 3 if stage else 0, n
        ),
        "the gradients are missing: 4 bytes each": lambda K, stage, n: (
            _memory(K, stage, n) - 4 * K / (n if stage >= 2 else 1)
        ),
        "these are elements; multiply by the bytes of each": lambda K, stage, n: (
            _memory(K, stage, n) / 4
        ),
    },
    hint="add three terms, for weight, gradient and moments: each is whole, or is "
    "divided by n from its stage on",
)


def _ranges(sizes: Sequence[int], n: int, rank: int) -> list[tuple[int, int]]:
    short, num_longer = divmod(sum(sizes), n)
    first = rank * short + min(rank, num_longer)
    return _between(sizes, first, first + short + (rank < num_longer))


def _between(sizes: Sequence[int], first: int, last: int) -> list[tuple[int, int]]:
    """Return the part of each parameter that lies in [first, last) of the bucket."""
    ranges, offset = [], 0
    for size in sizes:
        start, stop = (min(max(end - offset, 0), size) for end in (first, last))
        ranges.append((start, stop) if start < stop else (0, 0))
        offset += size
    return ranges


def _rounded_up(sizes: Sequence[int], n: int, rank: int) -> list[tuple[int, int]]:
    length = -(-sum(sizes) // n)
    return _between(sizes, rank * length, (rank + 1) * length)


def _in_the_bucket(sizes: Sequence[int], n: int, rank: int) -> list[tuple[int, int]]:
    ranges, offset = _ranges(sizes, n, rank), 0
    moved = []
    for size, (start, stop) in zip(sizes, ranges, strict=True):
        shift = offset if start < stop else 0
        moved.append((start + shift, stop + shift))
        offset += size
    return moved


def _floored(sizes: Sequence[int], n: int, rank: int) -> list[tuple[int, int]]:
    length = sum(sizes) // n
    return _between(sizes, rank * length, (rank + 1) * length)


def _each_cut(sizes: Sequence[int], n: int, rank: int) -> list[tuple[int, int]]:
    return [_ranges([size], n, rank)[0] for size in sizes]


def _from_own_start(sizes: Sequence[int], n: int, rank: int) -> list[tuple[int, int]]:
    return [(0, stop - start) for start, stop in _ranges(sizes, n, rank)]


def _inverted(sizes: Sequence[int], n: int, rank: int) -> list[tuple[int, int]]:
    short, num_longer = divmod(sum(sizes), n)
    first = rank * short + min(rank, num_longer)
    last, offset, ranges = first + short + (rank < num_longer), 0, []
    for size in sizes:
        ranges.append((max(first - offset, 0), min(last - offset, size)))
        offset += size
    return ranges


def _longer_at_the_end(
    sizes: Sequence[int], n: int, rank: int
) -> list[tuple[int, int]]:
    short, num_longer = divmod(sum(sizes), n)
    num_short = n - num_longer
    first = rank * short + max(rank - num_short, 0)
    return _between(sizes, first, first + short + (rank >= num_short))


def _unclamped(sizes: Sequence[int], n: int, rank: int) -> list[tuple[int, int]]:
    short, num_longer = divmod(sum(sizes), n)
    first = rank * short + min(rank, num_longer)
    last, offset, ranges = first + short + (rank < num_longer), 0, []
    for size in sizes:
        ranges.append((max(first - offset, 0), max(last - offset, 0)))
        offset += size
    return ranges


_OWNED_RANGES = Exercise(
    name="owned_ranges",
    arguments=("sizes", "n", "rank"),
    reference=_ranges,
    cases=[
        ([6, 2], 2, 1),
        ([6, 2], 2, 0),
        ([3, 4, 2], 3, 1),
        ([5, 5], 3, 2),
        ([7], 2, 0),
        ([7], 4, 3),
        ([1, 1], 4, 3),
        ([4, 4, 4], 1, 0),
        ([100_352, 128, 1_280, 10], 2, 1),
        ([2, 0, 3], 2, 0),
    ],
    mistakes={
        "count from the first element of the parameter, not of the bucket": (
            _in_the_bucket
        ),
        "the last elements have no owner: the first ranks have one element more": (
            _floored
        ),
        "lengths differ by at most one: when all are rounded up, the last rank may get "
        "nothing": _rounded_up,
        "the bucket is cut, not each parameter by itself": _each_cut,
        "a slice begins where the slice of the rank before ended": _from_own_start,
        "a range ends with its parameter at the latest, and is (0, 0) when empty": (
            _unclamped
        ),
        "an empty range is (0, 0): its end lies before its start here": _inverted,
        "the first ranks have one element more, not the last": _longer_at_the_end,
        "this is the part of rank n - 1 - rank: rank 0 owns the front": (
            lambda sizes, n, rank: _ranges(sizes, n, n - 1 - rank)
        ),
    },
    hint="find where the rank's slice begins and ends in the bucket, then which part "
    "of each parameter lies between",
)


def _divided_bytes(stage: int) -> int:
    return (0, 12, 14, 16)[stage]


def _fewest(num_elements: int, stage: int, memory_bytes: int) -> int:
    divided = num_elements * _divided_bytes(stage)
    free = memory_bytes - (16 * num_elements - divided)
    if divided == 0:
        return 1 if free >= 0 else -1
    return max(1, -(-divided // free)) if free > 0 else -1


def _rounded_down(num_elements: int, stage: int, memory_bytes: int) -> int:
    divided = num_elements * _divided_bytes(stage)
    free = memory_bytes - (16 * num_elements - divided)
    if free < 0 or free == 0 < divided:
        return -1
    return max(1, divided // free) if divided else 1


def _never_when_full(num_elements: int, stage: int, memory_bytes: int) -> int:
    free = memory_bytes - (16 - _divided_bytes(stage)) * num_elements
    return _fewest(num_elements, stage, memory_bytes) if free > 0 else -1


def _power_of_two(num_elements: int, stage: int, memory_bytes: int) -> int:
    n = _fewest(num_elements, stage, memory_bytes)
    return n if n < 1 else 1 << (n - 1).bit_length()


_FEWEST_RANKS = Exercise(
    name="fewest_ranks",
    arguments=("num_elements", "stage", "memory_bytes"),
    reference=_fewest,
    cases=[
        (1_000, 3, 4_000),
        (1_000, 1, 6_000),
        (1_000, 2, 3_000),
        (1_000, 0, 16_000),
        (1_000, 0, 15_999),
        (1_000, 1, 4_000),
        (1_000, 2, 2_000),
        (1_000, 3, 3_000),
        (10, 3, 10**6),
        (7_500_000_000, 1, 32 * 10**9),
        (7_500_000_000, 3, 24 * 10**9),
    ],
    mistakes={
        "this n is too small for the last bytes: round up": _rounded_down,
        "this divides everything; what the stage does not divide is in the memory of "
        "each rank": lambda K, stage, memory: -(-16 * K // memory),
        "any number of ranks will do, not only powers of two": _power_of_two,
        "where nothing is divided, a rank that is full holds all": _never_when_full,
        "at most memory_bytes: a rank may be full": lambda K, stage, memory: _fewest(
            K, stage, memory - 1
        ),
        "stage 1 divides 12 of the 16 bytes, stage 2 14, stage 3 all": (
            lambda K, stage, memory: _fewest(K, min(stage + 1, 3), memory)
        ),
        "some stages never fit: what they do not divide is too large already; return "
        "-1": lambda K, stage, memory: max(1, _fewest(K, stage, memory)),
    },
    hint="a rank holds what its stage leaves whole; how much memory does that leave "
    "for its slice?",
)
