"""Checker of foundations/gradient_descent: one step of AdamW.

Notation: w parameters, g gradient, m and v its running moments, t step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from labpkg.check.result import CheckResult, Exercise


def adamw_step(fn: Callable[..., Any]) -> CheckResult:
    """Check `adamw_step(w, m, v, g, t, lr, weight_decay)`: the new w, m and v.

    The betas are 0.9 and 0.999, eps is 1e-8, and t is 1 in the first step.

    Shape:
        w, m, v, g (D,); t int; lr, weight_decay floats -> (D,), (D,), (D,)

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.

    Reference:
        Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    return _ADAMW.check(fn)


def _tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed + sum(shape))
    return scale * torch.randn(
        *shape, generator=generator, dtype=torch.float64, device="cpu"
    )


def _adamw(
    w: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    t: int,
    lr: float,
    weight_decay: float,
    *,
    power: int = 2,
    eps: float = 1e-8,
    in_root: float = 0.0,
    start: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    m = 0.9 * m + 0.1 * g
    v = 0.999 * v + 0.001 * g**power
    m_hat, v_hat = m / (1 - 0.9 ** (t + start)), v / (1 - 0.999 ** (t + start))
    root = (v_hat + in_root).sqrt() + (0 if in_root else eps)
    return w * (1 - lr * weight_decay) - lr * m_hat / root, m, v


def _uncorrected(
    w: Tensor, m: Tensor, v: Tensor, g: Tensor, t: int, lr: float, weight_decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _adamw(w, m, v, g, 10**6, lr, weight_decay)


def _without_root(
    w: Tensor, m: Tensor, v: Tensor, g: Tensor, t: int, lr: float, weight_decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    step = m / (1 - 0.9**t) / (v / (1 - 0.999**t) + 1e-8)
    return w * (1 - lr * weight_decay) - lr * step, m, v


def _with_products(
    w: Tensor, m: Tensor, v: Tensor, g: Tensor, t: int, lr: float, weight_decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    step = m / (1 - 0.9 * t) / ((v / (1 - 0.999 * t)).sqrt() + 1e-8)
    return w * (1 - lr * weight_decay) - lr * step, m, v


def _swapped(
    w: Tensor, m: Tensor, v: Tensor, g: Tensor, t: int, lr: float, weight_decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    m, v = 0.1 * m + 0.9 * g, 0.001 * v + 0.999 * g**2
    root = (v / (1 - 0.999**t)).sqrt() + 1e-8
    return w * (1 - lr * weight_decay) - lr * m / (1 - 0.9**t) / root, m, v


def _corrected_state(
    w: Tensor, m: Tensor, v: Tensor, g: Tensor, t: int, lr: float, weight_decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    w, m, v = _adamw(w, m, v, g, t, lr, weight_decay)
    return w, m / (1 - 0.9**t), v / (1 - 0.999**t)


_ADAMW = Exercise(
    name="adamw_step",
    arguments=("w", "m", "v", "g", "t", "lr", "weight_decay"),
    reference=_adamw,
    cases=[
        (
            _tensor(1.0, -2.0),
            *_tensor([0.2, 0.1], [0.3, 0.2], [2.0, -0.5]),
            3,
            0.1,
            0.2,
        ),
        (
            _tensor(1.0, -2.0),
            *_tensor([0.0, 0.0], [0.0, 0.0], [2.0, -0.5]),
            1,
            0.1,
            0.2,
        ),
        (_tensor(3.0), _tensor(0.0), _tensor(0.0), _tensor(1e-4), 1, 0.1, 0.0),
        (_tensor(3.0), _tensor(0.0), _tensor(0.0), _tensor(0.0), 1, 0.1, 0.5),
        (_tensor(3.0), _tensor(0.0), _tensor(0.0), _tensor(-1e-8), 1, 0.1, 0.0),
        (_tensor(1.0), _tensor(0.5), _tensor(0.25), _tensor(1.0), 1000, 0.5, 0.5),
        (
            _random(3),
            _random(3, seed=1),
            _random(3, seed=2) ** 2,
            _random(3),
            7,
            1e-2,
            0.1,
        ),
        (
            _random(2, 2),
            _random(2, 2),
            _random(2, 2) ** 2,
            _random(2, 2),
            50,
            1.0,
            0.01,
        ),
        (_tensor(1.0), _tensor(1e3), _tensor(1e7), _tensor(-1e4), 9, 1e-3, 0.0),
    ],
    mistakes={
        "both moments start at 0 and are too small at first: divide by 1 - beta^t": (
            _uncorrected
        ),
        "t is 1 in the first step already: the powers are beta^t, not beta^(t + 1)": (
            lambda *case: _adamw(*case, start=1)
        ),
        "without eps in the denominator a gradient of 0 gives 0 / 0 = nan": (
            lambda *case: _adamw(*case, eps=0.0)
        ),
        "beta^t is a power, not a product: 0.9**t": _with_products,
        "t is 1 in the first step: the powers are beta^t, not beta^(t - 1)": (
            lambda *case: _adamw(*case, start=-1)
        ),
        "keep m and v as they are; the corrected values are for this step only": (
            _corrected_state
        ),
        "m keeps 0.9 of itself and takes 0.1 of g; v keeps 0.999: you swapped them": (
            _swapped
        ),
        "divide by the square root of v: v is a square": _without_root,
        "v is the running mean of the squared gradient": lambda *case: _adamw(
            *case, power=1
        ),
        "eps is added to the root, not inside it: 1e-8 inside is 1e-4 outside": (
            lambda *case: _adamw(*case, in_root=1e-8)
        ),
        "weight_decay has no effect: first shrink w by the factor 1 - lr "
        "weight_decay": lambda w, m, v, g, t, lr, wd: _adamw(w, m, v, g, t, lr, 0.0),
        "the decay is multiplied by lr: w shrinks by the factor 1 - lr weight_decay": (
            lambda w, m, v, g, t, lr, wd: (
                _adamw(w, m, v, g, t, lr, 0.0)[0] - wd * w,
                *_adamw(w, m, v, g, t, lr, 0.0)[1:],
            )
        ),
        "this is Adam with an L2 penalty: the decay must not enter g, where the root "
        "divides it away": lambda w, m, v, g, t, lr, wd: _adamw(
            w, m, v, g + wd * w, t, lr, 0.0
        ),
        "the old w decays: shrink it before the step, not after": (
            lambda w, m, v, g, t, lr, wd: (
                _adamw(w, m, v, g, t, lr, 0.0)[0] * (1 - lr * wd),
                *_adamw(w, m, v, g, t, lr, 0.0)[1:],
            )
        ),
        "the sign: w moves against m": lambda w, m, v, g, t, lr, wd: (
            w * (1 - lr * wd) * 2 - _adamw(w, m, v, g, t, lr, wd)[0],
            *_adamw(w, m, v, g, t, lr, wd)[1:],
        ),
        "return all three: the new w, m and v": lambda *case: _adamw(*case)[0],
    },
    hint=(
        "m = 0.9 m + 0.1 g; v = 0.999 v + 0.001 g^2; w = (1 - lr weight_decay) w - lr "
        "m' / (sqrt(v') + 1e-8) with m' = m / (1 - 0.9^t), v' = v / (1 - 0.999^t)"
    ),
    atol=1e-9,
)
