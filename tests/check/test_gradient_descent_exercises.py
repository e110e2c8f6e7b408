from typing import Any

import pytest
import torch
import torch.nn.functional as F

from labpkg import check
from labpkg.foundations.learning_rates import warmup_linear
from labpkg.foundations.optimizers import SGD, AdamW
from tests.check.laws import ExerciseLaws

MODULES = (
    "labpkg.check.gradient_descent_step_exercises",
    "labpkg.check.gradient_descent_curvature_exercises",
    "labpkg.check.gradient_descent_adamw_exercises",
)
EXERCISES: dict[str, Any] = {
    name: checker
    for name, checker in vars(check).items()
    if getattr(checker, "__module__", "") in MODULES
}


def momentum_step(w, v, g, lr, mu):
    v = mu * v + g
    return w - lr * v, v


def momentum_of_the_library(w, v, g, lr, mu):
    p = torch.nn.Parameter(w.clone())
    optimizer = SGD([p], lr=lr, momentum=mu)
    optimizer.state[p]["momentum_buffer"] = v.clone()
    p.grad = g
    optimizer.step()
    return p.detach(), optimizer.state[p].get("momentum_buffer", g) if mu else g


def clip(gradients, max_norm):
    norm = sum((g**2).sum() for g in gradients) ** 0.5
    return [g * max_norm / norm for g in gradients] if norm > max_norm else gradients


def clip_of_torch(gradients, max_norm):
    params = [torch.zeros_like(g).requires_grad_() for g in gradients]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(params, max_norm)
    return [p.grad for p in params]


def adamw_step(w, m, v, g, t, lr, weight_decay):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)) ** 0.5 + 1e-8)
    return w - lr * weight_decay * w - lr * step, m, v


def adamw_of(optimizer_class):
    def step(w, m, v, g, t, lr, weight_decay):
        p = torch.nn.Parameter(w.clone())
        optimizer = optimizer_class([p], lr=lr, weight_decay=weight_decay)
        optimizer.state[p] = {
            "step": torch.tensor(t - 1.0) if optimizer_class != AdamW else t - 1,
            "exp_avg": m.clone(),
            "exp_avg_sq": v.clone(),
        }
        p.grad = g
        optimizer.step()
        state = optimizer.state[p]
        return p.detach(), state["exp_avg"], state["exp_avg_sq"]

    return step


def product(x, W, v):
    p = (x @ W.T).softmax(-1)
    dz = x @ v.T
    dp = p * (dz - (p * dz).sum(-1, keepdim=True))
    return dp.T @ x / len(x)


def sharpness(x, y, W, num_steps=300):
    v = torch.randn(W.shape, dtype=W.dtype, generator=torch.Generator().manual_seed(1))
    for _ in range(num_steps):
        v = product(x, W, v / v.norm())
    return v.norm()


def sharpness_by_autograd(x, y, W):
    loss = lambda w: F.cross_entropy(x @ w.view_as(W).T, y)
    hessian = torch.autograd.functional.hessian(loss, W.flatten())
    return torch.linalg.eigvalsh(hessian).max().item()


RIGHT = [
    ("stability_limit", lambda h: 2 / torch.linalg.eigvalsh(h).max()),
    ("stability_limit", lambda h: 2 / torch.linalg.matrix_norm(h, 2).item()),
    ("momentum_step", momentum_step),
    ("linear_schedule", lambda s, p, n, k: p * min(s / k, (n - s) / (n - k))),
    (
        "linear_schedule",
        lambda s, p, n, k: warmup_linear(s, peak=p, steps=n, warmup=k, floor=0.0),
    ),
    ("clip_by_norm", clip),
    ("clip_by_norm", clip_of_torch),
    ("adamw_step", adamw_step),
    ("adamw_step", adamw_of(AdamW)),
    ("adamw_step", adamw_of(torch.optim.AdamW)),
    ("sharpness", sharpness),
    ("sharpness", sharpness_by_autograd),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_pass(name, answer):
    result = EXERCISES[name](answer)
    assert result, result.message
    assert result.cases >= 8


def in_place(w, v, g, lr, mu):
    v.mul_(mu).add_(g)
    return w - lr * v, v


def clip_in_place(gradients, max_norm):
    for g in gradients:
        g *= min(1.0, max_norm / max(float(clip_norm(gradients)), 1e-9))
    return gradients


def clip_norm(gradients):
    return torch.cat([g.flatten() for g in gradients]).norm()


def l2_adam(w, m, v, g, t, lr, weight_decay):
    return adamw_step(w, m, v, g + weight_decay * w, t, lr, 0.0)


def no_correction(w, m, v, g, t, lr, wd):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    return w * (1 - lr * wd) - lr * m / (v.sqrt() + 1e-8), m, v


def no_eps(w, m, v, g, t, lr, wd):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    root = (v / (1 - 0.999**t)).sqrt()
    return w * (1 - lr * wd) - lr * m / (1 - 0.9**t) / root, m, v


def eps_inside(w, m, v, g, t, lr, wd):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    root = (v / (1 - 0.999**t) + 1e-8).sqrt()
    return w * (1 - lr * wd) - lr * m / (1 - 0.9**t) / root, m, v


def from_equal_classes(x, y, W):
    v = torch.ones_like(W)
    return (v * product(x, W, v)).sum() / v.numel()


def from_ones(x, y, W):
    v = torch.ones_like(W)
    for _ in range(5):
        v = product(x, W, v / v.norm())
        v = v * (v.abs() > 1e-12)  # what is rounding is not there
    return (v / v.norm() * product(x, W, v / v.norm())).sum()


WRONG = [
    ("stability_limit", lambda h: h, "returns its argument"),
    ("stability_limit", lambda h: 1 / torch.linalg.eigvalsh(h).max(), "in one step"),
    ("stability_limit", lambda h: 2 / torch.linalg.eigvalsh(h).min(), "the steepest"),
    ("stability_limit", torch.linalg.cond, "2 / largest eigenvalue"),
    ("stability_limit", lambda h: 2 / h.diag().max(), "only if the matrix is diagonal"),
    ("stability_limit", lambda h: 2 / h.norm(), "Frobenius"),
    ("stability_limit", lambda h: torch.linalg.eigvals(h), "return a scalar"),
    ("momentum_step", lambda w, v, g, lr, mu: w, "returns its argument"),
    ("momentum_step", in_place, "changes its argument v"),
    ("momentum_step", lambda w, v, g, lr, mu: (w - lr * g, mu * v + g), "along v"),
    (
        "momentum_step",
        lambda w, v, g, lr, mu: momentum_step(w, v, (1 - mu) * g, lr, mu),
        "with the factor 1 here",
    ),
    (
        "momentum_step",
        lambda w, v, g, lr, mu: (w - mu * v - lr * g, mu * v + lr * g),
        "the learning rate enters when w moves",
    ),
    (
        "momentum_step",
        lambda w, v, g, lr, mu: (w + mu * v - lr * g, mu * v - lr * g),
        "this v is a velocity",
    ),
    ("momentum_step", lambda w, v, g, lr, mu: w - lr * (mu * v + g), "return both"),
    ("linear_schedule", lambda s, p, n, k: s, "returns its argument"),
    ("linear_schedule", lambda s, p, n, k: p * (s - 1) / k if s < k else p, "count"),
    ("linear_schedule", lambda s, p, n, k: p * (s + 1) / k if s < k else p, "up to"),
    (
        "linear_schedule",
        lambda s, p, n, k: p * s / k if s <= k else p * (s - k) / (n - k),
        "then (steps - step)",
    ),
    ("linear_schedule", lambda s, p, n, k: p * min(1, s / k), "the fall is missing"),
    ("linear_schedule", lambda s, p, n, k: p * (n - s) / (n - k), "the rise"),
    (
        "linear_schedule",
        lambda s, p, n, k: p * s / k if s <= k else p * (n - s) / n,
        "the fall starts at the peak",
    ),
    (
        "linear_schedule",
        lambda s, p, n, k: p * s / k if s <= k else p * (n - s + 1) / (n - k + 1),
        "the last step has the rate 0",
    ),
    ("linear_schedule", lambda s, p, n, k: p, "step / warmup of the peak up to"),
    ("clip_by_norm", lambda gs, c: gs, "returns its argument"),
    ("clip_by_norm", lambda gs, c: [g.clamp(-c, c) for g in gs], "turns the gradient"),
    ("clip_by_norm", lambda gs, c: [g * c / clip_norm(gs) for g in gs], "at most 1"),
    (
        "clip_by_norm",
        lambda gs, c: [g * min(1, c / max(g.norm(), 1e-9)) for g in gs],
        "by itself",
    ),
    ("clip_by_norm", clip_in_place, "changes its argument gradients"),
    ("clip_by_norm", lambda gs, c: torch.cat(gs), "not a tensor"),
    ("adamw_step", lambda w, *rest: w, "returns its argument"),
    ("adamw_step", no_eps, "0 / 0 = nan"),
    ("adamw_step", l2_adam, "Adam with an L2 penalty"),
    ("adamw_step", no_correction, "start at 0"),
    ("adamw_step", eps_inside, "added to the root"),
    (
        "adamw_step",
        lambda w, m, v, g, t, lr, wd: adamw_step(w, m, v, g, t, lr, 0),
        "has no effect",
    ),
    ("adamw_step", lambda *case: adamw_step(*case)[::-1], "m = 0.9 m + 0.1 g"),
    (
        "adamw_step",
        lambda w, m, v, g, t, *rest: adamw_step(w, m, v, g, t - 1, *rest),
        "not beta^(t - 1)",
    ),
    ("sharpness", lambda x, y, W: x, "returns its argument"),
    ("sharpness", lambda x, y, W: len(x) * sharpness(x, y, W), "divide by B"),
    ("sharpness", from_ones, "start from a random one"),
    ("sharpness", from_equal_classes, "start from a random one"),
    ("sharpness", lambda x, y, W: torch.linalg.matrix_norm(x, 2) ** 2 / len(x), "only"),
    ("sharpness", lambda x, y, W: 2 / sharpness(x, y, W), "limit of the learning rate"),
    ("sharpness", lambda x, y, W: sharpness(x, y, W, num_steps=2), "repeat more often"),
]


def of_module(index):
    """Return the exercises of one module and their wrong answers."""
    own = {k: f for k, f in EXERCISES.items() if f.__module__ == MODULES[index]}
    return own, [row for row in WRONG if row[0] in own]


class TestStepLaws(ExerciseLaws):
    exercises, wrong = of_module(0)


class TestCurvatureLaws(ExerciseLaws):
    exercises, wrong = of_module(1)


class TestAdamwLaws(ExerciseLaws):
    exercises, wrong = of_module(2)
