"""Checkers of the exercises of the chapter parallelism/zero: the step on slices.

What each of n ranks holds is given as a list, so that nothing is sent. Notation: K
elements, a multiple of n where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from labpkg.check.result import CheckResult, Exercise


def clip_slices(fn: Callable[..., Any]) -> CheckResult:
    """Check `clip_slices(slices, max_norm)`: clip a gradient that lies on n ranks.

    A gradient that is longer than `max_norm` is shortened to it, and keeps its
    direction; another one is left as it is.

    Shape:
        slices: n tensors (K/n,) -> n tensors (K/n,)

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.

    Reference:
        Pascanu et al. 2013, arXiv:1211.5063.
    """
    return _CLIP_SLICES.check(fn)


def sharded_momentum(fn: Callable[..., Any]) -> CheckResult:
    """Check `sharded_momentum(theta, gradients, velocities, lr, momentum)`.

    One step of ZeRO stage 1 with momentum: v = momentum v + g, theta = theta - lr v.
    All ranks hold theta, rank r holds its own gradient `gradients[r]` and the slice
    `velocities[r]` of the state.

    Shape:
        theta (K,), gradients n x (K,), velocities n x (K/n,) -> theta (K,), n x (K/n,)

    Args:
        fn: your function; it returns the new theta and the list of new velocities.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _SHARDED_MOMENTUM.check(fn)


def reshard(fn: Callable[..., Any]) -> CheckResult:
    """Check `reshard(pieces, n)`: cut saved optimizer state for n other ranks.

    `pieces[r][i]` is what rank r held of the state of parameter i, possibly nothing.
    Joined rank by rank they are the flat bucket, which is cut again as
    `torch.tensor_split` does it.

    Shape:
        pieces: lists of 1-D tensors of any number of ranks -> n lists, one piece for
        each parameter

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _RESHARD.check(fn)


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(sum(shape) + 1000 * seed)
    return torch.randn(*shape, generator=generator, device="cpu")


def _several(count: int, length: int, seed: int = 0) -> list[Tensor]:
    return [_random(length, seed=seed + i) for i in range(count)]


def _pair(*slices: list[float]) -> list[Tensor]:
    return [torch.tensor(values, device="cpu") for values in slices]


def _norm(slices: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(slices)).norm()


def _scaled(slices: Sequence[Tensor], norm: Tensor, max_norm: float) -> list[Tensor]:
    return [s * (max_norm / norm).clamp(max=1.0) for s in slices]


_CLIP_SLICES = Exercise(
    name="clip_slices",
    arguments=("slices", "max_norm"),
    reference=lambda slices, max_norm: _scaled(slices, _norm(slices), max_norm),
    cases=[
        (_pair([1.0, 2.0], [2.0, 4.0]), 1.0),
        (_pair([1.0, 2.0], [2.0, 4.0]), 6.0),
        (_several(4, 3), 1.0),
        (_several(4, 3), 100.0),
        ([10 * _random(5), 0.1 * _random(5, seed=1)], 2.0),
        (_pair([0.1, 0.1], [0.0, 0.0]), 1.0),
        (_several(1, 6), 0.5),
        (_several(3, 1), 0.1),
    ],
    mistakes={
        "each rank clips by the norm of its own slice: the factors differ, and with "
        "them the direction": lambda slices, max_norm: [
            s * (max_norm / s.norm().clamp(min=1e-12)).clamp(max=1.0) for s in slices
        ],
        "norms do not add: add the squares, then take the root": (
            lambda slices, max_norm: _scaled(
                slices, torch.stack([s.norm() for s in slices]).sum(), max_norm
            )
        ),
        "the root is missing: this divides by the square of the norm": (
            lambda slices, max_norm: _scaled(slices, _norm(slices) ** 2, max_norm)
        ),
        "a gradient that is shorter than max_norm is left as it is": (
            lambda slices, max_norm: [s * max_norm / _norm(slices) for s in slices]
        ),
        "the largest norm of a slice is not the norm of the whole": (
            lambda slices, max_norm: _scaled(
                slices, torch.stack([s.norm() for s in slices]).amax(), max_norm
            )
        ),
        "this limits each element; clip the length of the whole vector": (
            lambda slices, max_norm: [s.clamp(-max_norm, max_norm) for s in slices]
        ),
    },
    hint="one factor for all slices, from the norm of the whole gradient",
)


def _step(
    theta: Tensor,
    mean: Tensor,
    velocities: Sequence[Tensor],
    lr: float,
    momentum: float,
) -> tuple[Tensor, list[Tensor]]:
    slices = mean.chunk(len(velocities))
    new = [momentum * v + g for v, g in zip(velocities, slices, strict=True)]
    return theta - lr * torch.cat(new), new


def _mean_step(
    theta: Tensor,
    gradients: Sequence[Tensor],
    velocities: Sequence[Tensor],
    lr: float,
    momentum: float,
) -> tuple[Tensor, list[Tensor]]:
    mean = torch.stack(list(gradients)).mean(0)
    return _step(theta, mean, velocities, lr, momentum)


def _with_sum(theta: Any, gradients: Any, velocities: Any, lr: Any, momentum: Any):
    total = torch.stack(list(gradients)).sum(0)
    return _step(theta, total, velocities, lr, momentum)


def _with_own(theta: Any, gradients: Any, velocities: Any, lr: Any, momentum: Any):
    n = len(gradients)
    own = torch.cat([g.chunk(n)[r] for r, g in enumerate(gradients)])
    return _step(theta, own, velocities, lr, momentum)


def _not_gathered(theta: Any, gradients: Any, velocities: Any, lr: Any, momentum: Any):
    new, states = _mean_step(theta, gradients, velocities, lr, momentum)
    n = len(states)
    return torch.cat([new.chunk(n)[0], *theta.chunk(n)[1:]]), states


def _old_velocity(theta: Any, gradients: Any, velocities: Any, lr: Any, momentum: Any):
    _, states = _mean_step(theta, gradients, velocities, lr, momentum)
    return theta - lr * torch.cat(list(velocities)), states


def _no_velocity(theta: Any, gradients: Any, velocities: Any, lr: Any, momentum: Any):
    _, states = _mean_step(theta, gradients, velocities, lr, momentum)
    return theta - lr * torch.stack(list(gradients)).mean(0), states


def _uphill(theta: Any, gradients: Any, velocities: Any, lr: Any, momentum: Any):
    return _mean_step(theta, gradients, velocities, -lr, momentum)


def _slices(theta: Any, gradients: Any, velocities: Any, lr: Any, momentum: Any):
    new, states = _mean_step(theta, gradients, velocities, lr, momentum)
    return list(new.chunk(len(states))), states


def _momentum_case(n: int, K: int, lr: float, momentum: float, seed: int = 0) -> tuple:
    gradients, velocities = _several(n, K, seed + 1), _several(n, K // n, seed + 50)
    return _random(K, seed=seed), gradients, velocities, lr, momentum


_SHARDED_MOMENTUM = Exercise(
    name="sharded_momentum",
    arguments=("theta", "gradients", "velocities", "lr", "momentum"),
    reference=_mean_step,
    cases=[
        _momentum_case(2, 4, 0.1, 0.9),
        _momentum_case(4, 8, 0.5, 0.5),
        _momentum_case(3, 3, 0.1, 0.9),
        _momentum_case(1, 5, 0.1, 0.9),
        _momentum_case(2, 6, 0.1, 0.1),
        _momentum_case(8, 16, 0.01, 0.99),
        _momentum_case(5, 20, 1.0, 0.3),
        _momentum_case(2, 30, 0.2, 0.9, seed=7),
    ],
    mistakes={
        "reduce-scatter first: the owner of a slice needs the mean of all ranks' "
        "gradients there, not its own": _with_own,
        "the sum of the gradients makes the step n times too long: divide by n": (
            _with_sum
        ),
        "the all-gather is missing: after the step all ranks hold all new slices": (
            _not_gathered
        ),
        "update the velocity before theta": _old_velocity,
        "theta moves along the velocity, not along the gradient": _no_velocity,
        "theta moves against the velocity: minus lr v": _uphill,
        "join the slices of theta: every rank holds it whole at stage 1": _slices,
        "the gradient enters the velocity undamped: v = momentum v + g": (
            lambda theta, gradients, velocities, lr, momentum: _mean_step(
                theta, [(1 - momentum) * g for g in gradients], velocities, lr, momentum
            )
        ),
    },
    hint="three lines of the chapter, with momentum as the optimizer; return the whole "
    "theta and a list of velocities",
)


Pieces = list[list[Tensor]]


def _wholes(pieces: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return each parameter's state, joined over the ranks."""
    return [torch.cat(list(own)) for own in zip(*pieces, strict=True)]


def _cut(wholes: Sequence[Tensor], n: int) -> Pieces:
    owner = [
        torch.full((len(part),), rank, device="cpu")
        for rank, part in enumerate(torch.cat(list(wholes)).tensor_split(n))
    ]
    owners = torch.cat(owner).split([len(whole) for whole in wholes])
    return [
        [whole[of == rank] for whole, of in zip(wholes, owners, strict=True)]
        for rank in range(n)
    ]


def _each_cut(pieces: Sequence[Sequence[Tensor]], n: int) -> Pieces:
    cut = [whole.tensor_split(n) for whole in _wholes(pieces)]
    return [list(own) for own in zip(*cut, strict=True)]


def _each_piece_cut(pieces: Sequence[Sequence[Tensor]], n: int) -> Pieces:
    return [
        [torch.cat([of[i].tensor_split(n)[r] for of in pieces]) for i in range(num)]
        for num in [len(pieces[0])]
        for r in range(n)
    ]


def _by_parameter(pieces: Sequence[Sequence[Tensor]], n: int) -> Pieces:
    """Give whole parameters to ranks, in turn."""
    wholes = _wholes(pieces)
    return [
        [w if i % n == rank else w[:0] for i, w in enumerate(wholes)]
        for rank in range(n)
    ]


def _saved(m: int, *sizes: int) -> Pieces:
    numbers = torch.arange(1.0, sum(sizes) + 1, device="cpu")
    return _cut(numbers.split(list(sizes)), m)


_RESHARD = Exercise(
    name="reshard",
    arguments=("pieces", "n"),
    reference=lambda pieces, n: _cut(_wholes(pieces), n),
    cases=[
        (_saved(2, 5, 3), 4),
        (_saved(4, 5, 3), 2),
        (_saved(2, 7), 4),
        (_saved(3, 2, 6, 2), 4),
        (_saved(4, 1, 1), 3),
        (_saved(4, 6, 1), 1),
        (_saved(1, 3, 2), 3),
        (_saved(4, 3, 3, 3), 3),
    ],
    mistakes={
        "the bucket is cut, not each parameter by itself": _each_cut,
        "this cuts each saved piece; join the pieces of all ranks first": (
            _each_piece_cut
        ),
        "divide a slice once more: one piece for each parameter": lambda pieces, n: (
            list(torch.cat(_wholes(pieces)).tensor_split(n))
        ),
        "every rank gets all of it; a slice is enough": lambda pieces, n: [
            _wholes(pieces) for _ in range(n)
        ],
        "a parameter may lie on several ranks; cut the bucket evenly": _by_parameter,
    },
    hint="what would the whole state of each parameter be, and which part of it does a "
    "rank own?",
)
