"""The checkers of parallelism/zero on memory and owners: right and wrong answers."""

import math
from itertools import accumulate
from typing import Any

import pytest
import torch

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
    """Let torch cut a vector in which each element knows its place."""
    places = [(i, k) for i, size in enumerate(sizes) for k in range(size)]
    own = torch.arange(len(places)).tensor_split(n)[rank].tolist()
    ranges = []
    for i in range(len(sizes)):
        mine = [places[at][1] for at in own if places[at][0] == i]
        ranges.append((mine[0], mine[-1] + 1) if mine else (0, 0))
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
    length = sum(sizes) // n
    return between(sizes, rank * length, (rank + 1) * length)


def rounded_up(sizes, n, rank):
    length = math.ceil(sum(sizes) / n)
    return between(sizes, rank * length, (rank + 1) * length)


def between(sizes, first, last, clamp=True):
    ranges = []
    for size, offset in zip(sizes, accumulate([0, *sizes]), strict=False):
        start, stop = max(first - offset, 0), max(last - offset, 0)
        if clamp:
            start, stop = min(start, size), min(stop, size)
        ranges.append((start, stop) if start < stop or not clamp else (0, 0))
    return ranges


def each_cut(sizes, n, rank):
    return [owned_ranges([size], n, rank)[0] for size in sizes]


def in_bucket(sizes, n, rank):
    found = []
    offsets = accumulate([0, *sizes])
    for (a, b), offset in zip(owned_ranges(sizes, n, rank), offsets, strict=False):
        found.append((a + offset, b + offset) if a < b else (0, 0))
    return found


def beyond(sizes, n, rank):
    own = torch.arange(sum(sizes)).tensor_split(n)[rank].tolist()
    first = own[0] if own else sum(sizes)
    return between(sizes, first, first + len(own), clamp=False)


def clamped_once(sizes, n, rank):
    own = torch.arange(sum(sizes)).tensor_split(n)[rank].tolist()
    first = own[0] if own else sum(sizes)
    offsets = list(accumulate([0, *sizes]))[:-1]
    return [
        (max(first - offset, 0), min(first + len(own) - offset, size))
        for offset, size in zip(offsets, sizes, strict=True)
    ]


def last_are_longer(sizes, n, rank):
    lengths = sorted(map(len, torch.arange(sum(sizes)).tensor_split(n)))
    first = sum(lengths[:rank])
    return between(sizes, first, first + lengths[rank])


def never_full(num_elements, stage, memory_bytes):
    whole = num_elements * (16, 4, 2, 0)[stage]
    if memory_bytes <= whole:
        return -1
    return fewest_ranks(num_elements, stage, memory_bytes)


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
    ("owned_ranges", floored, "have no owner"),
    ("owned_ranges", rounded_up, "rounded up"),
    ("owned_ranges", each_cut, "not each parameter by itself"),
    ("owned_ranges", in_bucket, "not of the bucket"),
    ("owned_ranges", beyond, "ends with its parameter"),
    ("owned_ranges", clamped_once, "before its start"),
    ("owned_ranges", last_are_longer, "not the last"),
    ("fewest_ranks", lambda K, s, m: fewest_ranks(K, s, m - 1), "may be full"),
    ("fewest_ranks", never_full, "nothing is divided"),
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
