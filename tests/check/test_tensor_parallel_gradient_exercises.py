"""The checkers of parallelism/tensor_parallel on gradients: right and wrong answers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from labpkg import check
from tests.check.laws import ExerciseLaws

EXERCISES: dict[str, Any] = {
    name: checker
    for name, checker in vars(check).items()
    if getattr(checker, "__module__", "")
    == "labpkg.check.tensor_parallel_gradient_exercises"
}


def vocabulary_loss(logits, targets):
    """Join everything and let torch differentiate."""
    z = torch.cat(logits, -1).double().requires_grad_()
    losses = F.cross_entropy(z, targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    return losses, list(gradient.chunk(len(logits), -1))


def sequence_gradients(xs, gain, ups, downs, grads):
    """Join the tokens and let torch differentiate."""
    leaves = [t.clone().requires_grad_() for t in (*xs, gain, *ups, *downs)]
    n = len(xs)
    tokens, copy = torch.cat(leaves[:n]), leaves[n]
    shards = zip(leaves[n + 1 : 2 * n + 1], leaves[2 * n + 1 :], strict=True)
    parts = [(tokens * copy @ up).relu() @ down for up, down in shards]
    y = torch.stack(parts).sum(0)
    found = torch.autograd.grad(y, leaves, torch.cat(grads))
    return (
        list(found[:n]),
        [found[n]] * n,
        list(found[n + 1 : 2 * n + 1]),
        list(found[2 * n + 1 :]),
    )


RIGHT = [
    ("vocabulary_loss", vocabulary_loss),
    ("sequence_gradients", sequence_gradients),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_pass(name, answer):
    result = EXERCISES[name](answer)
    assert result, result.message
    assert result.cases >= 8


def own_softmax(logits, targets):
    losses, gradients = vocabulary_loss(logits, targets)
    whole = torch.cat(logits, -1).double().softmax(-1).chunk(len(logits), -1)
    own = [piece.double().softmax(-1) for piece in logits]
    pieces = zip(gradients, whole, own, strict=True)
    return losses, [g - p + q for g, p, q in pieces]


def without_maximum(logits, targets):
    z = torch.cat(logits, -1)
    total = z.exp().sum(-1)
    losses = total.log() - z[torch.arange(len(z)), targets]
    onehot = F.one_hot(targets, z.shape[-1])
    gradient = z.exp() / total[:, None] - onehot
    return losses, list(gradient.chunk(len(logits), -1))


def merged(log_sum, shifted_target=False):
    """Return an answer in one exchange that makes the log-sum-exp of three numbers."""

    def answer(logits, targets):
        z = torch.stack(logits).double()  # (n, B, V/n)
        peaks = z.amax(-1)
        sums = log_sum(peaks, (z - peaks[..., None]).exp().sum(-1))
        onehots = F.one_hot(targets, z.shape[-1] * len(z)).chunk(len(z), -1)
        found = z - peaks[..., None] if shifted_target else z
        picked = sum((f * h).sum(-1) for f, h in zip(found, onehots, strict=True))
        gradients = (z - sums[:, None]).exp() - torch.stack(onehots)
        return sums - picked, list(gradients)

    return answer


def right_sum(peaks, totals):
    return (peaks + totals.log()).logsumexp(0)


with_own_maxima = merged(lambda peaks, totals: totals.sum(0).log() + peaks.amax(0))
sum_of_logs = merged(lambda peaks, totals: (peaks + totals.log()).sum(0))
lost_maximum = merged(lambda *given: right_sum(*given) - given[0].amax(0))
shifted_target = merged(right_sum, shifted_target=True)


def test_the_wrong_merges_differ_from_a_right_one_in_a_detail():
    assert EXERCISES["vocabulary_loss"](merged(right_sum))


def local_numbers(logits, targets):
    """Each rank compares targets with 0 to V/n - 1."""
    classes = torch.arange(logits[0].shape[-1])
    onehot = (targets[:, None] == classes).double()
    z = torch.cat(logits, -1).double()
    picked = sum((piece * onehot).sum(-1) for piece in logits)
    pieces = z.softmax(-1).chunk(len(logits), -1)
    return z.logsumexp(-1) - picked, [p - onehot for p in pieces]


def summed(logits, targets):
    losses, gradients = vocabulary_loss(logits, targets)
    return losses.sum(), gradients


def wrapped_targets(logits, targets):
    _, gradients = vocabulary_loss(logits, targets)
    width = logits[0].shape[-1]
    picked = sum(z.double().gather(-1, (targets % width)[:, None]) for z in logits)
    lse = torch.cat(logits, -1).double().logsumexp(-1)
    return lse - torch.as_tensor(picked)[:, 0], gradients


def averaged(logits, targets):
    losses, gradients = vocabulary_loss(logits, targets)
    return losses, [g / len(losses) for g in gradients]


def joined(logits, targets):
    losses, gradients = vocabulary_loss(logits, targets)
    return losses, torch.cat(gradients, -1)


def each_alone(xs, gain, ups, downs, grads):
    ranks = [
        sequence_gradients([x], gain, [up], [down], [g])
        for x, up, down, g in zip(xs, ups, downs, grads, strict=True)
    ]
    return tuple([own[i][0] for own in ranks] for i in range(4))


def own_gain(xs, gain, ups, downs, grads):
    """Differentiate with one copy of the gain for each rank."""
    copies = [gain.clone().requires_grad_() for _ in xs]
    tokens = torch.cat([x * c for x, c in zip(xs, copies, strict=True)])
    shards = zip(ups, downs, strict=True)
    parts = [(tokens @ up).relu() @ down for up, down in shards]
    y = torch.stack(parts).sum(0)
    own = torch.autograd.grad(y, copies, torch.cat(grads))
    d_xs, _, *rest = sequence_gradients(xs, gain, ups, downs, grads)
    return (d_xs, list(own), *rest)


def with_own_tokens(xs, gain, ups, downs, grads):
    d_xs, d_gain, *_ = sequence_gradients(xs, gain, ups, downs, grads)
    return (d_xs, d_gain, *each_alone(xs, gain, ups, downs, grads)[2:])


def one_gain(*case):
    d_xs, d_gain, *rest = sequence_gradients(*case)
    return (d_xs, d_gain[0], *rest)


def all_tokens(*case):
    d_xs, *rest = sequence_gradients(*case)
    return ([torch.cat(d_xs)] * len(d_xs), *rest)


def without_gain(xs, gain, *rest):
    d_xs, *others = sequence_gradients(xs, gain, *rest)
    return ([d / gain for d in d_xs], *others)


def averaged_terms(*case):
    d_xs, d_gain, *rest = sequence_gradients(*case)
    return ([d / len(d_xs) for d in d_xs], [d / len(d_xs) for d in d_gain], *rest)


def forgotten_gain(xs, gain, *rest):
    d_xs, *others = sequence_gradients(xs, torch.ones_like(gain), *rest)
    return ([d * gain for d in d_xs], *others)


def gain_of_normed(xs, gain, *rest):
    d_xs, d_gain, *others = sequence_gradients(xs, gain, *rest)
    return (d_xs, [d * gain for d in d_gain], *others)


def rows_before_relu(xs, gain, ups, downs, grads):
    h, g = torch.cat(xs) * gain, torch.cat(grads)
    right = sequence_gradients(xs, gain, ups, downs, grads)
    return (*right[:3], [(h @ up).T @ g for up in ups])


WRONG = [
    ("vocabulary_loss", lambda logits, targets: logits, "returns its argument"),
    ("vocabulary_loss", own_softmax, "over all classes"),
    ("vocabulary_loss", without_maximum, "take something away"),
    ("vocabulary_loss", with_own_maxima, "the same number was taken away"),
    ("vocabulary_loss", sum_of_logs, "do not add up"),
    ("vocabulary_loss", lost_maximum, "given back"),
    ("vocabulary_loss", shifted_target, "has the logit of the target"),
    ("vocabulary_loss", local_numbers, "numbers of all classes"),
    ("vocabulary_loss", summed, "not their sum"),
    ("vocabulary_loss", wrapped_targets, "nothing to say"),
    ("vocabulary_loss", averaged, "not of the mean"),
    ("vocabulary_loss", joined, "a piece of the gradient"),
    ("sequence_gradients", lambda xs, *rest: xs, "returns its argument"),
    ("sequence_gradients", each_alone, "computed alone"),
    ("sequence_gradients", own_gain, "copies of one parameter"),
    ("sequence_gradients", with_own_tokens, "through the columns"),
    ("sequence_gradients", one_gain, "one for each"),
    ("sequence_gradients", all_tokens, "keeps its own tokens"),
    ("sequence_gradients", without_gain, "between x and the product"),
    ("sequence_gradients", averaged_terms, "added, not averaged"),
    ("sequence_gradients", forgotten_gain, "x or more"),
    ("sequence_gradients", gain_of_normed, "is the gain multiplied"),
    ("sequence_gradients", rows_before_relu, "into the rows"),
]


class TestLaws(ExerciseLaws):
    exercises, wrong = EXERCISES, WRONG


def test_each_exercise_has_a_right_answer():
    assert {name for name, _ in RIGHT} == set(EXERCISES)
