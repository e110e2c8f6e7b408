import math
from typing import Any

import pytest
import torch

import labpkg as lab
from labpkg import check
from labpkg.check import checkpointing_exercises
from labpkg.processes.rectangles import boxes_of_range
from tests.check.laws import ExerciseLaws

EXERCISES: dict[str, Any] = {
    name: checker
    for name, checker in vars(checkpointing_exercises).items()
    if not name.startswith("_")
    and getattr(checker, "__module__", "") == checkpointing_exercises.__name__
}


# ---- right answers, written otherwise than the references ---------------------------


def overlap(first, second):
    shared, offsets = [], []
    for a, n, b, m in zip(*first, *second, strict=True):
        both = set(range(a, a + n)) & set(range(b, b + m))
        shared.append(len(both))
        offsets.append(min(both, default=0))
    return None if 0 in shared else [offsets, shared]


def range_boxes(num_columns, start, stop):
    rows = -(-stop // num_columns)
    boxes = boxes_of_range((rows, num_columns), start, stop)
    return [[list(offsets), list(sizes)] for offsets, sizes in boxes]


def lost_way(velocity, lr, momentum, num_steps):
    ends = []
    for buffer in (velocity.clone(), torch.zeros_like(velocity)):
        p = torch.nn.Parameter(torch.zeros_like(velocity))
        sgd = lab.SGD([p], lr=lr, momentum=momentum)
        if momentum:
            sgd.state[p]["momentum_buffer"] = buffer
        for _ in range(num_steps):
            p.grad = torch.ones_like(p)
            sgd.step()
        ends.append(p.detach())
    return ends[1] - ends[0]


def checkpoint_interval(save_s, node_mtbf_s, num_nodes):
    mtbf_s = node_mtbf_s / num_nodes
    waste = lambda t: save_s / t + t / (2 * mtbf_s)
    low, high = save_s * 1e-3, mtbf_s * 1e3
    for _ in range(200):  # ternary search in the logarithm
        a, b = low ** (2 / 3) * high ** (1 / 3), low ** (1 / 3) * high ** (2 / 3)
        low, high = (low, b) if waste(a) < waste(b) else (a, high)
    return low


def steps_to_remove(steps, is_valid, keep):
    removed, num_kept = [], 0
    for step, ok in sorted(zip(steps, is_valid, strict=True), reverse=True):
        if ok and num_kept < keep:
            num_kept += 1
        elif num_kept:
            removed.append(step)
    return removed[::-1]


ANSWERS = [overlap, range_boxes, lost_way, checkpoint_interval, steps_to_remove]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.__name__)
def test_right_answers_pass(answer):
    assert set(EXERCISES) == {answer.__name__ for answer in ANSWERS}
    assert getattr(check, answer.__name__)(answer)


WRONG = [
    ("overlap", lambda first, second: first, "returns its argument"),
    (
        "overlap",
        lambda first, second: (
            (found := overlap(first, second))
            and [found[0], [a + n for a, n in zip(*found, strict=True)]]
        ),
        "sizes, not ends",
    ),
    (
        "overlap",
        lambda first, second: overlap(first, second) or [[2, 0], [0, 2]],
        "touch share nothing",
    ),
    ("range_boxes", lambda columns, start, stop: columns, "returns its argument"),
    (
        "range_boxes",
        lambda columns, start, stop: [
            [[r, max(0, start - r * columns)], [1, w]]
            for r in range(start // columns, -(-stop // columns))
            for w in [min(stop, (r + 1) * columns) - max(start, r * columns)]
        ],
        "join whole rows",
    ),
    (
        "range_boxes",
        lambda columns, start, stop: [
            [[start // columns, 0], [-(-stop // columns) - start // columns, columns]]
        ],
        "begin and end inside a row",
    ),
    (
        "range_boxes",
        lambda *case: [box[::-1] for box in range_boxes(*case)],
        "not [sizes, offsets]",
    ),
    ("lost_way", lambda v, lr, mu, k: v, "returns its argument"),
    ("lost_way", lambda v, lr, mu, k: lr * mu * v, "the first step lacks"),
    ("lost_way", lambda v, lr, mu, k: lr * mu / (1 - mu) * v, "infinitely many"),
    (
        "lost_way",
        lambda v, lr, mu, k: lr * v * (1 - mu**k) / (1 - mu),
        "before the first step",
    ),
    ("lost_way", lambda *case: -lost_way(*case), "an update is subtracted"),
    ("checkpoint_interval", lambda save, mtbf, n: save, "returns its argument"),
    (
        "checkpoint_interval",
        lambda save, mtbf, n: checkpoint_interval(save, mtbf, 1),
        "fails n times as often",
    ),
    (
        "checkpoint_interval",
        lambda save, mtbf, n: math.sqrt(save * mtbf / n),
        "half an interval",
    ),
    (
        "checkpoint_interval",
        lambda save, mtbf, n: math.sqrt(2 * save * mtbf * n),
        "divide by their number",
    ),
    ("steps_to_remove", lambda steps, ok, keep: steps, "returns its argument"),
    (
        "steps_to_remove",
        lambda steps, ok, keep: sorted(steps)[:-keep],
        "count valid ones",
    ),
    (
        "steps_to_remove",
        lambda steps, ok, keep: sorted(
            set(steps) - set(steps_to_remove(steps, ok, keep))
        ),
        "the ones that stay",
    ),
    (
        "steps_to_remove",
        lambda steps, ok, keep: [
            s for s in steps_to_remove(steps, ok, keep) if ok[steps.index(s)]
        ],
        "go, too",
    ),
]


class TestCheckpointing(ExerciseLaws):
    exercises = EXERCISES
    wrong = WRONG
