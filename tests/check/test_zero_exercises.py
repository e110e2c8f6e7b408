"""The checkers of parallelism/zero on memory and owners: right and wrong answers."""

import math
from itertools import accumulate
from typing import Any

import pytest

from labpkg import check
from labpkg.planning import cost
from tests.check.laws import ExerciseLaws

EXERCISES: dict[str, Any] = {
    name: checker
    for name, checker in vars(check).items()
    if getattr(checker, "__module__", "") == "labpkg.check.zero_exercises"
}


def zero_memory(num_elements, stage, n):
    return cost.model_state_bytes(num_elements, stage=stage, n=n)


def owned_ranges(sizes, n, rank):
    """Count the elements one by one."""
    length = math.ceil(sum(sizes) / n)
    offsets = [0, *accumulate(sizes)]
    ranges = []
    for size, offset in zip(sizes, offsets, strict=False):
        own = [i for i in range(size) if (offset + i) // length == rank]
        ranges.append((own[0], own[-1] + 1) if own else (0, 0))
    return ranges


def fewest_ranks(num_elements, stage, memory_bytes):
    """Search from below; 2**20 ranks are more than any case needs."""
    sizes: dict[str, Any] = {
        "weight_bytes": 2,
        "gradient_bytes": 2,
        "optimizer_bytes": 12,
    }
    for n in [*range(1, 5000), 2**20]:
        held = cost.model_state_bytes(num_elements, stage=stage, n=n, **sizes)
        if held <= memory_bytes:
            return n
    return -1


RIGHT = [
    ("zero_memory", zero_memory),
    ("owned_ranges", owned_ranges),
    ("owned_ranges", lambda *case: list(map(list, owned_ranges(*case)))),
    ("fewest_ranks", fewest_ranks),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_pass(name, answer):
    result = EXERCISES[name](answer)
    assert result, result.message
    assert result.cases >= 8


def one_moment(num_elements, stage, n):
    return cost.model_state_bytes(num_elements, stage=stage, n=n, optimizer_bytes=4)


def no_gradient(num_elements, stage, n):
    return cost.model_state_bytes(num_elements, stage=stage, n=n, gradient_bytes=0)


def floored(sizes, n, rank):
    kept = sum(sizes) // n * n
    cut = [min(size, max(kept - sum(sizes[:i]), 0)) for i, size in enumerate(sizes)]
    return owned_ranges(cut, n, rank)


def each_cut(sizes, n, rank):
    return [owned_ranges([size], n, rank)[0] if size else (0, 0) for size in sizes]


def in_bucket(sizes, n, rank):
    length = math.ceil(sum(sizes) / n)
    found, offset = [], 0
    for size in sizes:
        start = max(offset, rank * length)
        stop = min(offset + size, (rank + 1) * length)
        found.append((start, stop) if start < stop else (0, 0))
        offset += size
    return found


def beyond(sizes, n, rank):
    length = math.ceil(sum(sizes) / n)
    offsets = [0, *accumulate(sizes)][:-1]
    first, last = rank * length, (rank + 1) * length
    return [(max(first - at, 0), max(last - at, 0)) for at in offsets]


WRONG = [
    ("zero_memory", lambda K, stage, n: K, "returns its argument"),
    ("zero_memory", lambda K, stage, n: 16 * K / n, "only stage 3"),
    (
        "zero_memory",
        lambda K, stage, n: zero_memory(K, min(stage + 1, 3), n),
        "one stage too far",
    ),
    (
        "zero_memory",
        lambda K, stage, n: zero_memory(K, max(stage - 1, 0), n),
        "one stage too few",
    ),
    ("zero_memory", one_moment, "two numbers for each element"),
    ("zero_memory", no_gradient, "gradients are missing"),
    ("zero_memory", lambda *case: case[2] * zero_memory(*case), "ranks together"),
    ("zero_memory", lambda *case: zero_memory(*case) / 4, "these are elements"),
    ("owned_ranges", lambda sizes, n, rank: sizes, "returns its argument"),
    ("owned_ranges", floored, "round the length"),
    ("owned_ranges", each_cut, "not each parameter by itself"),
    ("owned_ranges", in_bucket, "not of the bucket"),
    ("owned_ranges", beyond, "ends with its parameter"),
    (
        "owned_ranges",
        lambda sizes, n, rank: owned_ranges(sizes, n, n - 1 - rank),
        "rank 0 owns the front",
    ),
    (
        "owned_ranges",
        lambda *case: [(0, b - a) for a, b in owned_ranges(*case)],
        "where the slice of the rank before ended",
    ),
    ("fewest_ranks", lambda K, stage, memory: K, "returns its argument"),
    ("fewest_ranks", lambda K, stage, memory: -(-16 * K // memory), "everything"),
    (
        "fewest_ranks",
        lambda *case: max(1, fewest_ranks(*case)),
        "some stages never fit",
    ),
    (
        "fewest_ranks",
        lambda *case: (
            2 ** math.ceil(math.log2(n)) if (n := fewest_ranks(*case)) > 0 else n
        ),
        "not only powers of two",
    ),
    (
        "fewest_ranks",
        lambda K, stage, memory: fewest_ranks(K, min(3, stage + 1), memory),
        "12 of the 16",
    ),
]


class TestLaws(ExerciseLaws):
    exercises, wrong = EXERCISES, WRONG


def test_each_exercise_has_a_right_answer():
    assert {name for name, _ in RIGHT} == set(EXERCISES)
