"""The checkers of parallelism/pipeline on schedules: right and wrong answers."""

import math
from itertools import combinations, pairwise
from typing import Any

import pytest

from labpkg import check
from labpkg.planning.schedules import one_f_one_b
from tests.check.laws import ExerciseLaws

EXERCISES: dict[str, Any] = {
    name: checker
    for name, checker in vars(check).items()
    if getattr(checker, "__module__", "") == "labpkg.check.pipeline_exercises"
}


def fewest_micro_batches(num_stages, max_bubble):
    """Solve the inequality, with whole numbers: all cases are multiples of 1/80."""
    q = round(80 * max_bubble)
    return max(1, -((num_stages - 1) * (q - 80) // q))


def measured(num_stages, max_bubble):
    """Ask the library, which simulates schedules of growing length."""
    M = 1
    while one_f_one_b(num_stages, M).bubble_fraction > max_bubble:
        M += 1
    return M


def searched(num_stages, max_bubble):
    """Try all numbers, with the formula that the schedules are tested against."""
    bubbles = ((num_stages - 1) / (M + num_stages - 1) for M in range(1, 1000))
    return 1 + next(i for i, bubble in enumerate(bubbles) if bubble <= max_bubble)


def peak_in_flight(actions):
    """Keep the set of micro-batches that are alive."""
    alive, sizes = set(), []
    for kind, m in ((action[0], action[1:]) for action in actions):
        if kind == "F":
            alive.add(m)
        if kind in "BW":
            alive.remove(m)
        sizes.append(len(alive))
    return max(sizes)


def one_f_one_b_order(stage, num_stages, num_micro_batches):
    actions = one_f_one_b(num_stages, num_micro_batches).ranks[stage]
    return [str(action).removeprefix(str(stage)) for action in actions]


def best_cut(costs, num_stages):
    """Try all cuts."""
    return min(
        max(sum(costs[a:b]) for a, b in pairwise((0, *inner, len(costs))))
        for inner in combinations(range(1, len(costs)), num_stages - 1)
    )


RIGHT = [
    ("fewest_micro_batches", fewest_micro_batches),
    ("fewest_micro_batches", searched),
    ("fewest_micro_batches", measured),
    ("peak_in_flight", peak_in_flight),
    ("one_f_one_b_order", one_f_one_b_order),
    ("one_f_one_b_order", lambda *case: tuple(one_f_one_b_order(*case))),
    ("best_cut", best_cut),
    ("best_cut", lambda *case: float(best_cut(*case))),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_pass(name, answer):
    result = EXERCISES[name](answer)
    assert result, result.message
    assert result.cases >= 8


def beside_work(num_stages, max_bubble):
    return max(1, math.ceil((num_stages - 1) / max_bubble))


def truncated(num_stages, max_bubble):
    return max(1, math.floor((num_stages - 1) / max_bubble - num_stages + 1))


def forwards(actions):
    return len([action for action in actions if action.startswith("F")])


def freed_by_i(actions):
    return peak_in_flight([a.replace("I", "B") for a in actions if a[0] != "W"])


def w_is_ignored(actions):
    alive = peak = 0
    for action in actions:
        alive += {"F": 1, "B": -1}.get(action[0], 0)
        peak = max(peak, alive)
    return peak


def freed_twice(actions):
    alive = peak = 0
    for action in actions:
        alive += 1 if action[0] == "F" else -1
        peak = max(peak, alive)
    return peak


def gpipe(stage, num_stages, num_micro_batches):
    return [f"{kind}{m}" for kind in "FB" for m in range(num_micro_batches)]


def by_turns(stage, num_stages, num_micro_batches):
    """Let every stage do what the last one does."""
    return [f"{kind}{m}" for m in range(num_micro_batches) for kind in "FB"]


def wrong_end(stage, num_stages, num_micro_batches):
    return one_f_one_b_order(num_stages - 1 - stage, num_stages, num_micro_batches)


def library_texts(stage, num_stages, num_micro_batches):
    return [
        str(action)
        for action in one_f_one_b(num_stages, num_micro_batches).ranks[stage]
    ]


def first_stage(stage, num_stages, num_micro_batches):
    return one_f_one_b_order(0, num_stages, num_micro_batches)


def backward_too_soon(stage, num_stages, num_micro_batches):
    ahead = min(num_stages - stage - 1, num_micro_batches)
    order = [f"F{m}" for m in range(ahead)]
    for m in range(num_micro_batches):
        order.append(f"B{m}")
        order += [f"F{ahead + m}"] * (ahead + m < num_micro_batches)
    return order


def no_drain(stage, num_stages, num_micro_batches):
    order = one_f_one_b_order(stage, num_stages, num_micro_batches)
    return order[: 2 + max(i for i, action in enumerate(order) if action[0] == "F")]


def thirds(costs, num_stages):
    """Cut into stages of equally many layers."""
    sizes = [
        len(costs) // num_stages + (s < len(costs) % num_stages)
        for s in range(num_stages)
    ]
    rest, slowest = list(costs), 0
    for size in sizes:
        slowest, rest = max(slowest, sum(rest[:size])), rest[size:]
    return slowest


WRONG = [
    ("fewest_micro_batches", lambda P, bubble: P, "returns its argument"),
    ("fewest_micro_batches", beside_work, "a share of all time"),
    ("fewest_micro_batches", truncated, "round up"),
    (
        "fewest_micro_batches",
        lambda P, bubble: fewest_micro_batches(P + 1, bubble),
        "fills in fewer steps",
    ),
    (
        "fewest_micro_batches",
        lambda P, bubble: fewest_micro_batches(P, 1 - bubble),
        "not of work",
    ),
    (
        "fewest_micro_batches",
        lambda P, bubble: 0 if P == 1 else fewest_micro_batches(P, bubble),
        "at least one micro-batch",
    ),
    ("fewest_micro_batches", lambda P, bubble: 1000, "of your M and of M - 1"),
    ("peak_in_flight", lambda actions: actions, "returns its argument"),
    ("peak_in_flight", forwards, "gives the memory back"),
    ("peak_in_flight", freed_by_i, "W needs the activations too"),
    ("peak_in_flight", freed_twice, "two halves of one backward"),
    ("peak_in_flight", w_is_ignored, "W ends it"),
    ("peak_in_flight", lambda actions: 0, "what is left in the end"),
    ("one_f_one_b_order", lambda stage, *sizes: stage, "returns its argument"),
    ("one_f_one_b_order", gpipe, "this is GPipe"),
    ("one_f_one_b_order", wrong_end, "the longest way to the loss"),
    ("one_f_one_b_order", by_turns, "nothing to do meanwhile"),
    ("one_f_one_b_order", first_stage, "a shorter warm-up"),
    ("one_f_one_b_order", backward_too_soon, "one too short"),
    ("one_f_one_b_order", no_drain, "never come back"),
    ("one_f_one_b_order", library_texts, "leave the stage away"),
    ("best_cut", lambda costs, P: costs, "returns its argument"),
    ("best_cut", lambda costs, P: sum(costs), "all layers together"),
    ("best_cut", lambda costs, P: sum(costs) / P, "cannot be cut"),
    ("best_cut", lambda costs, P: math.ceil(sum(costs) / P), "rounded up"),
    ("best_cut", thirds, "no equal times"),
    ("best_cut", lambda costs, P: max(costs), "longer than each"),
]


class TestLaws(ExerciseLaws):
    exercises, wrong = EXERCISES, WRONG


def test_each_exercise_has_a_right_answer():
    assert {name for name, _ in RIGHT} == set(EXERCISES)
