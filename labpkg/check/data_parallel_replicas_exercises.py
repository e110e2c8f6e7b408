"""Checkers of the exercises on replicas of the chapter parallelism/data_parallel.

Which gradient a rank gets if others did not use a parameter, which replica has drifted,
and what replicas do that meet only every H steps.

Notation: n ranks, D numbers in the parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from labpkg.check.result import CheckResult, Exercise


def mean_of_used(fn: Callable[..., Any]) -> CheckResult:
    """Check `mean_of_used(gradients)`: what every rank holds after averaging.

    `gradients[r][i]` is the gradient of parameter i on rank r, or None if rank r did
    not use the parameter. The result has a tensor or None for each parameter.

    Shape:
        gradients: n lists of tensors or None -> one such list

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _MEAN_OF_USED.check(fn)


def first_drift(fn: Callable[..., Any]) -> CheckResult:
    """Check `first_drift(hashes)`: who differs, and in which tensor first.

    `hashes[r][i]` is the hash of tensor i on rank r. The result is None if all replicas
    agree, else `(i, ranks)`: the first tensor with more than one hash, and the ranks
    that do not have its most frequent hash, in order. If no hash is the most frequent
    one, as between two ranks, nobody knows who is right: all ranks are named.

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _FIRST_DRIFT.check(fn)


def local_sgd(fn: Callable[..., Any]) -> CheckResult:
    """Check `local_sgd(curvature, target, lr, H, num_steps)`: n replicas that meet.

    All replicas start at 0. The gradient of rank r at its own parameters t is
    `curvature[r] * (t - target[r])`. After every H-th step each replica takes the mean
    of all; steps after the last meeting stay local.

    Shape:
        curvature (n, D), target (n, D) -> the parameters of all replicas (n, D)

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.

    Reference:
        Stich 2019, Local SGD converges fast and communicates little, arXiv:1805.09767.
    """
    return _LOCAL_SGD.check(fn)


def _random(*shape: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device="cpu")


# ---- a parameter that not every rank used ------------------------------------------

Gradients = Sequence[Sequence[Tensor | None]]


def _each(
    gradients: Gradients, answer: Callable[[list[Tensor], int], Any]
) -> list[Any]:
    """Return answer(gradients that there are, number of ranks) for each parameter."""
    there = [
        [g for g in of_ranks if g is not None]
        for of_ranks in zip(*gradients, strict=True)
    ]
    return [answer(of_ranks, len(gradients)) for of_ranks in there]


def _mean_or_none(of_ranks: list[Tensor], n: int) -> Tensor | None:
    return torch.stack(of_ranks).sum(0) / n if of_ranks else None


def _used_by(*used: str) -> list[list[Tensor | None]]:
    """Return gradients of ranks; each text has one letter for each parameter."""
    return [
        [
            _random(1 + i) + rank if letter == "x" else None
            for i, letter in enumerate(of_rank)
        ]
        for rank, of_rank in enumerate(used)
    ]


_MEAN_OF_USED = Exercise(
    name="mean_of_used",
    arguments=("gradients",),
    reference=lambda gradients: _each(gradients, _mean_or_none),
    cases=[
        (_used_by("xx", "xx"),),
        (_used_by("xx", "x-"),),
        (_used_by("x-", "-x"),),
        (_used_by("x--", "xx-"),),
        (_used_by("-x", "-x", "-x"),),
        (_used_by("x--", "-x-", "--x", "---"),),
        (_used_by("x-x"),),
        (_used_by("--", "--"),),
    ],
    mistakes={
        "a rank that did not use a parameter counts with a gradient of 0: divide by "
        "the number of ranks, not of those that used it": lambda gradients: _each(
            gradients, lambda some, n: torch.stack(some).mean(0) if some else None
        ),
        "nobody used it: return None and not 0, since an optimizer with weight decay "
        "moves a parameter whose gradient is 0": lambda gradients: _each(
            gradients, lambda some, n: sum(some) / n
        ),
        "this is the sum; divide by the number of ranks": lambda gradients: _each(
            gradients, lambda some, n: torch.stack(some).sum(0) if some else None
        ),
        "one rank that used it is enough: None only if nobody did": lambda gradients: (
            _each(
                gradients,
                lambda some, n: torch.stack(some).mean(0) if len(some) == n else None,
            )
        ),
        "these are the gradients of rank 0; all ranks get the same mean": (
            lambda gradients: list(gradients[0])
        ),
    },
    hint="for each parameter, the sum of the gradients that there are, divided by n; "
    "None if there are none",
)


# ---- which replica has drifted -----------------------------------------------------

Hashes = Sequence[Sequence[int]]
Drift = tuple[int, list[int]] | None


def _outside(hashes: Hashes, i: int, usual: int) -> list[int]:
    return [rank for rank, own in enumerate(hashes) if own[i] != usual]


def _drift(hashes: Hashes, *, lower_rank_wins: bool = False) -> Drift:
    for i, of_ranks in enumerate(zip(*hashes, strict=True)):
        counts = Counter(of_ranks).most_common()  # of equal counts, lower ranks first
        if len(counts) > 1:
            if counts[0][1] == counts[1][1] and not lower_rank_wins:
                return i, list(range(len(hashes)))
            return i, _outside(hashes, i, counts[0][0])
    return None


def _against_rank_0(hashes: Hashes) -> Drift:
    for i, of_ranks in enumerate(zip(*hashes, strict=True)):
        if len(set(of_ranks)) > 1:
            return i, _outside(hashes, i, of_ranks[0])
    return None


def _by_more_than_half(hashes: Hashes) -> Drift:
    found = _drift(hashes)
    if found and 2 * len(found[1]) >= len(hashes):
        return found[0], list(range(len(hashes)))
    return found


def _last_drift(hashes: Hashes) -> Drift:
    drift = None
    for i in range(len(hashes[0])):
        found = _drift([own[i : i + 1] for own in hashes])
        drift = (i, found[1]) if found else drift
    return drift


def _whole_models(hashes: Hashes) -> Drift:
    usual = Counter(map(tuple, hashes)).most_common(1)[0][0]
    ranks = [rank for rank, own in enumerate(hashes) if tuple(own) != usual]
    found = _drift(hashes)
    return (found[0], ranks) if found else None


def _but_the_majority(hashes: Hashes) -> Drift:
    found = _drift(hashes)
    if found is None:
        return None
    return found[0], [rank for rank in range(len(hashes)) if rank not in found[1]]


_FIRST_DRIFT = Exercise(
    name="first_drift",
    arguments=("hashes",),
    reference=_drift,
    cases=[
        ([[11, 12, 13], [11, 12, 13], [11, 12, 13]],),
        ([[11, 12, 13], [11, 12, 13], [11, 99, 13]],),
        ([[99, 12], [11, 12], [11, 12], [11, 12]],),
        ([[11, 12, 13], [11, 98, 97], [11, 12, 13], [11, 12, 13]],),
        ([[11, 12, 13], [11, 12, 97], [11, 98, 13], [11, 12, 13]],),
        ([[9, 1], [7, 1], [7, 1], [8, 1], [8, 1]],),
        ([[11, 12], [11, 13]],),
        ([[7], [8], [8], [7], [8]],),
        ([[5, 6]],),
        ([[11, 12], [11, 13], [11, 12], [11, 13]],),
        ([[5, 3], [6, 3], [5, 3], [7, 3]],),
    ],
    mistakes={
        "rank 0 may be the one that drifted: count how often each hash appears": (
            _against_rank_0
        ),
        "return the first tensor that differs, not the last": _last_drift,
        "no hash is the most frequent one, so nobody knows who is right: name all "
        "ranks": lambda hashes: _drift(hashes, lower_rank_wins=True),
        "the most frequent hash need not be that of more than half of the ranks": (
            _by_more_than_half
        ),
        "name only the ranks that differ in this first tensor": _whole_models,
        "return None if all replicas agree": lambda hashes: _drift(hashes) or (0, []),
        "these are the ranks that agree; return the others": _but_the_majority,
    },
    hint="for i in order: the most frequent of hashes[0][i], hashes[1][i], ...; if not "
    "all have it, return (i, [the ranks that do not]), or all ranks if there is none",
)


# ---- replicas that meet every H steps ----------------------------------------------


def _local_steps(
    curvature: Tensor,
    target: Tensor,
    lr: float,
    num_steps: int,
    meet: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Run all replicas; `meet(step, parameters)` is applied after step 1, 2, ..."""
    parameters = torch.zeros_like(target)
    for step in range(1, num_steps + 1):
        parameters = parameters - lr * curvature * (parameters - target)
        parameters = meet(step, parameters)
    return parameters


def _mean(parameters: Tensor) -> Tensor:
    return parameters.mean(0).expand_as(parameters)


def _meet_every(H: int, offset: int = 0) -> Callable[[int, Tensor], Tensor]:
    return lambda step, t: _mean(t) if (step + offset) % H == 0 else t


def _case(n: int, D: int, H: int, num_steps: int) -> tuple[Any, ...]:
    return _random(n, D).abs() + 0.1, _random(D, n).T.contiguous(), 0.3, H, num_steps


_LOCAL_SGD = Exercise(
    name="local_sgd",
    arguments=("curvature", "target", "lr", "H", "num_steps"),
    reference=lambda c, a, lr, H, n: _local_steps(c, a, lr, n, _meet_every(H)),
    cases=[
        _case(2, 2, 2, 4),
        _case(2, 3, 1, 3),
        _case(3, 1, 2, 5),
        _case(4, 2, 3, 7),
        _case(1, 4, 2, 4),
        _case(3, 2, 8, 8),
        _case(2, 1, 5, 4),
        _case(5, 3, 4, 10),
    ],
    mistakes={
        "this averages after every step: only steps H, 2 H, 3 H ... are meetings": (
            lambda c, a, lr, H, n: _local_steps(c, a, lr, n, _meet_every(1))
        ),
        "the first meeting is after step H, not after the first one": (
            lambda c, a, lr, H, n: _local_steps(c, a, lr, n, _meet_every(H, H - 1))
        ),
        "the replicas never meet": lambda c, a, lr, H, n: _local_steps(
            c, a, lr, n, lambda step, t: t
        ),
        "steps after the last meeting stay local; there is no meeting at the end": (
            lambda c, a, lr, H, n: _mean(_local_steps(c, a, lr, n, _meet_every(H)))
        ),
        "this averages once, at the end": lambda c, a, lr, H, n: _mean(
            _local_steps(c, a, lr, n, lambda step, t: t)
        ),
        "a meeting takes the mean of all replicas, not the parameters of rank 0": (
            lambda c, a, lr, H, n: _local_steps(
                c, a, lr, n, lambda k, t: t[:1].expand_as(t) if k % H == 0 else t
            )
        ),
        "return the parameters of all replicas, (n, D), also when they are equal": (
            lambda c, a, lr, H, n: _local_steps(c, a, lr, n, _meet_every(H))[0]
        ),
    },
    hint="each step t -= lr * curvature * (t - target) on all rows; after steps H, "
    "2 H, ... every row becomes the mean of the rows",
)
