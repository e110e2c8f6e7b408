"""Checkers of exercises of the chapter processes/collectives: slices, order, bytes.

Ranks are a list: entry r belongs to rank r. Notation: n ranks, S bytes of the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from labpkg.check.result import CheckResult, Exercise


def exchange(fn: Callable[..., Any]) -> CheckResult:
    """Check `exchange(inputs)`: an all-to-all between the ranks of a list.

    Each input is cut into n equal slices; slice p goes to rank p, which joins what it
    gets in the order of the senders.

    Shape:
        n tensors (K,) -> n tensors (K,), K divisible by n

    Args:
        fn: your function; it returns a list of tensors.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _EXCHANGE.check(fn)


def broadcast_gradient(fn: Callable[..., Any]) -> CheckResult:
    """Check `broadcast_gradient(gradients, src)`: the way back of a broadcast.

    `gradients[r]` is the gradient with respect to what rank r received. The answer is
    the gradient with respect to the input of each rank, for the sum of all losses.

    Shape:
        n tensors (K,) -> n tensors (K,)

    Args:
        fn: your function; it returns a list of tensors.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _BROADCAST_GRADIENT.check(fn)


def first_mismatch(fn: Callable[..., Any]) -> CheckResult:
    """Check `first_mismatch(calls)`: where ranks begin to disagree.

    `calls[r]` lists the collectives that rank r issued, in order. The answer is the
    first position at which not all ranks have the same call, or -1. A rank whose list
    has ended disagrees with one that goes on.

    Args:
        fn: your function; it returns an index.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _FIRST_MISMATCH.check(fn)


def sent_bytes(fn: Callable[..., Any]) -> CheckResult:
    """Check `sent_bytes(algorithm, num_bytes, n, rank)`: what one rank sends.

    It takes part in an all-reduce. The algorithm is "ring", "tree" (binomial, with root
    0) or "doubling" (then n is a power of two); `num_bytes` is the size of the tensor.

    Args:
        fn: your function; it returns a number.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _SENT_BYTES.check(fn)


def _ranks(*rows: Sequence[float]) -> list[Tensor]:
    return [torch.tensor(row, dtype=torch.float32, device="cpu") for row in rows]


def _random(n: int, numel: int) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(n * numel)
    draw = lambda: torch.randint(-9, 10, (numel,), generator=generator, device="cpu")
    return [draw().float() for _ in range(n)]


def _exchanged(inputs: list[Tensor]) -> list[Tensor]:
    slices = [x.chunk(len(inputs)) for x in inputs]
    return [torch.cat(row) for row in zip(*slices, strict=True)]


_EXCHANGE = Exercise(
    name="exchange",
    arguments=("inputs",),
    reference=_exchanged,
    cases=[
        (_ranks([1, 2], [3, 4]),),
        (_ranks([1, 2, 3], [4, 5, 6], [7, 8, 9]),),
        (_ranks([1, 2, 3, 4], [5, 6, 7, 8]),),
        (_ranks([5, 5]),),
        (_random(4, 4),),
        (_random(2, 6),),
        (_random(3, 9),),
        (_random(4, 16),),
        (_random(5, 10),),
        (_random(8, 8),),
    ],
    mistakes={
        "this is an all-gather: every rank gets everything; rank r gets only slice r "
        "of each": lambda inputs: [torch.cat(inputs) for _ in inputs],
        "this is a reduce-scatter: an exchange does not add, it joins": lambda inputs: [
            sum(parts)
            for parts in zip(*(x.chunk(len(inputs)) for x in inputs), strict=True)
        ],
        "join the slices in the order of the senders, rank 0's first": lambda inputs: [
            torch.cat(
                [x.chunk(len(inputs))[r] for x in reversed(inputs)],
            )
            for r in range(len(inputs))
        ],
        "join the slices to one vector: cat, not stack": lambda inputs: [
            torch.stack(parts)
            for parts in zip(*(x.chunk(len(inputs)) for x in inputs), strict=True)
        ],
        "this gives each rank the whole tensor of a neighbour; an exchange sends a "
        "slice to everybody": lambda inputs: inputs[-1:] + inputs[:-1],
    },
    hint="rank r gets slice r of every rank: cat([x.chunk(n)[r] for x in inputs])",
)


def _at_source(gradients: list[Tensor], src: int, value: Tensor) -> list[Tensor]:
    zero = torch.zeros_like(value)
    return [value if r == src else zero for r in range(len(gradients))]


def _total(gradients: list[Tensor]) -> Tensor:
    return torch.stack(gradients).sum(0)


_BROADCAST_GRADIENT = Exercise(
    name="broadcast_gradient",
    arguments=("gradients", "src"),
    reference=lambda g, src: _at_source(g, src, _total(g)),
    cases=[
        (_ranks([1, 2], [3, 4]), 0),
        (_ranks([1, 2], [3, 4]), 1),
        (_ranks([1, 0], [0, 1], [2, 2]), 1),
        (_ranks([7, 8]), 0),
        (_random(4, 3), 3),
        (_random(4, 3), 0),
        (_random(5, 1), 2),
        (_random(3, 6), 1),
        (_random(8, 2), 7),
        (_random(2, 12), 0),
    ],
    mistakes={
        "the inputs of the other ranks reached nobody: their gradient is zero": (
            lambda g, src: [_total(g) for _ in g]
        ),
        "every copy has the source's input as its cause: add the gradients of all": (
            lambda g, src: _at_source(g, src, g[src])
        ),
        "the loss is the sum over ranks, not the mean: do not divide": (
            lambda g, src: _at_source(g, src, _total(g) / len(g))
        ),
        "the source's gradient is not that of the others; nothing is broadcast on the "
        "way back": lambda g, src: [g[src] for _ in g],
        "the sum belongs to the rank src": lambda g, src: _at_source(g, 0, _total(g)),
        "return zeros for the other ranks, in the shape of the input": lambda g, src: [
            _total(g)
        ],
    },
    hint="the transpose of a broadcast is a reduce: the sum at src, zeros elsewhere",
)


def _mismatch(calls: Sequence[Sequence[str]]) -> int:
    for i, row in enumerate(zip_longest(*calls)):
        if len(set(row)) > 1:
            return i
    return -1


def _zipped(calls: Sequence[Sequence[str]]) -> int:
    rows = enumerate(zip(*calls, strict=False))
    return next((i for i, row in rows if len(set(row)) > 1), -1)


def _last_mismatch(calls: Sequence[Sequence[str]]) -> int:
    rows = enumerate(zip_longest(*calls))
    return max((i for i, row in rows if len(set(row)) > 1), default=-1)


_A, _B, _C = "all_reduce of 4", "all_reduce of 8", "broadcast of 4"
_FIRST_MISMATCH = Exercise(
    name="first_mismatch",
    arguments=("calls",),
    rtol=0.0,  # whole numbers
    reference=_mismatch,
    cases=[
        ([[_A, _B, _C, _A], [_A, _C, _B, _B]],),
        ([[_A, _B], [_A, _B]],),
        ([[_A, _B], [_B, _A]],),
        ([[_A, _A, _B], [_A, _A, _B], [_A, _A, _C]],),
        ([[_A, _B], [_A, _C], [_A, _B]],),
        ([[_A, _B], [_A]],),
        ([[_A], [_A, _B], [_A]],),
        ([[], []],),
        ([[_C], []],),
        ([[_A] * 5 + [_B], [_A] * 6, [_A] * 5 + [_C]],),
        ([[_A, _B, _C]],),
        ([[_B, _A, _A], [_A, _A, _B], [_B, _A, _A]],),
    ],
    mistakes={
        "a list that has ended disagrees with one that goes on: that rank would wait "
        "for ever": _zipped,
        "the same calls in another order are a mismatch too": lambda calls: _mismatch(
            [sorted(own) for own in calls]
        ),
        "compare all ranks, not only the first two": lambda calls: _mismatch(calls[:2]),
        "compare all ranks with each other, not only the first with the last": (
            lambda calls: _mismatch([calls[0], calls[-1]])
        ),
        "this is the last mismatch; it is a consequence of the first one": (
            _last_mismatch
        ),
        "positions start at 0": lambda calls: (
            _mismatch(calls) + 1 if _mismatch(calls) >= 0 else -1
        ),
        "return the position, not whether there is one": lambda calls: (
            _mismatch(calls) >= 0
        ),
    },
    hint="walk through the positions; the first whose calls are not all equal, or -1",
)


def _num_children(rank: int, n: int) -> int:
    """Return to how many ranks a rank of a binomial tree with root 0 sends."""
    return sum(rank % (2 * k) == 0 and rank + k < n for k in map(_power, range(16)))


def _power(k: int) -> int:
    return 2**k


def _sent(algorithm: str, S: int, n: int, rank: int) -> float:
    if algorithm == "ring":
        return 2 * (n - 1) / n * S
    if algorithm == "doubling":
        return (n.bit_length() - 1) * S
    return ((rank > 0) + _num_children(rank, n)) * S


def _if(name: str, other: Callable[[int, int, int], float]) -> Callable[..., float]:
    """Return the right answer, but for one algorithm."""
    return lambda algorithm, S, n, rank: (
        other(S, n, rank) if algorithm == name else _sent(algorithm, S, n, rank)
    )


_SENT_BYTES = Exercise(
    name="sent_bytes",
    arguments=("algorithm", "num_bytes", "n", "rank"),
    reference=_sent,
    cases=[
        ("ring", 600, 3, 1),
        ("ring", 1000, 4, 0),
        ("doubling", 100, 4, 2),
        ("doubling", 100, 8, 0),
        ("doubling", 100, 2, 1),
        ("tree", 100, 4, 3),
        ("tree", 100, 4, 0),
        ("tree", 100, 4, 2),
        ("tree", 100, 7, 6),
        ("tree", 100, 5, 4),
        ("tree", 100, 6, 4),
        ("tree", 100, 8, 0),
        ("tree", 100, 1, 0),
        ("ring", 100, 1, 0),
    ],
    mistakes={
        "a ring goes round twice: once to add, once to hand out the sums": _if(
            "ring", lambda S, n, rank: (n - 1) / n * S
        ),
        "on a ring a message is one of n pieces: S / n bytes": _if(
            "ring", lambda S, n, rank: 2 * (n - 1) * S
        ),
        "2 (n - 1) / n is 2 minus 2 / n: the own piece does not travel": _if(
            "ring", lambda S, n, rank: 2 * S if n > 1 else 0
        ),
        "doubling needs log2 n rounds, not n - 1": _if(
            "doubling", lambda S, n, rank: (n - 1) * S
        ),
        "in doubling every round sends the whole tensor": _if(
            "doubling", lambda S, n, rank: 2 * (n - 1) / n * S
        ),
        "doubling has one round for each distance 1, 2, 4, ..., and no way back": _if(
            "doubling", lambda S, n, rank: 2 * (n.bit_length() - 1) * S
        ),
        "in a tree a rank also sends the sum down to its children": _if(
            "tree", lambda S, n, rank: (rank > 0) * S
        ),
        "in a tree every rank but the root sends its own sum up": _if(
            "tree", lambda S, n, rank: _num_children(rank, n) * S
        ),
        "the ranks of a tree send different amounts: only rank 0 has a child for each "
        "round": _if("tree", lambda S, n, rank: (n - 1).bit_length() * S),
        "a child exists only if its number is below n": _if(
            "tree",
            lambda S, n, rank: (
                ((rank > 0) + _num_children(rank, 2 ** (n - 1).bit_length())) * S
            ),
        ),
    },
    hint="count the messages of the rank; each has S / n bytes on a ring, else S",
)
