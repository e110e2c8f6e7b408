"""Checkers of foundations/gradient_descent: curvature and the largest learning rate.

Notation: B batch, D features, V classes, p = softmax(x W^T).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from labpkg.check.result import CheckResult, Exercise


def stability_limit(fn: Callable[..., Any]) -> CheckResult:
    """Check `stability_limit(hessian)`: where gradient descent starts to diverge.

    Shape:
        hessian (D, D), symmetric with positive eigenvalues -> ()

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _LIMIT.check(fn)


def sharpness(fn: Callable[..., Any]) -> CheckResult:
    """Check `sharpness(x, y, W)`: the largest eigenvalue of a Hessian, within 1 %.

    The Hessian is that of the mean cross-entropy of the logits x W^T, in all V D
    elements of W.

    Shape:
        x (B, D), y (B,) int64, W (V, D) -> ()

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _SHARPNESS.check(fn)


def _tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed + sum(shape))
    return scale * torch.randn(
        *shape, generator=generator, dtype=torch.float64, device="cpu"
    )


def _bowl(*eigenvalues: float) -> Tensor:
    """Return a matrix with these eigenvalues that is not diagonal."""
    size = len(eigenvalues)
    rotation, _ = torch.linalg.qr(_random(size, size))
    return rotation @ torch.diag(_tensor(*eigenvalues)) @ rotation.T


_LIMIT = Exercise(
    name="stability_limit",
    arguments=("hessian",),
    reference=lambda h: 2 / torch.linalg.eigvalsh(h)[-1],
    cases=[
        (_tensor([5.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.5]),),
        (_tensor([2.0, 1.0], [1.0, 2.0]),),
        (_tensor([0.5]),),
        (_bowl(1.0, 10.0, 100.0),),
        (_bowl(3.0, 3.0, 3.0, 3.0),),
        (_bowl(1e-3, 1e3),),
        (_bowl(0.01, 0.02, 0.03, 0.04, 0.05),),
        (_bowl(7.0, 0.2, 5.0),),
    ],
    mistakes={
        "1 / lambda reaches the minimum in one step along that eigenvector; the steps "
        "diverge above twice as much": lambda h: 1 / torch.linalg.eigvalsh(h)[-1],
        "the steepest direction breaks first: take the largest eigenvalue, not the "
        "smallest": lambda h: 2 / torch.linalg.eigvalsh(h)[0],
        "upside down: the more it curves, the smaller is the limit": lambda h: (
            torch.linalg.eigvalsh(h)[-1] / 2
        ),
        "this is the largest eigenvalue; the limit is 2 divided by it": lambda h: (
            torch.linalg.eigvalsh(h)[-1]
        ),
        "2 / (smallest + largest) converges fastest; the limit is where the factor of "
        "the largest alone is -1": lambda h: (
            2 / torch.linalg.eigvalsh(h)[[0, -1]].sum()
        ),
        "one limit for each direction; the parameters share one learning rate, so take "
        "the smallest of them": lambda h: 2 / torch.linalg.eigvalsh(h),
        "the trace is the sum of all eigenvalues; take the largest": lambda h: (
            2 / h.trace()
        ),
        "the Frobenius norm mixes all eigenvalues; take the largest": lambda h: (
            2 / torch.linalg.matrix_norm(h)
        ),
        "a diagonal element is an eigenvalue only if the matrix is diagonal; use "
        "torch.linalg.eigvalsh": lambda h: 2 / h.diagonal().max(),
    },
    hint="2 / largest eigenvalue of the Hessian; see torch.linalg.eigvalsh",
)


def _hessian(x: Tensor, W: Tensor) -> Tensor:
    """Return the Hessian of the mean cross-entropy, (V D, V D)."""
    p = (x @ W.T).softmax(-1)  # (B, V)
    of_logits = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # (B, V, V)
    blocks = torch.einsum("bvu,bd,be->vdue", of_logits, x, x) / len(x)
    return blocks.reshape(W.numel(), W.numel())


def _largest(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(matrix)[-1]


def _fisher(x: Tensor, y: Tensor, W: Tensor) -> Tensor:
    """Return the mean outer product of the gradients of single samples."""
    residual = (x @ W.T).softmax(-1) - F.one_hot(y, len(W))
    gradients = (residual[:, :, None] * x[:, None, :]).flatten(1)  # (B, V D)
    return gradients.T @ gradients / len(x)


def _of_one_class(x: Tensor, W: Tensor) -> Tensor:
    p = (x @ W.T).softmax(-1)
    blocks = torch.einsum("bv,bd,be->vde", p * (1 - p), x, x) / len(x)
    return torch.linalg.eigvalsh(blocks)[:, -1].max()


def _labels(num: int, V: int) -> Tensor:
    return torch.arange(num, device="cpu") % V


_SHARPNESS = Exercise(
    name="sharpness",
    arguments=("x", "y", "W"),
    reference=lambda x, y, W: _largest(_hessian(x, W)),
    cases=[
        (_tensor([1.0, 2.0], [2.0, -1.0], [0.5, 0.5]), _labels(3, 3), _random(3, 2)),
        (_random(6, 4), _labels(6, 3), torch.zeros_like(_random(3, 4))),
        (_random(6, 4), _labels(6, 3), _random(3, 4)),
        (_random(1, 3), _labels(1, 2), _random(2, 3)),
        (_random(30, 8, scale=0.1), _labels(30, 5), _random(5, 8)),
        (_random(20, 6, scale=5.0), _labels(20, 4), _random(4, 6, scale=0.2)),
        (_random(40, 10) + 1, _labels(40, 10), _random(10, 10, scale=0.5)),
        (_random(5, 3), _labels(5, 2), _random(2, 3, scale=3.0)),
    ],
    mistakes={
        "this is the Hessian of the sum; the loss is a mean, so divide by B": (
            lambda x, y, W: len(x) * _largest(_hessian(x, W))
        ),
        "nan: a vector with the same number for every class has the product H v = 0; "
        "start from a random one": lambda x, y, W: torch.tensor(torch.nan),
        "x^T x / B is only one factor; the other is diag(p) - p p^T of each sample": (
            lambda x, y, W: _largest(x.T @ x / len(x))
        ),
        "the outer product of gradients is not the Hessian, though both have the same "
        "mean if labels are drawn from p; differentiate the gradient": (
            lambda x, y, W: _largest(_fisher(x, y, W))
        ),
        "the classes are coupled: W is one vector of V D elements, not V "
        "vectors": lambda x, y, W: _of_one_class(x, W),
        "this is the smallest eigenvalue, 0; take the largest. If v has one number for "
        "all classes, H v is 0 from the start: start from a random one": (
            lambda x, y, W: torch.linalg.eigvalsh(_hessian(x, W))[0]
        ),
        "this is the length of the gradient; the sharpness is a second derivative": (
            lambda x, y, W: (
                ((x @ W.T).softmax(-1) - F.one_hot(y, len(W))).T @ x / len(x)
            ).norm()
        ),
        "the trace is the sum of all eigenvalues": lambda x, y, W: _hessian(
            x, W
        ).trace(),
        "this is 2 / sharpness, the limit of the learning rate; return the sharpness": (
            lambda x, y, W: 2 / _largest(_hessian(x, W))
        ),
    },
    hint=(
        "repeat v = H v / |H v| from a random v, then return v^T H v; if you are a few "
        "per cent too low, repeat more often. H v is the derivative of gradient . v"
    ),
    rtol=1e-2,
)
