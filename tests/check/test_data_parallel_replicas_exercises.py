"""The checkers on replicas accept right answers and name mistakes."""

from collections import Counter
from typing import Any

import pytest
import torch

from labpkg import check
from tests.check.laws import ExerciseLaws

MODULE = "labpkg.check.data_parallel_replicas_exercises"
EXERCISES: dict[str, Any] = {
    name: checker
    for name, checker in vars(check).items()
    if getattr(checker, "__module__", "") == MODULE
}


def some(gradients):
    columns = zip(*gradients, strict=True)
    return [[g for g in column if g is not None] for column in columns]


def mean_of_used(gradients):
    n = len(gradients)
    return [sum(g / n for g in there) if there else None for there in some(gradients)]


def by_users(gradients):
    return [sum(g) / len(g) if g else None for g in some(gradients)]


def zeros_for_unused(gradients):
    return [sum(g) / len(gradients) for g in some(gradients)]


def only_if_all(gradients):
    n = len(gradients)
    return [sum(g) / n if len(g) == n else None for g in some(gradients)]


def in_place_mean(gradients):
    for of_ranks in zip(*gradients, strict=True):
        for g in of_ranks:
            if g is not None:
                g /= len(gradients)
    return [sum(g) if g else None for g in some(gradients)]


def first_drift(hashes):
    columns = [[own[i] for own in hashes] for i in range(len(hashes[0]))]
    for i, column in enumerate(columns):
        if len(set(column)) > 1:
            most = max(map(column.count, column))
            usual = {h for h in column if column.count(h) == most}
            alone = len(usual) == 1
            return i, [r for r, h in enumerate(column) if not alone or h not in usual]
    return None


def trusting(hashes):
    for i, column in enumerate(zip(*hashes, strict=True)):
        usual = max(column, key=column.count)
        if len(set(column)) > 1:
            return i, [rank for rank, h in enumerate(column) if h != usual]
    return None


def against_rank_0(hashes):
    for i, column in enumerate(zip(*hashes, strict=True)):
        others = [rank for rank, h in enumerate(column) if h != column[0]]
        if others:
            return i, others
    return None


def backwards(hashes):
    found = first_drift([own[::-1] for own in hashes])
    return (len(hashes[0]) - 1 - found[0], found[1]) if found else None


def whole_models(hashes):
    models = [tuple(own) for own in hashes]
    usual = Counter(models).most_common(1)[0][0]
    found = first_drift(hashes)
    ranks = [rank for rank, model in enumerate(models) if model != usual]
    return (found[0], ranks) if found else None


def strict(hashes):
    for i, column in enumerate(zip(*hashes, strict=True)):
        usual = max(column, key=column.count)
        others = [rank for rank, h in enumerate(column) if h != usual]
        if others:
            sure = column.count(usual) > len(column) / 2
            return i, others if sure else list(range(len(column)))
    return None


def agreeing(hashes):
    found = first_drift(hashes)
    if found is not None:
        return found[0], [r for r in range(len(hashes)) if r not in found[1]]
    return None


def local_sgd(curvature, target, lr, H, num_steps):
    replicas = [torch.zeros_like(t) for t in target]
    for step in range(num_steps):
        for r, t in enumerate(replicas):
            replicas[r] = t - lr * curvature[r] * (t - target[r])
        if step % H == H - 1:
            replicas = [sum(replicas) / len(replicas) for _ in replicas]
    return torch.stack(replicas)


def early(curvature, target, lr, H, num_steps):
    t = torch.zeros_like(target)
    for step in range(num_steps):
        t = t - lr * curvature * (t - target)
        if step % H == 0:
            t = t.mean(0, keepdim=True).expand_as(t)
    return t


def from_rank_0(curvature, target, lr, H, num_steps):
    t = torch.zeros_like(target)
    for step in range(1, num_steps + 1):
        t = t - lr * curvature * (t - target)
        if step % H == 0:
            t = t[0].expand_as(t)
    return t


def averaged(answer):
    return lambda *args: answer(*args).mean(0).expand_as(args[0])


def never(curvature, target, lr, H, num_steps):
    return local_sgd(curvature, target, lr, num_steps + 1, num_steps)


RIGHT = [
    ("mean_of_used", mean_of_used),
    ("mean_of_used", lambda g: tuple(mean_of_used(g))),
    ("first_drift", first_drift),
    ("local_sgd", local_sgd),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_pass(name, answer):
    result = EXERCISES[name](answer)
    assert result, result.message
    assert result.cases >= 8


WRONG = [
    ("mean_of_used", lambda g: g, "returns its argument"),
    ("mean_of_used", by_users, "not of those that used it"),
    ("mean_of_used", zeros_for_unused, "weight decay"),
    ("mean_of_used", only_if_all, "None only if nobody did"),
    ("mean_of_used", lambda g: g[0], "the gradients of rank 0"),
    (
        "mean_of_used",
        lambda g: [sum(there) if there else None for there in some(g)],
        "this is the sum",
    ),
    ("mean_of_used", in_place_mean, "changes its argument gradients"),
    ("first_drift", lambda h: h, "returns its argument"),
    ("first_drift", against_rank_0, "rank 0 may be the one"),
    ("first_drift", trusting, "nobody knows who is right"),
    ("first_drift", backwards, "not the last"),
    ("first_drift", strict, "more than half"),
    ("first_drift", whole_models, "in this first tensor"),
    ("first_drift", lambda h: first_drift(h) or (0, []), "return None if all"),
    ("first_drift", agreeing, "return the others"),
    ("local_sgd", lambda c, a, lr, H, n: a, "returns its argument"),
    ("local_sgd", lambda c, a, lr, H, n: local_sgd(c, a, lr, 1, n), "every step"),
    ("local_sgd", early, "not after the first one"),
    ("local_sgd", never, "never meet"),
    ("local_sgd", averaged(never), "once, at the end"),
    ("local_sgd", averaged(local_sgd), "there is no meeting at the end"),
    ("local_sgd", from_rank_0, "not the parameters of rank 0"),
    ("local_sgd", lambda *args: local_sgd(*args)[0], "return the parameters of all"),
]


class TestLaws(ExerciseLaws):
    exercises, wrong = EXERCISES, WRONG


def test_each_exercise_has_a_right_answer():
    assert {name for name, _ in RIGHT} == set(EXERCISES)
