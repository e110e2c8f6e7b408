from typing import Any

import pytest
import torch
import torch.nn.functional as F

from labpkg import check
from tests.check.laws import ExerciseLaws

EXERCISES: dict[str, Any] = {
    name: checker
    for name, checker in vars(check).items()
    if getattr(checker, "__module__", "") == "labpkg.check.cross_entropy_exercises"
}


def one_hot(logits, targets):
    return F.one_hot(targets, logits.shape[-1]).float()


def softmax(z):
    e = torch.exp(z - z.max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


def cross_entropy(z, t):
    z = z - z.max(-1, keepdim=True).values
    return (z.exp().sum(-1).log() - z[torch.arange(len(t)), t]).mean()


def autograd_gradient(z, t):
    z = z.clone().requires_grad_()
    F.cross_entropy(z, t).backward()
    return z.grad


def label_smoothing(z, t, epsilon):
    target = (1 - epsilon) * one_hot(z, t) + epsilon / z.shape[-1]
    return -(target * F.log_softmax(z, -1)).sum(-1).mean()


def double_sum(means, counts):
    total = sum(float(m) * int(c) for m, c in zip(means, counts, strict=True))
    return total / int(counts.sum())


RIGHT = [
    ("softmax", softmax),
    ("softmax", lambda z: F.softmax(z, -1)),
    ("softmax", lambda z: (z - z.logsumexp(-1, keepdim=True)).exp()),
    ("cross_entropy", cross_entropy),
    (
        "cross_entropy",
        lambda z, t: -(one_hot(z, t) * F.log_softmax(z, -1)).sum() / len(z),
    ),
    ("cross_entropy", lambda z, t: F.cross_entropy(z, t).item()),
    ("cross_entropy_gradient", lambda z, t: (softmax(z) - one_hot(z, t)) / len(z)),
    ("cross_entropy_gradient", autograd_gradient),
    ("label_smoothing", label_smoothing),
    ("label_smoothing", lambda z, t, e: F.cross_entropy(z, t, label_smoothing=e)),
    ("weighted_mean", lambda m, c: (m * c).sum() / c.sum()),
    ("weighted_mean", double_sum),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_pass(name, answer):
    result = EXERCISES[name](answer)
    assert result, result.message
    assert result.cases >= 8


def naive_softmax(z):
    return z.exp() / z.exp().sum(-1, keepdim=True)


def softmax_in_place(z):
    z -= z.max(-1, keepdim=True).values
    return softmax(z)


def wrong_chain_rule(z, t):
    """The formula (1/p)(y - p) s(1 - s), met in print."""
    p, s = softmax(z), torch.sigmoid(z)
    return (one_hot(z, t) - p) / p * s * (1 - s)


WRONG = [
    ("softmax", lambda z: z, "returns its argument"),
    ("softmax", lambda z: F.softmax(z, 0), "the batch; the classes are the last"),
    ("softmax", lambda z: z.exp() / z.exp().sum(), "over the whole tensor"),
    ("softmax", lambda z: F.log_softmax(z, -1), "log-probabilities"),
    ("softmax", torch.sigmoid, "a sigmoid looks at one logit"),
    ("softmax", torch.exp, "divide by the sum of each row"),
    ("softmax", lambda z: z / z.sum(-1, keepdim=True), "take exp before"),
    ("softmax", lambda z: (z - z.amax(-1, keepdim=True)).exp(), "after exp(z - max)"),
    ("softmax", naive_softmax, "subtract the maximum of each row first"),
    ("softmax", lambda z: naive_softmax(z.clamp(-50, 50)), "subtract the maximum"),
    ("softmax", lambda z: naive_softmax(z.double()), "subtract the maximum"),
    ("softmax", lambda z: naive_softmax(z - z.max()), "not of the whole tensor"),
    ("softmax", softmax_in_place, "changes its argument logits"),
    ("softmax", lambda z: z.exp() / z.exp().sum(-1), "raises RuntimeError"),
    ("cross_entropy", lambda z, t: z, "returns its argument"),
    ("cross_entropy", lambda z, t: cross_entropy(z, t) * len(z), "mean over the batch"),
    ("cross_entropy", lambda z, t: cross_entropy(z, t) / z.shape[-1], "instead of B"),
    ("cross_entropy", lambda z, t: -cross_entropy(z, t), "the sign"),
    (
        "cross_entropy",
        lambda z, t: F.cross_entropy(z, t, reduction="none"),
        "return one number",
    ),
    (
        "cross_entropy",
        lambda z, t: cross_entropy(softmax(z), t),
        "softmax is applied twice",
    ),
    (
        "cross_entropy",
        lambda z, t: -torch.log(naive_softmax(z))[torch.arange(len(t)), t].mean(),
        "inf / inf is nan",
    ),
    (
        "cross_entropy",
        lambda z, t: (z.exp().sum(-1).log() - z[torch.arange(len(t)), t]).mean(),
        "exp overflows",
    ),
    (
        "cross_entropy",
        lambda z, t: -torch.log(softmax(z))[torch.arange(len(t)), t].mean(),
        "rounds to 0 is -inf",
    ),
    (
        "cross_entropy",
        lambda z, t: -torch.log(softmax(z) + 1e-8)[torch.arange(len(t)), t].mean(),
        "no constant added inside the log",
    ),
    (
        "cross_entropy",
        lambda z, t: -torch.log2(softmax(z))[torch.arange(len(t)), t].mean(),
        "nats, not in bits",
    ),
    (
        "cross_entropy",
        lambda z, t: -F.logsigmoid(z)[torch.arange(len(t)), t].mean(),
        "share one softmax",
    ),
    ("cross_entropy", lambda z, t: None, "end it with a return"),
    ("cross_entropy_gradient", lambda z, t: z, "returns its argument"),
    ("cross_entropy_gradient", lambda z, t: softmax(z) - one_hot(z, t), "divide by B"),
    (
        "cross_entropy_gradient",
        lambda z, t: (one_hot(z, t) - softmax(z)) / len(z),
        "a step against it raises the target",
    ),
    (
        "cross_entropy_gradient",
        lambda z, t: (softmax(z) - one_hot(z, t)) / z.numel(),
        "divide by B only",
    ),
    (
        "cross_entropy_gradient",
        lambda z, t: (z - one_hot(z, t)) / len(z),
        "not the logits",
    ),
    ("cross_entropy_gradient", lambda z, t: softmax(z) / len(z), "minus the one-hot"),
    (
        "cross_entropy_gradient",
        lambda z, t: -one_hot(z, t) * (1 - softmax(z)) / len(z),
        "not diagonal",
    ),
    (
        "cross_entropy_gradient",
        lambda z, t: (naive_softmax(z) - one_hot(z, t)) / len(z),
        "subtract the maximum of each row first",
    ),
    (
        "cross_entropy_gradient",
        lambda z, t: (one_hot(z, t) - softmax(z)) * (1 - softmax(z)) / len(z),
        "myth E9",
    ),
    (
        "cross_entropy_gradient",
        lambda z, t: (F.softmax(z, -1) - F.one_hot(t)) / len(z),
        "pass the number of classes",
    ),
    ("cross_entropy_gradient", wrong_chain_rule, "(softmax(logits) - onehot"),
    ("cross_entropy_gradient", cross_entropy, "not a scalar"),
    ("label_smoothing", lambda z, t, e: z, "returns its argument"),
    ("label_smoothing", lambda z, t, e: cross_entropy(z, t), "has no effect"),
    (
        "label_smoothing",
        lambda z, t, e: (
            -(
                (
                    (1 - e) * one_hot(z, t)
                    + (1 - one_hot(z, t)) * e / max(1, z.shape[-1] - 1)
                )
                * F.log_softmax(z, -1)
            )
            .sum(-1)
            .mean()
        ),
        "not epsilon / (V - 1)",
    ),
    (
        "label_smoothing",
        lambda z, t, e: cross_entropy(z, t) - e * F.log_softmax(z, -1).mean(),
        "the target loses epsilon",
    ),
    (
        "label_smoothing",
        lambda z, t, e: (
            (1 - e) * cross_entropy(z, t) - e * F.log_softmax(z, -1).sum(-1).mean()
        ),
        "forgot to divide by V",
    ),
    ("label_smoothing", lambda z, t, e: label_smoothing(z, t, 1 - e), "swapped"),
    (
        "label_smoothing",
        lambda z, t, e: (
            (1 - e) * cross_entropy(z, t) - e * torch.log(softmax(z)).mean()
        ),
        "rounds to 0 is -inf",
    ),
    (
        "label_smoothing",
        lambda z, t, e: F.cross_entropy(naive_softmax(z).log(), t, label_smoothing=e),
        "subtract the maximum of each row first",
    ),
    ("weighted_mean", lambda m, c: m, "returns its argument"),
    ("weighted_mean", lambda m, c: m.mean(), "treats every rank alike"),
    ("weighted_mean", lambda m, c: (m * c).sum(), "divide by the number of tokens"),
    ("weighted_mean", lambda m, c: (m * c).mean(), "not by the number of ranks"),
    ("weighted_mean", lambda m, c: m * c / c.sum(), "return one number"),
    ("weighted_mean", lambda m, c: m.sum() / c.sum(), "mean x count"),
    ("weighted_mean", lambda m, c: (m * c).sum() / (c**2).sum().sqrt(), "sum of means"),
]


class TestLaws(ExerciseLaws):
    exercises, wrong = EXERCISES, WRONG


def test_checks_do_not_touch_the_random_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    check.softmax(softmax)
    assert torch.equal(torch.rand(3), expected)
