"""Checker of the long exercise of the chapter foundations/cross_entropy.

The loss of a large vocabulary without its logits: the output layer and the
cross-entropy are computed together, a piece of the vocabulary at a time.

Notation: B batch, D width, V classes; h hidden activations, W rows of the output layer,
z = h W^T logits, p = softmax(z), y one-hot target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from labpkg.check.limits import SizeLimit
from labpkg.check.result import CheckResult, Exercise


def chunked_cross_entropy(fn: Callable[..., Any]) -> CheckResult:
    """Check `chunked_cross_entropy(h, W, targets, chunk)`: the loss without its logits.

    The answer is the mean cross-entropy of the logits h W^T and its gradients with
    respect to h and W. No tensor may have more elements than the largest of h, W and a
    piece (B, chunk) of the logits; autograd, which would keep all pieces, is refused.

    Shape:
        h (B, D), W (V, D), targets (B,) int64 -> () and (B, D) and (V, D)

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _CHUNKED.check(fn)


Gradients = tuple[Tensor, Tensor, Tensor]


def _random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, device="cpu")


def _case(B: int, D: int, V: int, chunk: int, *, scale: float = 1.0) -> tuple:
    seed = B + D + V + chunk
    generator = torch.Generator("cpu").manual_seed(seed)
    targets = torch.randint(V, (B,), generator=generator, device="cpu")
    targets[0] = V - 1  # in the last piece, which may be shorter
    h, W = _random(B, D, seed=seed, scale=scale), _random(V, D, seed=seed + 1)
    return h, W, targets, chunk


def _plain_case() -> tuple:
    """Return a case to compute by hand, with a maximum that grows and an odd piece."""
    h = torch.tensor([[1.0, 0.0], [1.0, 1.0]], device="cpu")
    W = torch.tensor([[0.0, 0.0], [1.0, -1.0], [2.0, 1.0]], device="cpu")
    return h, W, torch.tensor([2, 0], device="cpu"), 2


def _extreme_case() -> tuple:
    h = torch.tensor([[1000.0, 0.0], [-1000.0, 1.0]], device="cpu")
    W = torch.tensor([[0.0, 1.0], [1.0, -1.0], [-1.0, 2.0], [0.5, 3.0]], device="cpu")
    return h, W, torch.tensor([0, 3], device="cpu"), 2


def _answer(
    h: Tensor, W: Tensor, t: Tensor, lse: Tensor, residual: Tensor
) -> Gradients:
    """Return loss and gradients from log-sum-exp (B,) and dloss/dlogits (B, V)."""
    h, W = h.double(), W.double()
    loss = (lse - (h * W[t]).sum(-1)).mean()
    return loss, residual @ W, residual.T @ h


def _parts(h: Tensor, W: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, log-sum-exp and one-hot targets."""
    z = h.double() @ W.double().T
    return z, z.logsumexp(-1), F.one_hot(t, len(W)).double()


def _reference(h: Tensor, W: Tensor, t: Tensor, chunk: int) -> Gradients:
    z, lse, y = _parts(h, W, t)
    return _answer(h, W, t, lse, (z.softmax(-1) - y) / len(h))


def _scaled(by: Callable[[int], tuple[float, float]]) -> Callable[..., Gradients]:
    """Return the right answer with loss and gradients times by(B)."""

    def wrong(h: Tensor, W: Tensor, t: Tensor, chunk: int) -> Gradients:
        loss, of_h, of_W = _reference(h, W, t, chunk)
        a, b = by(len(h))
        return a * loss, b * of_h, b * of_W

    return wrong


def _without_rescaling(h: Tensor, W: Tensor, t: Tensor, chunk: int) -> Gradients:
    z, _, y = _parts(h, W, t)
    peak, total = z.new_full((len(z),), -torch.inf), z.new_zeros(len(z))
    for piece in z.split(chunk, -1):
        peak = torch.maximum(peak, piece.amax(-1))
        total = total + (piece - peak[:, None]).exp().sum(-1)
    lse = peak + total.log()
    return _answer(h, W, t, lse, ((z - lse[:, None]).exp() - y) / len(h))


def _softmax_of_each_piece(h: Tensor, W: Tensor, t: Tensor, chunk: int) -> Gradients:
    z, lse, y = _parts(h, W, t)
    p = torch.cat([piece.softmax(-1) for piece in z.split(chunk, -1)], -1)
    return _answer(h, W, t, lse, (p - y) / len(h))


def _targets_in_every_piece(h: Tensor, W: Tensor, t: Tensor, chunk: int) -> Gradients:
    z, lse, _ = _parts(h, W, t)
    y = (torch.arange(len(W), device=t.device) % chunk == t[:, None] % chunk).double()
    return _answer(h, W, t, lse, (z.softmax(-1) - y) / len(h))


def _full_pieces_only(h: Tensor, W: Tensor, t: Tensor, chunk: int) -> Gradients:
    z, _, y = _parts(h, W, t)
    z[:, len(W) // chunk * chunk :] = -torch.inf
    y[:, len(W) // chunk * chunk :] = 0
    return _answer(h, W, t, z.logsumexp(-1), (z.softmax(-1) - y) / len(h))


def _no_target(h: Tensor, W: Tensor, t: Tensor, chunk: int) -> Gradients:
    z, lse, _ = _parts(h, W, t)
    return _answer(h, W, t, lse, z.softmax(-1) / len(h))


def _overflowing(h: Tensor, W: Tensor, t: Tensor, chunk: int) -> Gradients:
    z, _, y = _parts(h, W, t)
    lse = z.float().exp().sum(-1).log().double()
    return _answer(h, W, t, lse, ((z - lse[:, None]).exp() - y) / len(h))


def _limit(h: Tensor, W: Tensor, t: Tensor, chunk: int) -> SizeLimit:
    return SizeLimit(
        max(h.numel(), W.numel(), len(h) * chunk),
        "never hold all logits (B, V): go through W in pieces of `chunk` rows, once "
        "for the log-sum-exp and once more for the gradients",
    )


_CHUNKED = Exercise(
    name="chunked_cross_entropy",
    arguments=("h", "W", "targets", "chunk"),
    reference=_reference,
    cases=[
        _plain_case(),  # here and in the next W has room for all logits: the limit
        _extreme_case(),  # does not bite before the formula is right
        _case(4, 3, 6, 3),
        _case(4, 3, 7, 3),
        _case(5, 2, 4, 9),
        _case(6, 2, 5, 1),
        _case(1, 1, 2, 2),
        _case(8, 2, 9, 4, scale=300.0),
        _case(64, 4, 200, 16),
        _case(48, 8, 301, 32, scale=30.0),
    ],
    mistakes={
        "the loss is a mean: divide it and the gradients by B": _scaled(
            lambda B: (B, B)
        ),
        "the loss is a mean, so its gradients are divided by B too": _scaled(
            lambda B: (1, B)
        ),
        "the sign of the gradients: d loss / d logits is (p - y) / B": _scaled(
            lambda B: (1, -1)
        ),
        "when the running maximum grows from m to m', the sum so far must be "
        "multiplied by exp(m - m')": _without_rescaling,
        "a piece of p is exp(z - lse) with the log-sum-exp of *all* classes; you "
        "normalise each piece by itself": _softmax_of_each_piece,
        "each target lies in one piece: subtract 1 in column target - start of that "
        "piece only": _targets_in_every_piece,
        "V need not be a multiple of chunk: the last piece is shorter, and you leave "
        "it out": _full_pieces_only,
        "the target class needs - 1: d loss / d logits is (p - y) / B": _no_target,
        "exp overflows for large logits: keep the running maximum of each row and "
        "subtract it before exp": _overflowing,
    },
    hint=(
        "first pass: running maximum and running sum of exp, which give lse and the "
        "target's logit; second pass: r = (exp(z - lse) - y) / B for each piece, "
        "grad_h += r @ W_piece and grad_W_piece = r.T @ h; return loss, grad_h, grad_W"
    ),
    limit=_limit,
)
