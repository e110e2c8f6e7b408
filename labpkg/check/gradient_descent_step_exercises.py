"""Checkers of foundations/gradient_descent: momentum, schedules, clipping.

Notation: w parameters, g gradient, v momentum.
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
        "this v is a velocity, lr and sign included; here v holds gradients, as in "
        "torch: v = mu v + g": lambda w, v, g, lr, mu: (
            w + mu * v - lr * g,
            mu * v - lr * g,
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
        (2, 1.0, 10, 4),
        (1, 1.0, 10, 4),
        (4, 1.0, 10, 4),
        (8, 1.0, 10, 4),
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
        "step 1 already has a rate, peak / warmup: divide by warmup, not by warmup - "
        "1": lambda step, peak, steps, warmup: peak * (step - 1) / max(warmup - 1, 1),
        "the last step has the rate 0: steps - step, not steps - step + 1": (
            lambda step, peak, steps, warmup: _linear(
                step, peak, steps + (step > warmup), warmup
            )
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
