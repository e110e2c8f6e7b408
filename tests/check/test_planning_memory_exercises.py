"""The checkers of planning/memory: right and wrong answers."""

from itertools import pairwise
from typing import Any

import pytest

from labpkg import check
from labpkg.planning.schedules import gpipe, one_f_one_b
from tests.check.laws import ExerciseLaws

EXERCISES: dict[str, Any] = {
    name: checker
    for name, checker in vars(check).items()
    if getattr(checker, "__module__", "") == "labpkg.check.planning_memory_exercises"
}


def peak_of_lifetimes(lifetimes):
    """Walk through births and deaths in order of time, births first."""
    changes = [(first, 0, size) for first, _, size in lifetimes]
    changes += [(last, 1, -size) for _, last, size in lifetimes]
    total = peak = 0
    for _, _, change in sorted(changes):
        total += change
        peak = max(peak, total)
    return peak


def largest_micro_batch(memory, state, per_sequence, num_sequences):
    for size in range(num_sequences, 0, -1):
        if num_sequences % size == 0 and state + size * per_sequence <= memory:
            return size
    return 0


def best_interval(num_layers, block, entry):
    """Count what is alive while each piece is computed again."""
    peaks = {}
    for k in range(1, num_layers + 1):
        starts = [*range(0, num_layers, k), num_layers]
        blocks = max(stop - start for start, stop in pairwise(starts))
        peaks[k] = entry * (len(starts) - 1) + block * blocks
    return min(peaks, key=lambda k: (peaks[k], k))


def peaks_of(schedule, states, activations):
    kept = zip(schedule.peak_in_flight, states, activations, strict=True)
    return [state + num * size for num, state, size in kept]


def stage_bytes(states, activations, num_micro_batches):
    schedule = one_f_one_b(len(states), num_micro_batches)
    return peaks_of(schedule, states, activations)


def logit_pieces(num_tokens, vocab_size, itemsize, memory):
    for pieces in range(1, num_tokens + 1):
        if 2 * -(-num_tokens // pieces) * vocab_size * itemsize <= memory:
            return pieces
    return 0


RIGHT = [
    ("peak_of_lifetimes", peak_of_lifetimes),
    ("largest_micro_batch", largest_micro_batch),
    ("best_interval", best_interval),
    ("stage_bytes", stage_bytes),
    ("stage_bytes", lambda *case: tuple(stage_bytes(*case))),
    ("logit_pieces", logit_pieces),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_pass(name, answer):
    result = EXERCISES[name](answer)
    assert result, result.message
    assert result.cases >= 8


def deaths_first(lifetimes):
    changes = [(first, 1, size) for first, _, size in lifetimes]
    changes += [(last, 0, -size) for _, last, size in lifetimes]
    total = peak = 0
    for _, _, change in sorted(changes):
        total += change
        peak = max(peak, total)
    return peak


def as_gpipe(states, activations, num_micro_batches):
    schedule = gpipe(len(states), num_micro_batches)
    return peaks_of(schedule, states, activations)


def first_and_last_swapped(states, activations, num_micro_batches):
    kept = one_f_one_b(len(states), num_micro_batches).peak_in_flight[::-1]
    parts = zip(kept, states, activations, strict=True)
    return [state + num * size for num, state, size in parts]


WRONG = [
    ("peak_of_lifetimes", lambda lifetimes: lifetimes, "returns its argument"),
    (
        "peak_of_lifetimes",
        lambda lifetimes: sum(size for *_, size in lifetimes),
        "some die before",
    ),
    ("peak_of_lifetimes", deaths_first, "during its last operation"),
    (
        "peak_of_lifetimes",
        lambda lifetimes: max((size for *_, size in lifetimes), default=0),
        "the largest tensor",
    ),
    (
        "peak_of_lifetimes",
        lambda lifetimes: peak_of_lifetimes([(a, b, 1) for a, b, _ in lifetimes]),
        "add their bytes",
    ),
    ("largest_micro_batch", lambda memory, *_: memory, "returns its argument"),
    (
        "largest_micro_batch",
        lambda memory, state, per, num: max(0, min(num, (memory - state) // per)),
        "divides num_sequences",
    ),
    (
        "largest_micro_batch",
        lambda memory, state, *rest: largest_micro_batch(memory, 0, *rest),
        "in the same memory",
    ),
    (
        "largest_micro_batch",
        lambda memory, *rest: largest_micro_batch(memory - 1, *rest),
        "may be full",
    ),
    ("largest_micro_batch", lambda *c: max(1, largest_micro_batch(*c)), "return 0"),
    (
        "largest_micro_batch",
        lambda *case: case[3] // max(1, largest_micro_batch(*case)),
        "number of micro-batches",
    ),
    ("best_interval", lambda num_layers, *_: num_layers, "returns its argument"),
    (
        "best_interval",
        lambda L, block, entry: -(-L // best_interval(L, block, entry)),
        "the number of pieces; return",
    ),
    (
        "best_interval",
        lambda L, block, entry: min(L, max(1, round((L * entry / block) ** 0.5))),
        "compare the whole numbers",
    ),
    ("best_interval", lambda L, *_: round(L**0.5), "only where both are equal"),
    ("best_interval", lambda L, a, b: best_interval(L, b, a), "changed places"),
    (
        "best_interval",
        lambda L, block, entry: min(
            -(-L // k) * entry + k * block for k in range(1, L + 1)
        ),
        "the smallest peak",
    ),
    ("best_interval", lambda *_: 1, "but all the entries"),
    ("stage_bytes", lambda states, *_: states, "returns its argument"),
    ("stage_bytes", as_gpipe, "does not keep all M"),
    (
        "stage_bytes",
        lambda states, kept, M: stage_bytes(states, kept, len(states)),
        "no more micro-batches",
    ),
    ("stage_bytes", first_and_last_swapped, "keeps the most"),
    (
        "stage_bytes",
        lambda states, kept, M: [
            peak - size
            for peak, size in zip(stage_bytes(states, kept, M), kept, strict=True)
        ],
        "P - s, not P - s - 1",
    ),
    (
        "stage_bytes",
        lambda states, kept, M: stage_bytes([0] * len(kept), kept, M),
        "states are missing",
    ),
    ("stage_bytes", lambda *case: max(stage_bytes(*case)), "one number for each"),
    ("logit_pieces", lambda num_tokens, *_: num_tokens, "returns its argument"),
    (
        "logit_pieces",
        lambda tokens, vocab, itemsize, memory: logit_pieces(
            tokens, vocab, itemsize, 2 * memory
        ),
        "as large as they are",
    ),
    (
        "logit_pieces",
        lambda tokens, vocab, itemsize, memory: (
            -(-2 * tokens * vocab * itemsize // memory)
        ),
        "not divided",
    ),
    (
        "logit_pieces",
        lambda tokens, vocab, itemsize, memory: 2 * tokens * vocab * itemsize // memory,
        "round up",
    ),
    ("logit_pieces", lambda *c: logit_pieces(*c) or c[0], "does not fit"),
    (
        "logit_pieces",
        lambda tokens, vocab, itemsize, memory: memory // (2 * vocab * itemsize),
        "tokens of a piece",
    ),
]


class TestLaws(ExerciseLaws):
    exercises, wrong = EXERCISES, WRONG


def test_each_exercise_has_a_right_answer():
    assert {name for name, _ in RIGHT} == set(EXERCISES)
