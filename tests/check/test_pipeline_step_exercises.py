"""The checkers of parallelism/pipeline on a whole step: right and wrong answers."""

import math
from typing import Any

import pytest
import torch

from labpkg import check
from labpkg.planning.actions import Action, Schedule
from labpkg.planning.simulator import StageCost, simulate
from tests.check.laws import ExerciseLaws

EXERCISES: dict[str, Any] = {
    name: checker
    for name, checker in vars(check).items()
    if getattr(checker, "__module__", "") == "labpkg.check.pipeline_step_exercises"
}


def micro_batch_gradients(x, y, weights, num_micro_batches, *, weight=None, cut=False):
    """Let autograd do the work, stage by stage, and send what it finds."""
    weight = 1 / num_micro_batches if weight is None else weight
    weights = [W.clone().requires_grad_() for W in weights]
    pieces = zip(x.chunk(num_micro_batches), y.chunk(num_micro_batches), strict=True)
    for h, target in pieces:
        received, sent = [], []
        for W in weights:
            received.append(h.detach().requires_grad_())
            h = torch.tanh(received[-1] @ W)
            sent.append(h)
        sent[-1] = weight * 0.5 * ((h - target) ** 2).sum(-1).mean()
        delta = None
        for h, out in zip(reversed(received), reversed(sent), strict=True):
            out.backward(delta)
            delta = torch.zeros_like(h) if cut else h.grad
    return [W.grad for W in weights]


def whole(x, y, weights, num_micro_batches):
    return micro_batch_gradients(x, y, weights, 1)


def step_time(orders, forward_s, backward_s, transfer_s):
    """Let the library simulate the orders, if they make a schedule."""
    try:
        schedule = Schedule(
            [Action.parse(f"{stage}{action}") for action in order]
            for stage, order in enumerate(orders)
        )
    except ValueError:
        return math.inf
    times = {"forward_s": forward_s, "backward_s": backward_s}
    cost = StageCost(**times, transfer_s=transfer_s)
    return simulate(schedule, cost).makespan_s


RIGHT = [
    ("micro_batch_gradients", micro_batch_gradients),
    ("micro_batch_gradients", whole),
    ("step_time", step_time),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_pass(name, answer):
    result = EXERCISES[name](answer)
    assert result, result.message
    assert result.cases >= 6


def not_averaged(*case):
    return micro_batch_gradients(*case, weight=1.0)


def detached(*case):
    return micro_batch_gradients(*case, cut=True)


def last_only(x, y, weights, num_micro_batches):
    start = len(x) - len(x) // num_micro_batches
    return micro_batch_gradients(x[start:], y[start:], weights, 1)


def of_the_sum(x, y, weights, num_micro_batches):
    grads = micro_batch_gradients(x, y, weights, num_micro_batches)
    return [len(x) * g for g in grads]


def work(orders, forward_s, backward_s, transfer_s):
    flat = [action for order in orders for action in order]
    return sum(forward_s if action[0] == "F" else backward_s for action in flat)


def never_infinite(*case):
    time_s = step_time(*case)
    return 0.0 if time_s == math.inf else time_s


WRONG = [
    ("micro_batch_gradients", lambda x, *rest: x, "returns its argument"),
    ("micro_batch_gradients", not_averaged, "each of them counts 1 / M"),
    ("micro_batch_gradients", detached, "get nothing"),
    ("micro_batch_gradients", last_only, "only the last micro-batch"),
    ("micro_batch_gradients", of_the_sum, "of the sum over samples"),
    (
        "micro_batch_gradients",
        lambda *case: [g.T for g in micro_batch_gradients(*case)],
        "transposed",
    ),
    (
        "micro_batch_gradients",
        lambda *case: [-g for g in micro_batch_gradients(*case)],
        "the sign",
    ),
    (
        "micro_batch_gradients",
        lambda *case: [2 * g for g in micro_batch_gradients(*case)],
        "half of the squared distance",
    ),
    (
        "micro_batch_gradients",
        lambda *case: [7 * g for g in micro_batch_gradients(*case)],
        "keep the input and the output",
    ),
    ("step_time", lambda orders, *times: orders, "returns its argument"),
    ("step_time", work, "not the sum"),
    ("step_time", lambda *case: work(*case) / len(case[0]), "also waits"),
    ("step_time", lambda orders, f, b, t: step_time(orders, f, b, 0.0), "on its way"),
    ("step_time", never_infinite, "end at infinity"),
]


class TestLaws(ExerciseLaws):
    exercises, wrong = EXERCISES, WRONG


def test_each_exercise_has_a_right_answer():
    assert {name for name, _ in RIGHT} == set(EXERCISES)
