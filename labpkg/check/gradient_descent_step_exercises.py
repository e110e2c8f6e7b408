"""Checkers of foundations/gradient_descent: one step of an optimizer, and its rate.

Notation: w parameters, g gradient, v momentum or second moment, m first moment, t step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from labpkg.check.result import CheckResult, Exercise


def momentum_step(fn: Callable[..., Any]) -> CheckResult:
    """Check `momentum_step(w, v, g, lr, mu)`: the new w and v of one step.

    Shape:
        w, v, g (D,); lr, mu floats -> (D,), (D,)

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _MOMENTUM.check(fn)


def linear_schedule(fn: Callable[..., Any]) -> CheckResult:
    """Check `linear_schedule(step, peak, steps, warmup)`: up to the peak, down to 0.

    Args:
        fn: your function; step counts from 1 to steps, and 1 <= warmup < steps.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _SCHEDULE.check(fn)


def clip_by_norm(fn: Callable[..., Any]) -> CheckResult:
    """Check `clip_by_norm(gradients, max_norm)`: the list, scaled if it is too long.

    Args:
        fn: your function; takes a list of tensors of any shape and returns one.

    Returns:
        A `CheckResult`, false with a hint when a case fails.

    Reference:
        Pascanu, Mikolov, Bengio 2013, arXiv:1211.5063.
    """
    return _CLIP.check(fn)


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


def _momentum(
    w: Tensor, v: Tensor, g: Tensor, lr: float, mu: float
) -> tuple[Tensor, Tensor]:
    v = mu * v + g
    return w - lr * v, v


def _damped(
    w: Tensor, v: Tensor, g: Tensor, lr: float, mu: float
) -> tuple[Tensor, Tensor]:
    v = mu * v + (1 - mu) * g
    return w - lr * v, v


_MOMENTUM = Exercise(
    name="momentum_step",
    arguments=("w", "v", "g", "lr", "mu"),
    reference=_momentum,
    cases=[
        (_tensor(1.0, -2.0), _tensor(0.5, 0.25), _tensor(2.0, 1.0), 0.1, 0.9),
        (_tensor(3.0), _tensor(0.0), _tensor(1.5), 0.5, 0.9),
        (_tensor(1.0), _tensor(-4.0), _tensor(0.0), 0.25, 0.5),
        (_random(4), _random(4, seed=1), _random(4, seed=2), 1e-3, 0.99),
        (_random(4), _random(4, seed=1), _random(4, seed=2), 0.1, 0.0),
        (_random(2, 3), _random(2, 3, seed=1), _random(2, 3, seed=2), 0.3, 0.8),
        (_tensor(1e3, -1e3), _tensor(7.0, 7.0), _tensor(-7.0, 7.0), 1e-2, 0.95),
        (_random(5), _random(5, seed=3), _random(5, seed=4), 0.0, 0.9),
    ],
    mistakes={
        "this is the step without momentum: w moves along v, not along "
        "g": lambda w, v, g, lr, mu: (w - lr * g, mu * v + g),
        "w moves with the old v; update v first": lambda w, v, g, lr, mu: (
            w - lr * v,
            mu * v + g,
        ),
        "g enters with the factor 1 here, not 1 - mu; with 1 - mu it is a running "
        "mean, and the rate must grow by 1 / (1 - mu)": _damped,
        "this is Nesterov's form, which adds g once more": lambda w, v, g, lr, mu: (
            w - lr * (g + mu * (mu * v + g)),
            mu * v + g,
        ),
        "here v holds gradients, as in torch: the learning rate enters when w moves, "
        "not when v grows": lambda w, v, g, lr, mu: (
            w - (mu * v + lr * g),
            mu * v + lr * g,
        ),
        "the sign: w moves against v": lambda w, v, g, lr, mu: (
            w + lr * (mu * v + g),
            mu * v + g,
        ),
        "return both, the new w and the new v": lambda w, v, g, lr, mu: (
            w - lr * (mu * v + g)
        ),
        "first w, then v": lambda w, v, g, lr, mu: _momentum(w, v, g, lr, mu)[::-1],
    },
    hint="v = mu v + g, then w = w - lr v; return w, v",
)


def _linear(step: int, peak: float, steps: int, warmup: int) -> float:
    if step <= warmup:
        return peak * step / warmup
    return peak * (steps - step) / (steps - warmup)


_SCHEDULE = Exercise(
    name="linear_schedule",
    arguments=("step", "peak", "steps", "warmup"),
    reference=_linear,
    cases=[
        (3, 1.0, 10, 4),
        (1, 1.0, 10, 4),
        (4, 1.0, 10, 4),
        (7, 1.0, 10, 4),
        (10, 1.0, 10, 4),
        (5, 0.003, 10, 4),
        (1, 0.5, 8, 1),
        (2, 0.5, 8, 1),
        (500, 6e-4, 10_000, 500),
        (9_999, 6e-4, 10_000, 500),
        (2, 2.0, 3, 2),
    ],
    mistakes={
        "the rise: step / warmup of the peak, 1 / warmup in step 1 and all of it in "
        "step warmup": lambda step, peak, steps, warmup: (
            peak * (steps - step) / (steps - warmup)
        ),
        "steps count from 1, so the first rate is peak / warmup, not 0": (
            lambda step, peak, steps, warmup: _linear(step - 1, peak, steps, warmup)
        ),
        "multiply by the peak": lambda step, peak, steps, warmup: _linear(
            step, 1.0, steps, warmup
        ),
        "the fall is missing: after the warm-up the rate goes down to 0 in the last "
        "step": lambda step, peak, steps, warmup: peak * min(1.0, step / warmup),
        "the fall starts at the peak, in step warmup: it has steps - warmup steps, not "
        "steps": lambda step, peak, steps, warmup: (
            peak * (step / warmup if step <= warmup else (steps - step) / steps)
        ),
    },
    hint=(
        "step / warmup of the peak up to step warmup, then (steps - step) / (steps - "
        "warmup) of it"
    ),
    atol=1e-12,
)


def _scaled(gradients: list[Tensor], factor: Any) -> list[Tensor]:
    return [g * factor for g in gradients]


def _norm(gradients: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients]).norm()


_CLIP = Exercise(
    name="clip_by_norm",
    arguments=("gradients", "max_norm"),
    reference=lambda gs, c: _scaled(gs, min(1.0, c / max(_norm(gs).item(), 1e-300))),
    cases=[
        ([_tensor(2.0, 1.0), _tensor(2.0)], 1.0),
        ([_tensor(0.3, 0.0), _tensor(0.4)], 1.0),
        ([_tensor([3.0, 4.0], [0.0, 12.0])], 6.5),
        ([_tensor(0.0, 0.0), _tensor(0.0)], 1.0),
        ([_random(3, 4), _random(4), _random(2, 2, 2)], 0.5),
        ([_random(3, 4), _random(4), _random(2, 2, 2)], 100.0),
        ([_tensor(1e8), _tensor(1.0)], 2.0),
        ([_tensor(5.0)], 5.0),
    ],
    mistakes={
        "one norm for the whole list, so that the direction stays; you clip each "
        "tensor by itself": lambda gs, c: [
            g * min(1.0, c / max(g.norm().item(), 1e-300)) for g in gs
        ],
        "clamp cuts each element by itself and turns the gradient; scale all of them "
        "by one factor": lambda gs, c: [g.clamp(-c, c) for g in gs],
        "a short gradient stays as it is: the factor is at most 1": lambda gs, c: (
            _scaled(gs, c / max(_norm(gs).item(), 1e-300))
        ),
        "the norm of all is the root of the sum of squares, not the sum of the "
        "norms": lambda gs, c: _scaled(
            gs, min(1.0, c / max(sum(g.norm().item() for g in gs), 1e-300))
        ),
        "this norm has no root: take the square root of the sum of squares": (
            lambda gs, c: _scaled(gs, min(1.0, c / max(_norm(gs).item() ** 2, 1e-300)))
        ),
        "a gradient of zero has the norm 0, and 0 / 0 is nan: divide only if the norm "
        "is above max_norm": lambda gs, c: [
            g / _norm(gs) * _norm(gs).clamp(max=c) for g in gs
        ],
    },
    hint=(
        "norm = root of the sum of squares over all tensors; if it is above max_norm, "
        "multiply every tensor by max_norm / norm"
    ),
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
    in_root: float = 0.0,
    start: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    m = 0.9 * m + 0.1 * g
    v = 0.999 * v + 0.001 * g**power
    m_hat, v_hat = m / (1 - 0.9 ** (t + start)), v / (1 - 0.999 ** (t + start))
    root = (v_hat + in_root).sqrt() + (0 if in_root else 1e-8)
    return w * (1 - lr * weight_decay) - lr * m_hat / root, m, v


def _uncorrected(
    w: Tensor, m: Tensor, v: Tensor, g: Tensor, t: int, lr: float, weight_decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _adamw(w, m, v, g, 10**6, lr, weight_decay)


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
        "t is 1 in the first step: the powers are beta^t, not beta^(t - 1)": (
            lambda *case: _adamw(*case, start=-1)
        ),
        "keep m and v as they are; the corrected values are for this step only": (
            _corrected_state
        ),
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
