import itertools
import math
from typing import Any

import pytest
import torch

from labpkg import check
from labpkg.check import planner_exercises
from tests.check.laws import ExerciseLaws

EXERCISES: dict[str, Any] = {
    name: checker
    for name, checker in vars(planner_exercises).items()
    if not name.startswith("_")
    and getattr(checker, "__module__", "") == planner_exercises.__name__
}


# ---- right answers, written otherwise than the references ---------------------------


def first_fit(elements, layer_elements, activation_bytes, memory_bytes, n):
    left = memory_bytes - activation_bytes
    if elements * 16 <= left:
        return "replicas"
    if elements * (4 + 12 / n) <= left:
        return "zero1"
    if elements * (2 + 14 / n) <= left:
        return "zero2"
    return "zero3" if elements * 16 / n + 4 * layer_elements <= left else CUT


CUT = "cut the layers"


def most_replicas(tokens, gradient_bytes, flops_per_s, bytes_per_s):
    def hides(n):
        backward_s = 4 * tokens / n / flops_per_s
        return backward_s >= 2 * (n - 1) / n * gradient_bytes / bytes_per_s * (1 - 1e-9)

    return next(n for n in itertools.count(1) if not hides(n + 1))


def pareto_front(plans):
    found = []
    for i, (seconds, size) in enumerate(plans):
        faster = [s for t, s in plans if t < seconds]
        as_fast = [s for t, s in plans if t == seconds]
        if size == min(as_fast) and size < min(faster, default=math.inf):
            found.append(i)
    return found


def plan_regret(predicted, measured):
    pairs = [(p or 0.0, m or 0.0) for p, m in zip(predicted, measured, strict=True)]
    return 1 - max(pairs)[1] / max(m for _, m in pairs)


def rank_correlation(predicted, measured):
    columns = []
    for values in (predicted, measured):
        v = torch.tensor(values).double()
        above = (v[:, None] > v).sum(1) - (v[:, None] < v).sum(1)
        columns.append(above.double())
    return torch.corrcoef(torch.stack(columns))[0, 1].item()


ANSWERS = [first_fit, most_replicas, pareto_front, plan_regret, rank_correlation]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.__name__)
def test_right_answers_pass(answer):
    assert set(EXERCISES) == {answer.__name__ for answer in ANSWERS}
    assert getattr(check, answer.__name__)(answer)


WRONG = [
    ("first_fit", lambda elements, *rest: elements, "returns its argument"),
    (
        "first_fit",
        lambda elements, layer, activations, memory, n: first_fit(
            elements, layer, 0, memory, n
        ),
        "activations take memory",
    ),
    (
        "first_fit",
        lambda elements, layer, activations, memory, n: first_fit(
            elements, 0, activations, memory, n
        ),
        "gathers a layer",
    ),
    (
        "first_fit",
        lambda elements, layer, activations, memory, n: (
            "zero3" if elements * 16 / n + 4 * layer + activations <= memory else CUT
        ),
        "first rung that fits",
    ),
    ("most_replicas", lambda tokens, *rest: tokens, "returns its argument"),
    (
        "most_replicas",
        lambda tokens, size, flops, speed: most_replicas(
            1.5 * tokens, size, flops, speed
        ),
        "backward takes 4",
    ),
    (
        "most_replicas",
        lambda tokens, size, flops, speed: most_replicas(
            2 * tokens, size, flops, speed
        ),
        "and its way back",
    ),
    (
        "most_replicas",
        lambda tokens, size, flops, speed: max(
            1, int(2 * tokens * speed / (size * flops))
        ),
        "n - 1 that has a bound",
    ),
    ("pareto_front", lambda plans: plans, "returns its argument"),
    (
        "pareto_front",
        lambda plans: [min(range(len(plans)), key=plans.__getitem__)] if plans else [],
        "the fastest plan is not all",
    ),
    (
        "pareto_front",
        lambda plans: [plans[i] for i in pareto_front(plans)],
        "return indices",
    ),
    (
        "pareto_front",
        lambda plans: [
            i
            for i, (t, s) in enumerate(plans)
            if not any(u < t and v < s for u, v in plans)
        ],
        "less or equal on both",
    ),
    ("plan_regret", lambda predicted, measured: predicted, "returns its argument"),
    (
        "plan_regret",
        lambda predicted, measured: plan_regret(measured, predicted),
        "not the reverse",
    ),
    (
        "plan_regret",
        lambda predicted, measured: 1 - plan_regret(predicted, measured),
        "what is lost",
    ),
    (
        "plan_regret",
        lambda predicted, measured: plan_regret(
            [p and m and p for p, m in zip(predicted, measured, strict=True)], measured
        ),
        "all is lost",
    ),
    ("rank_correlation", lambda predicted, measured: measured, "returns its argument"),
    (
        "rank_correlation",
        lambda *columns: torch.corrcoef(torch.tensor(columns))[0, 1],
        "correlate the ranks",
    ),
    (
        "rank_correlation",
        lambda *columns: torch.corrcoef(
            torch.tensor(columns).argsort(stable=True).argsort().double()
        )[0, 1],
        "share the mean",
    ),
    (
        "rank_correlation",
        lambda *columns: -rank_correlation(*columns),
        "change the sign",
    ),
]


class TestPlanner(ExerciseLaws):
    exercises = EXERCISES
    wrong = WRONG
