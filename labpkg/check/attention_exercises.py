"""Checkers of exercises of foundations/transformer: one head of attention.

Notation: T sequence, H head width, q queries, k keys, v values, p the weights, M pieces
of the keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from labpkg.check.result import CheckResult, Exercise


def attention(fn: Callable[..., Any]) -> CheckResult:
    """Check `attention(q, k, v)`: causal attention of one head.

    Shape:
        q, k, v (..., T, H) -> (..., T, H)

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.

    Reference:
        Vaswani et al. 2017, arXiv:1706.03762.
    """
    return _ATTENTION.check(fn)


def merge_attention(fn: Callable[..., Any]) -> CheckResult:
    """Check `merge_attention(outputs, log_sums)`: attention over keys in M pieces.

    Piece m has seen some of the keys only: outputs[m] is its attention, log_sums[m] the
    log of its sum of exp(scores), -inf for a query that may read none of its keys. The
    result is attention over all keys.

    Shape:
        outputs (M, T, H), log_sums (M, T) -> (T, H)

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.

    Reference:
        Dao et al. 2022, arXiv:2205.14135.
    """
    return _MERGE_ATTENTION.check(fn)


def attention_gradient(fn: Callable[..., Any]) -> CheckResult:
    """Check `attention_gradient(q, k, v, grad)`: backward of one causal head.

    `grad` is the gradient of the loss with respect to the output; the result are the
    gradients with respect to q, k and v.

    Shape:
        q, k, v, grad (T, H) -> three times (T, H)

    Args:
        fn: your function; it returns a tuple.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _ATTENTION_GRADIENT.check(fn)


def random_tensor(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Return the same normal numbers in each session.

    Args:
        *shape: of the tensor.
        seed: tells tensors of one shape apart.
        scale: standard deviation.
    """
    generator = torch.Generator("cpu").manual_seed(sum(shape) + seed)
    return scale * torch.randn(*shape, generator=generator, device="cpu")


def past(T: int) -> Tensor:
    """Return which positions s each position t may read: s <= t.

    Args:
        T: positions.
    """
    return torch.ones(T, T, dtype=torch.bool, device="cpu").tril()


OPEN = "the future is open: set the scores of s > t to -inf before softmax"
"""The hint for an answer without the mask."""


def causal_weights(
    q: Tensor, k: Tensor, *, scale: float | None = None, dim: int = -1
) -> Tensor:
    """Return the causal weights of attention in float64, the right or wrong ones.

    Args:
        q: queries (..., T, H).
        k: keys (..., T, H).
        scale: of the scores; None is the right one.
        dim: over which softmax runs; -1 is the right one.
    """
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    scores = scale * q.double() @ k.double().transpose(-1, -2)
    return scores.masked_fill(~past(q.shape[-2]), -torch.inf).softmax(dim)


def open_weights(q: Tensor, k: Tensor) -> Tensor:
    """Return the weights without a mask, in float64.

    Args:
        q: queries (..., T, H).
        k: keys (..., T, H).
    """
    scores = q.double() @ k.double().transpose(-1, -2)
    return (scores / q.shape[-1] ** 0.5).softmax(-1)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal_weights(q, k) @ v.double()


def _naive_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    powers = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).exp().tril()
    return powers / powers.sum(-1, keepdim=True) @ v


def _masked_with_zero(q: Tensor, k: Tensor) -> Tensor:
    scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~past(q.shape[-2]), 0.0).softmax(-1)


_ATTENTION = Exercise(
    name="attention",
    arguments=("q", "k", "v"),
    reference=_attend,
    cases=[
        (
            random_tensor(3, 2, scale=3),
            random_tensor(3, 2, seed=1),
            random_tensor(3, 2, seed=2),
        ),
        (random_tensor(5, 4), random_tensor(5, 4, seed=1), random_tensor(5, 4, seed=2)),
        (random_tensor(1, 3), random_tensor(1, 3, seed=1), random_tensor(1, 3, seed=2)),
        (random_tensor(4, 1), random_tensor(4, 1, seed=1), random_tensor(4, 1, seed=2)),
        (
            0 * random_tensor(4, 2),
            random_tensor(4, 2, seed=1),
            random_tensor(4, 2, seed=2),
        ),
        (
            random_tensor(7, 16),
            random_tensor(7, 16, seed=1),
            random_tensor(7, 16, seed=2),
        ),
        (
            random_tensor(2, 5, 4),
            random_tensor(2, 5, 4, seed=1),
            random_tensor(2, 5, 4, seed=2),
        ),
        (
            random_tensor(2, 3, 6, 4),
            random_tensor(2, 3, 6, 4, seed=1),
            random_tensor(2, 3, 6, 4, seed=2),
        ),
        (
            random_tensor(6, 4, scale=50),
            random_tensor(6, 4, seed=1, scale=50),
            random_tensor(6, 4),
        ),
    ],
    mistakes={
        OPEN: lambda q, k, v: open_weights(q, k) @ v.double(),
        "divide the scores by the square root of H": (
            lambda q, k, v: causal_weights(q, k, scale=1.0) @ v.double()
        ),
        "divide by the square root of H, not by H": (
            lambda q, k, v: causal_weights(q, k, scale=1 / q.shape[-1]) @ v.double()
        ),
        "H is the last dim, the width of a head, not the number of positions": (
            lambda q, k, v: causal_weights(q, k, scale=q.shape[-2] ** -0.5) @ v.double()
        ),
        "the softmax runs over the queries; the keys of a query are the last dim": (
            lambda q, k, v: causal_weights(q, k, dim=-2) @ v.double()
        ),
        "softmax once: applied twice, the weights come close to equal (myth E32)": (
            lambda q, k, v: (
                causal_weights(q, k)
                .masked_fill(~past(q.shape[-2]), -torch.inf)
                .softmax(-1)
                @ v.double()
            )
        ),
        "softmax once, and the mask before it (myth E32)": (
            lambda q, k, v: causal_weights(q, k).softmax(-1) @ v.double()
        ),
        "the mask comes after softmax, so the weights of a row add up to less than 1: "
        "set the scores to -inf before": (
            lambda q, k, v: open_weights(q, k) * past(q.shape[-2]) @ v.double()
        ),
        "a score of 0 is no mask, its weight is e^0 = 1; use -inf": (
            lambda q, k, v: _masked_with_zero(q, k) @ v.double()
        ),
        "these are the weights; multiply by v": lambda q, k, v: causal_weights(q, k),
        "this reads the future and not the past: keep s <= t": (
            lambda q, k, v: _attend(q.flip(-2), k.flip(-2), v.flip(-2)).flip(-2)
        ),
        "exp overflows for large scores; torch.softmax subtracts the maximum of each "
        "row first": _naive_attend,
    },
    hint=(
        "scores q k^T / sqrt(H), those of s > t set to -inf, softmax over the last "
        "dim, times v"
    ),
)


def _merged(outputs: Tensor, log_sums: Tensor) -> Tensor:
    weights = log_sums.double().softmax(0).unsqueeze(-1)  # (M, T, 1)
    return (weights * outputs).sum(0)


def _log_sums(*pieces: list[float]) -> Tensor:
    return torch.tensor(pieces, dtype=torch.float32, device="cpu")


def _naive_merged(outputs: Tensor, log_sums: Tensor) -> Tensor:
    powers = log_sums.exp().unsqueeze(-1)
    return (powers * outputs).sum(0) / powers.sum(0)


_MERGE_ATTENTION = Exercise(
    name="merge_attention",
    arguments=("outputs", "log_sums"),
    reference=_merged,
    cases=[
        (random_tensor(2, 3, 2), _log_sums([0.0, 1.0, 2.0], [0.5, -1.0, 2.0])),
        (random_tensor(3, 2, 2), random_tensor(3, 2, scale=2)),
        (random_tensor(1, 4, 3), random_tensor(1, 4)),
        (random_tensor(2, 2, 3), _log_sums([1.0, 0.5], [-torch.inf, 2.0])),
        (random_tensor(4, 5, 8), random_tensor(4, 5, scale=5)),
        (random_tensor(2, 2, 2), _log_sums([200.0, -150.0], [201.0, -149.0])),
        (random_tensor(3, 1, 4), _log_sums([1000.0], [-1000.0], [-torch.inf])),
        (random_tensor(8, 16, 4), random_tensor(8, 16, scale=20)),
    ],
    mistakes={
        "the pieces do not count alike: a piece with larger scores has more of the "
        "weight": lambda o, s: o.mean(0),
        "the weights of the pieces add up to 1: divide by their sum": (
            lambda o, s: (s.exp().unsqueeze(-1) * o).sum(0)
        ),
        "log_sums are logarithms; the weights are their exponentials": (
            lambda o, s: (s.unsqueeze(-1) * o).sum(0) / s.sum(0).unsqueeze(-1)
        ),
        "the outputs are already divided by their sums; weigh them": (
            lambda o, s: o.sum(0)
        ),
        "the weights compare pieces, the first dim, not positions": (
            lambda o, s: (s.double().softmax(-1).unsqueeze(-1) * o).sum(0)
        ),
        "one maximum for all queries is not enough: subtract the maximum over the "
        "pieces from each query": lambda o, s: _naive_merged(o, s - s.max()),
        "exp overflows for large log-sums and is 0 for very negative ones; subtract "
        "the maximum over the pieces first": _naive_merged,
    },
    hint=(
        "a piece is a numerator over a denominator, exp(log_sums[m]); the numerators "
        "of all pieces add up, and so do the denominators"
    ),
)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    p: Tensor | None = None,
    scale: float | None = None,
    row_sums: float = 1.0,
    keys: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients, or those of a wrong derivation."""
    q, k, v, grad = (each.double() for each in (q, k, v, grad))
    p = causal_weights(q, k) if p is None else p
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    dp = grad @ v.T
    ds = p * (dp - row_sums * (p * dp).sum(-1, keepdim=True))
    read = k if keys is None else keys.double()
    return scale * ds @ read, scale * ds.T @ q, p.T @ grad


def _untransposed(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, _ = _backward(q, k, v, grad)
    return dq, dk, causal_weights(q, k) @ grad.double()


def _untransposed_key(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, _, dv = _backward(q, k, v, grad)
    wrong_dk, _, _ = _backward(q, k, v, grad, keys=q)
    return dq, wrong_dk, dv


def _head(T: int, H: int, scale: float = 1.0) -> tuple[Tensor, ...]:
    q, k = (random_tensor(T, H, seed=seed, scale=scale) for seed in (0, 1))
    return q, k, random_tensor(T, H, seed=2), random_tensor(T, H, seed=3)


_ATTENTION_GRADIENT = Exercise(
    name="attention_gradient",
    arguments=("q", "k", "v", "grad"),
    reference=_backward,
    cases=[
        _head(3, 2),
        _head(2, 4),
        _head(1, 3),
        _head(4, 1),
        _head(6, 4, 2.0),
        _head(5, 8, 0.1),
        _head(16, 4),
        _head(6, 4, 30.0),
    ],
    mistakes={
        "softmax ties the keys of a row together: subtract the sum of p * dp over the "
        "row inside the bracket": lambda *case: _backward(*case, row_sums=0.0),
        "this adds the sum over the row; the Jacobian of softmax subtracts it": (
            lambda *case: _backward(*case, row_sums=-1.0)
        ),
        "the scores were divided by sqrt(H): so are the gradients of q and k": (
            lambda *case: _backward(*case, scale=1.0)
        ),
        "the scores were divided by sqrt(H), once": (
            lambda *case: _backward(*case, scale=1 / case[0].shape[-1])
        ),
        "the weights need the causal mask, as in forward": (
            lambda q, k, v, grad: _backward(q, k, v, grad, p=open_weights(q, k))
        ),
        "a value is read by several queries: dv = p^T grad, with the transpose": (
            _untransposed
        ),
        "a key is read by several queries: dk = ds^T q / sqrt(H), with the transpose": (
            _untransposed_key
        ),
        "the first two are swapped: return dq, dk, dv": lambda *case: (
            *_backward(*case)[1::-1],
            _backward(*case)[2],
        ),
        "return a tuple of three, (dq, dk, dv)": lambda *case: torch.stack(
            _backward(*case)
        ),
    },
    hint=(
        "go back one step at a time and compare each with autograd: o = p v gives dv "
        "and dp; p = softmax(z) gives dz, row by row; z = q k^T / sqrt(H) gives dq, dk"
    ),
)
