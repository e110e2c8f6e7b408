"""Checkers of the exercises of the chapter processes/ranks.

Notation: n ranks, N items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from labpkg.check.result import CheckResult, Exercise


def shard_bounds(fn: Callable[..., Any]) -> CheckResult:
    """Check `shard_bounds(num_items, world_size, rank)`: the items of one rank.

    Rank r gets the items from N r // n up to, but not including, N (r + 1) // n.

    Args:
        fn: your function; it returns the pair (start, stop).

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _SHARD_BOUNDS.check(fn)


def ring_neighbours(fn: Callable[..., Any]) -> CheckResult:
    """Check `ring_neighbours(rank, world_size)`: whom a rank hears and whom it tells.

    Args:
        fn: your function; it returns the pair (previous rank, next rank).

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _RING_NEIGHBOURS.check(fn)


def global_rank(fn: Callable[..., Any]) -> CheckResult:
    """Check `global_rank(coordinates, sizes)`: the rank at a place of a mesh.

    Both lists go from the outermost axis to the innermost; along the innermost axis
    the ranks are neighbours.

    Args:
        fn: your function; it returns a rank.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _GLOBAL_RANK.check(fn)


def first_failure(fn: Callable[..., Any]) -> CheckResult:
    """Check `first_failure(times_s, lost_connection)`: the rank to blame.

    `times_s[r]` is when rank r failed, or infinity; `lost_connection[r]` says that its
    error was a lost connection, so that another rank must have failed before. If all
    errors are of this kind, the earliest has to do.

    Args:
        fn: your function; it returns a rank.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _FIRST_FAILURE.check(fn)


def hang_suspect(fn: Callable[..., Any]) -> CheckResult:
    """Check `hang_suspect(num_issued, in_collective)`: the rank that others wait for.

    `num_issued[r]` counts the collectives that rank r has issued, and
    `in_collective[r]` says that it waits in one now. Suspected is a rank outside
    collectives; if all are inside, one that is behind. In each case the rank with the
    fewest collectives comes first, then the lowest rank.

    Args:
        fn: your function; it returns a rank.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _HANG_SUSPECT.check(fn)


def _pieces(N: int, n: int, r: int, size: int) -> tuple[int, int]:
    """Return the bounds of piece r when all pieces but the last ones have `size`."""
    return min(N, r * size), min(N, (r + 1) * size)


def _long_pieces_first(N: int, n: int, r: int) -> tuple[int, int]:
    size, rest = divmod(N, n)
    return r * size + min(r, rest), (r + 1) * size + min(r + 1, rest)


_SHARD_BOUNDS = Exercise(
    name="shard_bounds",
    arguments=("num_items", "world_size", "rank"),
    rtol=0.0,  # whole numbers
    reference=lambda N, n, r: (N * r // n, N * (r + 1) // n),
    cases=[
        (12, 4, 1),
        (12, 4, 3),
        (10, 4, 3),
        (10, 4, 0),
        (10, 4, 1),
        (10, 4, 2),
        (3, 4, 0),
        (3, 4, 3),
        (0, 2, 1),
        (7, 1, 0),
        (10_000, 3, 2),
        (1797, 8, 5),
    ],
    mistakes={
        "this returns (start, size); the second number is where the piece ends": (
            lambda N, n, r: (N * r // n, N * (r + 1) // n - N * r // n)
        ),
        "the end is not included: it equals the start of the next rank": (
            lambda N, n, r: (N * r // n, N * (r + 1) // n - 1)
        ),
        "N // n items for every rank lose up to n - 1 items; multiply by the rank "
        "before you divide": (lambda N, n, r: (r * (N // n), (r + 1) * (N // n))),
        "the last rank takes the whole remainder, so the others wait for it; multiply "
        "by the rank before you divide": (
            lambda N, n, r: (r * (N // n), N if r == n - 1 else (r + 1) * (N // n))
        ),
        "pieces that are rounded up leave the last ranks too little; multiply by the "
        "rank before you divide": lambda N, n, r: _pieces(N, n, r, -(-N // n)),
        "a fair division, with the longer pieces first; the task asks for N r // n, "
        "which labpkg.batches uses too": _long_pieces_first,
        "round down with //: an item cannot be divided": (
            lambda N, n, r: (N * r / n, N * (r + 1) / n)
        ),
    },
    hint="from N r // n up to N (r + 1) // n",
)

_RING_NEIGHBOURS = Exercise(
    name="ring_neighbours",
    arguments=("rank", "world_size"),
    rtol=0.0,  # whole numbers
    reference=lambda r, n: ((r - 1) % n, (r + 1) % n),
    cases=[
        (1, 4),
        (2, 4),
        (0, 1),
        (0, 4),
        (3, 4),
        (0, 2),
        (1, 2),
        (2, 3),
        (5, 8),
        (7, 8),
    ],
    mistakes={
        "the order is (previous, next)": lambda r, n: ((r + 1) % n, (r - 1) % n),
        "a ring closes: after the last rank comes rank 0, before rank 0 the last; "
        "take both modulo world_size": lambda r, n: (r - 1, r + 1),
        "the next rank wraps around, the previous one does not: rank 0 comes after the "
        "last rank": lambda r, n: (r - 1, (r + 1) % n),
        "the previous rank wraps around, the next one does not: after the last rank "
        "comes rank 0": lambda r, n: ((r - 1) % n, r + 1),
        "this is a line, whose ends talk to themselves; a ring closes: take both "
        "modulo world_size": lambda r, n: (max(r - 1, 0), min(r + 1, n - 1)),
        "ranks go from 0 to world_size - 1, so the modulus is world_size": (
            lambda r, n: ((r - 1) % max(n - 1, 1), (r + 1) % max(n - 1, 1))
        ),
    },
    hint="((rank - 1) % world_size, (rank + 1) % world_size)",
)


def _mesh_rank(coordinates: Sequence[int], sizes: Sequence[int]) -> int:
    rank = 0
    for coordinate, size in zip(coordinates, sizes, strict=True):
        rank = rank * size + coordinate
    return rank


_GLOBAL_RANK = Exercise(
    name="global_rank",
    arguments=("coordinates", "sizes"),
    rtol=0.0,  # whole numbers
    reference=_mesh_rank,
    cases=[
        ([0, 1], [2, 4]),
        ([1, 0], [2, 4]),
        ([1, 3], [2, 4]),
        ([2, 1], [3, 2]),
        ([0], [1]),
        ([5], [8]),
        ([0, 0, 0, 0], [2, 2, 1, 2]),
        ([1, 0, 0, 1], [2, 2, 1, 2]),
        ([1, 1, 0, 0], [2, 2, 1, 2]),
        ([1, 2, 3], [2, 3, 4]),
        ([0, 2, 1], [2, 3, 4]),
        ([3, 7, 1, 5], [4, 8, 2, 8]),
    ],
    mistakes={
        "a step along an axis jumps over all ranks of the axes inside it: multiply by "
        "the product of the sizes after it": lambda c, s: sum(c),
        "this makes the outermost axis the fastest; ranks are neighbours along the "
        "innermost axis, the last": lambda c, s: _mesh_rank(c[::-1], s[::-1]),
        "a step along an axis jumps by the product of the sizes after it, without its "
        "own size": (lambda c, s: sum(x * math.prod(s[i:]) for i, x in enumerate(c))),
        "a step along an axis jumps by the product of all sizes after it, not by the "
        "next size alone": (
            lambda c, s: sum(x * t for x, t in zip(c, [*s[1:], 1], strict=True))
        ),
        "multiply by sizes, not by coordinates": lambda c, s: math.prod(c),
    },
    hint=(
        "sum over the axes of coordinate x product of the sizes of the axes after it"
    ),
)


def _blame(times_s: Sequence[float], lost_connection: Sequence[bool]) -> int:
    ranks = range(len(times_s))
    return min(
        ranks, key=lambda r: (times_s[r] == math.inf, lost_connection[r], times_s[r])
    )


def _earliest(times_s: Sequence[float], lost_connection: Sequence[bool]) -> int:
    return min(range(len(times_s)), key=lambda r: times_s[r])


_FIRST_FAILURE = Exercise(
    name="first_failure",
    arguments=("times_s", "lost_connection"),
    rtol=0.0,  # whole numbers
    reference=_blame,
    cases=[
        ([2.5, 1.5, 3.5], [False, False, False]),
        ([1.0, 2.0, 1.5], [True, False, True]),
        ([1.0, 3.0, 2.0], [True, False, False]),
        ([math.inf, math.inf, 4.0], [False, False, False]),
        ([5.0, math.inf, 4.0, 4.5], [False, False, True, False]),
        ([math.inf, 2.0, math.inf], [False, True, False]),
        ([3.0, 2.0, 2.5], [True, True, True]),
        ([0.5], [False]),
        ([0.3, 0.2, 0.1, 0.4], [False, False, True, True]),
        ([7.0, 6.0, math.inf, 8.0], [True, True, False, True]),
    ],
    mistakes={
        "the earliest error is often a victim's: leave out lost connections while "
        "there is another failure": _earliest,
        "return the rank, not the time": lambda t, lost: t[_blame(t, lost)],
        "this is the last failure; the first one is to blame": (
            lambda t, lost: max(
                (r for r in range(len(t)) if t[r] < math.inf), key=lambda r: t[r]
            )
        ),
        "a rank that has not failed (time infinity) is not to blame, also when all "
        "others lost a connection": (
            lambda t, lost: min(range(len(t)), key=lambda r: (lost[r], t[r]))
        ),
        "this is the lowest rank without a lost connection; the earliest is to "
        "blame": lambda t, lost: lost.index(False) if False in lost else 0,
    },
    hint=(
        "among the ranks that failed and did not lose a connection the one with the "
        "smallest time; without any such rank, the earliest that failed"
    ),
)


def _late_rank(num_issued: Sequence[int], in_collective: Sequence[bool]) -> int:
    ranks = range(len(num_issued))
    return min(ranks, key=lambda r: (in_collective[r], num_issued[r]))


_HANG_SUSPECT = Exercise(
    name="hang_suspect",
    arguments=("num_issued", "in_collective"),
    rtol=0.0,  # whole numbers
    reference=_late_rank,
    cases=[
        ([4, 5, 3, 4], [True, True, False, True]),
        ([5, 4, 6, 5], [True, True, True, True]),
        ([3, 5, 3], [True, False, True]),
        ([7, 6, 6], [False, True, True]),
        ([2, 2, 1], [False, True, False]),
        ([4, 3, 3, 4], [True, True, True, True]),
        ([0, 0], [False, False]),
        ([1, 0], [True, True]),
        ([9, 8, 9, 8], [False, True, True, True]),
        ([6], [True]),
    ],
    mistakes={
        "a rank outside collectives keeps the others waiting, however many it has "
        "issued before": lambda n, inside: n.index(min(n)),
        "the rank with the most collectives is ahead, so it waits; suspect one that "
        "is behind": lambda n, inside: n.index(max(n)),
        "return the rank, not the count": lambda n, inside: n[_late_rank(n, inside)],
        "if several ranks are outside collectives, or none is, the one with the fewest "
        "collectives is suspected": (
            lambda n, inside: inside.index(False) if False in inside else 0
        ),
        "a rank that waits in a collective is a victim; suspect one that is outside": (
            lambda n, inside: min(range(len(n)), key=lambda r: (not inside[r], n[r]))
        ),
    },
    hint=(
        "the smallest of (in_collective, num_issued, rank): outside collectives first, "
        "then the fewest issued, then the lowest rank"
    ),
)
