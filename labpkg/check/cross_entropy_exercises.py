"""Checkers of the exercises of the chapter foundations/cross_entropy.

Notation: B batch, V classes, z logits, p = softmax(z), y one-hot target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from labpkg.check.result import CheckResult, Exercise

_OVERFLOW = (
    "exp overflows for large logits and is 0 for very negative ones; subtract the "
    "maximum of each row first, softmax does not change"
)


def softmax(fn: Callable[..., Any]) -> CheckResult:
    """Check `softmax(logits)`: probabilities over the last dim, for any logits.

    Shape:
        logits (..., V) -> (..., V)

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _SOFTMAX.check(fn)


def cross_entropy(fn: Callable[..., Any]) -> CheckResult:
    """Check `cross_entropy(logits, targets)`: the mean of -log p[target], in nats.

    Shape:
        logits (B, V), targets (B,) int64 -> ()

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _CROSS_ENTROPY.check(fn)


def cross_entropy_gradient(fn: Callable[..., Any]) -> CheckResult:
    """Check `cross_entropy_gradient(logits, targets)`: d mean loss / d logits.

    Shape:
        logits (B, V), targets (B,) int64 -> (B, V)

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _GRADIENT.check(fn)


def label_smoothing(fn: Callable[..., Any]) -> CheckResult:
    """Check `label_smoothing(logits, targets, epsilon)`: the smoothed mean loss.

    The target distribution is (1 - epsilon) onehot + epsilon / V.

    Shape:
        logits (B, V), targets (B,) int64, epsilon a float in [0, 1] -> ()

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.

    Reference:
        Szegedy et al. 2016, arXiv:1512.00567.
    """
    return _LABEL_SMOOTHING.check(fn)


def weighted_mean(fn: Callable[..., Any]) -> CheckResult:
    """Check `weighted_mean(means, counts)`: the mean over all tokens of all ranks.

    Rank r has counts[r] tokens with the mean loss means[r]; a rank may have none.

    Shape:
        means (R,), counts (R,) int64 -> ()

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _WEIGHTED_MEAN.check(fn)


def _tensor(*rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32, device="cpu")


def _random(*shape: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(sum(shape))
    return scale * torch.randn(*shape, generator=generator, device="cpu")


def _labels(*classes: int) -> Tensor:
    return torch.tensor(classes, dtype=torch.int64, device="cpu")


def _picked(scores: Tensor, targets: Tensor) -> Tensor:
    return scores.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _one_hot(logits: Tensor, targets: Tensor) -> Tensor:
    return F.one_hot(targets, logits.shape[-1]).to(logits.dtype)


def _naive_softmax(z: Tensor) -> Tensor:
    return z.exp() / z.exp().sum(-1, keepdim=True)


def _smoothed(z: Tensor, t: Tensor, e: float, others: float | None = None) -> Tensor:
    """Return the mean loss when each wrong class gets `others` instead of e/V."""
    V = z.shape[-1]
    wrong = e / V if others is None else others
    right = 1 - e + e / V if others is None else 1 - e
    y = _one_hot(z, t)
    q = right * y + wrong * (1 - y)
    return -(q * z.double().log_softmax(-1)).sum(-1).mean()


_SOFTMAX = Exercise(
    name="softmax",
    arguments=("logits",),
    reference=lambda z: z.double().softmax(-1),
    cases=[
        (_tensor([1, 2, 3], [0, 2, -1]),),
        (torch.tensor([0.5, -1.0, 2.0], device="cpu"),),
        (_random(2, 2, 3),),
        (_random(4, 5),),
        (_random(2, 3, 2, 2),),
        (_tensor([3, 3, 3, 3]),),
        (_tensor([-7.5], [2.0]),),
        (_tensor([1000, 0, -1000]),),
        (_tensor([-1000, -1001, -1000]),),
        (_tensor([1000, 999, 998], [-1000, -999, -998]),),
        (_random(3, 4, scale=400.0),),
        (_tensor([1, -torch.inf, 2]),),
    ],
    mistakes={
        "the numbers of each row must add up to 1; you normalise over the whole "
        "tensor, so pass dim=-1 (and keepdim=True) to the sum": lambda z: (
            z.double().flatten().softmax(0).view_as(z)
        ),
        "you normalise over the first dim, the batch; the classes are the last: "
        "dim=-1": lambda z: z.double().softmax(0),
        "divide by the sum of each row, with keepdim=True": lambda z: z.double().exp(),
        "after exp(z - max), divide by the sum of each row": lambda z: (
            (z - z.amax(-1, keepdim=True)).double().exp()
        ),
        "these are log-probabilities; take exp of them": lambda z: (
            z.double().log_softmax(-1)
        ),
        "a sigmoid looks at one logit alone; softmax divides exp(z) by the sum "
        "over all classes": lambda z: z.double().sigmoid(),
        "take exp before you divide by the sum": lambda z: z / z.sum(-1, keepdim=True),
        _OVERFLOW: _naive_softmax,
        "subtract the maximum of each row, not of the whole tensor: a row far "
        "below it becomes 0/0": lambda z: _naive_softmax(z - z.max()),
    },
    hint="p_i = exp(z_i) / sum_j exp(z_j), over the last dim; " + _OVERFLOW,
)

_LOGITS_AND_TARGETS = [
    (_tensor([1, 2, 3], [0, 2, -1]), _labels(2, 0)),
    (_tensor([0, 0, 0, 0]), _labels(3)),
    (_random(4, 5), _labels(0, 4, 2, 2)),
    (_random(3, 2), _labels(1, 0, 1)),
    (_random(6, 3), _labels(0, 0, 0, 1, 1, 2)),
    (_random(2, 10), _labels(9, 5)),
    (_tensor([4.0], [-3.0]), _labels(0, 0)),
    (_tensor([1000, 0, -1000]), _labels(0)),
    (_tensor([1000, 0, -1000], [1, 2, 3]), _labels(2, 0)),
    (_tensor([-1000, -1001, -1000]), _labels(1)),
    (_tensor([1000, 999, 998], [-1000, -999, -998]), _labels(1, 1)),
    (_random(4, 3, scale=400.0), _labels(0, 1, 2, 0)),
]

_CROSS_ENTROPY = Exercise(
    name="cross_entropy",
    arguments=("logits", "targets"),
    reference=lambda z, t: F.cross_entropy(z.double(), t),
    cases=_LOGITS_AND_TARGETS,
    mistakes={
        "sum over the classes, but take the mean over the batch": lambda z, t: (
            F.cross_entropy(z.double(), t, reduction="sum")
        ),
        "sum over the classes, mean over the batch: you "
        "divide by B V instead of B": lambda z, t: (
            F.cross_entropy(z.double(), t) / z.shape[-1]
        ),
        "return one number, the mean over the batch": lambda z, t: F.cross_entropy(
            z.double(), t, reduction="none"
        ),
        "the sign: a loss is -log p, never negative": lambda z, t: (
            -F.cross_entropy(z.double(), t)
        ),
        "softmax is applied twice; the log-sum-exp already holds it": lambda z, t: (
            F.cross_entropy(z.double().softmax(-1), t)
        ),
        "this is the log of the logits; the loss needs "
        "the log of softmax(logits)": lambda z, t: -_picked(z.log(), t).mean(),
        "this is the mean of -p; take the log of the probability": lambda z, t: (
            -_picked(z.double().softmax(-1), t).mean()
        ),
        "use the natural logarithm: the loss is in nats, not in bits": lambda z, t: (
            F.cross_entropy(z.double(), t) / math.log(2)
        ),
        "a sigmoid looks at one logit alone; the "
        "classes share one softmax": lambda z, t: (
            -_picked(F.logsigmoid(z.double()), t).mean()
        ),
        "the log of a probability that rounds to 0 is -inf; do not form p, write "
        "the loss as log-sum-exp minus the target's logit": lambda z, t: (
            -_picked(z.softmax(-1).log(), t).mean()
        ),
        _OVERFLOW: lambda z, t: (z.exp().sum(-1).log() - _picked(z, t)).mean(),
        "inf / inf is nan: " + _OVERFLOW: lambda z, t: (
            -_picked(_naive_softmax(z).log(), t).mean()
        ),
    },
    hint=(
        "per row logsumexp(z) - z[target], with the row's maximum subtracted first; "
        "sum over the classes, mean over the batch; no constant added inside the log"
    ),
)


def _gradient(z: Tensor, t: Tensor) -> Tensor:
    """Return p - y, the gradient of the summed loss."""
    z = z.double()
    return z.softmax(-1) - _one_hot(z, t)


def _narrow_one_hot(z: Tensor, t: Tensor) -> Tensor:
    """Return F.one_hot without the number of classes, where it broadcasts."""
    narrow = F.one_hot(t)
    return narrow if narrow.shape[-1] == 1 else _one_hot(z, t)


def _diagonal_gradient(z: Tensor, t: Tensor) -> Tensor:
    """Return -(y/p) p (1 - p): the chain rule with the diagonal of the Jacobian."""
    z = z.double()
    return -_one_hot(z, t) * (1 - z.softmax(-1)) / len(z)


_GRADIENT = Exercise(
    name="cross_entropy_gradient",
    arguments=("logits", "targets"),
    reference=lambda z, t: _gradient(z, t) / len(z),
    cases=_LOGITS_AND_TARGETS,
    mistakes={
        "this is the gradient of the sum; the loss is "
        "a mean, so divide by B": _gradient,
        "the sign: the gradient is p - y, a step "
        "against it raises the target": lambda z, t: -_gradient(z, t) / len(z),
        "the sign, and the mean: the gradient is (p - y) / B": lambda z, t: (
            -_gradient(z, t)
        ),
        "the loss sums over classes and averages over "
        "the batch: divide by B only": lambda z, t: _gradient(z, t) / z.numel(),
        "p is softmax(logits), not the logits": lambda z, t: (
            (z - _one_hot(z, t)) / len(z)
        ),
        "the target class needs - 1: the gradient is "
        "p minus the one-hot y": lambda z, t: z.double().softmax(-1) / len(z),
        "a sigmoid looks at one logit alone; p is softmax(logits)": lambda z, t: (
            (z.double().sigmoid() - _one_hot(z, t)) / len(z)
        ),
        "the Jacobian of softmax is not diagonal: each logit changes every "
        "probability, so the wrong classes have a gradient too; the product "
        "collapses to p - y": _diagonal_gradient,
        "(y - p) (1 - p) is no gradient of this loss: the sign is wrong and the factor "
        "1 - p is too much (myth E9)": lambda z, t: (
            -_gradient(z, t) * (1 - z.double().softmax(-1)) / len(z)
        ),
        "F.one_hot(targets) is as wide as the largest target of this batch, and then "
        "broadcasts; pass the number of classes, logits.shape[-1]": lambda z, t: (
            (z.double().softmax(-1) - _narrow_one_hot(z, t)) / len(z)
        ),
        _OVERFLOW: lambda z, t: (_naive_softmax(z) - _one_hot(z, t)) / len(z),
    },
    hint="(softmax(logits) - onehot(targets)) / B; " + _OVERFLOW,
)

_LABEL_SMOOTHING = Exercise(
    name="label_smoothing",
    arguments=("logits", "targets", "epsilon"),
    reference=_smoothed,
    cases=[
        (z, t, epsilon)
        for (z, t), epsilon in zip(
            _LOGITS_AND_TARGETS,
            (0.1, 0.2, 0.1, 0.3, 0.05, 0.1, 0.5, 0.1, 0.1, 1.0, 0.0, 0.1),
            strict=True,
        )
    ],
    mistakes={
        "epsilon has no effect: mix epsilon / V of "
        "every class into the target": lambda z, t, e: F.cross_entropy(z.double(), t),
        "epsilon is spread over all V classes, the target's too: epsilon / V, not "
        "epsilon / (V - 1)": lambda z, t, e: _smoothed(
            z, t, e, e / max(z.shape[-1] - 1, 1)
        ),
        "the target loses epsilon: its part is (1 - "
        "epsilon) + epsilon / V": lambda z, t, e: (
            _smoothed(z, t, e) + e * F.cross_entropy(z.double(), t)
        ),
        "the uniform part is epsilon / V per class: "
        "you forgot to divide by V": lambda z, t, e: (
            (1 - e) * F.cross_entropy(z.double(), t)
            - e * z.double().log_softmax(-1).sum(-1).mean()
        ),
        "1 - epsilon stays with the target and epsilon "
        "is spread; you swapped them": lambda z, t, e: _smoothed(z, t, 1 - e),
        "sum over the classes, but take the mean over the batch": lambda z, t, e: (
            _smoothed(z, t, e) * len(z)
        ),
        "the log of a probability that rounds to 0 is -inf; use log_softmax, or "
        "log-sum-exp": lambda z, t, e: (
            (1 - e) * F.cross_entropy(z, t) - e * z.softmax(-1).log().mean()
        ),
        _OVERFLOW: lambda z, t, e: F.cross_entropy(
            _naive_softmax(z).log(), t, label_smoothing=e
        ),
    },
    hint=(
        "(1 - epsilon) times the plain loss plus epsilon times the mean of -log p over "
        "all classes, from a log-softmax with the maximum subtracted first"
    ),
)


def _over_all_tokens(means: Tensor, counts: Tensor) -> Tensor:
    return (means.double() * counts).sum() / counts.sum()


_WEIGHTED_MEAN = Exercise(
    name="weighted_mean",
    arguments=("means", "counts"),
    reference=_over_all_tokens,
    cases=[
        (_tensor(2.0, 5.0, 8.0), _labels(3, 1, 0)),  # tells all the mistakes apart
        (_tensor(1.0, 2.0, 3.0, 4.0), _labels(1, 0, 5, 2)),
        (_tensor(2.0, 4.0), _labels(4, 4)),
        (_tensor(3.25), _labels(7)),
        (_tensor(0.0, 6.0), _labels(0, 3)),
        (_tensor(-1.0, 2.0, 0.5), _labels(10, 20, 30)),
        (_tensor(2.5, 2.5, 2.5), _labels(1, 100, 9)),
        (_random(8), _labels(128, 128, 128, 128, 128, 128, 128, 5)),
    ],
    mistakes={
        "the mean of means treats every rank alike; a rank with more tokens must "
        "weigh more: multiply by counts": lambda m, c: m.mean(),
        "this is the sum over all tokens; divide by the number of tokens, "
        "counts.sum()": lambda m, c: (m * c).sum(),
        "divide by the number of tokens, counts.sum(), "
        "not by the number of ranks": lambda m, c: (m * c).mean(),
        "return one number: add over the ranks": lambda m, c: m * c / c.sum(),
        "multiply each mean by its count: the sum of "
        "a rank is mean x count": lambda m, c: m.sum() / c.sum(),
        "leaving out the empty ranks is not enough: "
        "weigh each mean by its count": lambda m, c: m[c > 0].mean(),
    },
    hint="sum of means x counts over all ranks, divided by the sum of counts",
)
