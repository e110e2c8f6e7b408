"""The checkers of parallelism/data_parallel accept right answers and name mistakes."""

from typing import Any

import pytest
import torch

from labpkg import check
from tests.check.laws import ExerciseLaws

EXERCISES: dict[str, Any] = {
    name: checker
    for name, checker in vars(check).items()
    if getattr(checker, "__module__", "") == "labpkg.check.data_parallel_exercises"
}


def accumulated_gradient(gradients, counts):
    weights = counts.double() / counts.sum()
    return torch.einsum("rmd,rm->d", gradients.double(), weights)


def bucket_sizes(sizes, bucket_bytes):
    buckets = [[]]
    for size in sizes[::-1]:
        buckets[-1].append(size)
        if sum(buckets[-1]) >= bucket_bytes:
            buckets.append([])
    return [sum(bucket) for bucket in buckets if bucket]


def end_of_step(ready, durations):
    """From some bucket on, the link never waits; before it, it does not matter."""
    return max(ready[i] + sum(durations[i:]) for i in range(len(ready)))


RIGHT = [
    ("accumulated_gradient", accumulated_gradient),
    ("bucket_sizes", bucket_sizes),
    ("end_of_step", end_of_step),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_pass(name, answer):
    result = EXERCISES[name](answer)
    assert result, result.message
    assert result.cases >= 8


def each_rank(gradients, counts):
    return (gradients * counts[..., None]).sum(1) / counts.sum(1, keepdim=True)


def never_above(sizes, bucket_bytes):
    buckets = [0]
    for size in sizes[::-1]:
        if buckets[-1] and buckets[-1] + size > bucket_bytes:
            buckets.append(0)
        buckets[-1] += size
    return buckets


def full_buckets_only(sizes, bucket_bytes):
    return [b for b in bucket_sizes(sizes, bucket_bytes) if b >= bucket_bytes]


def rest_always(sizes, bucket_bytes):
    buckets, filled = [], 0
    for size in sizes[::-1]:
        filled += size
        if filled >= bucket_bytes:
            buckets.append(filled)
            filled = 0
    return [*buckets, filled]


WRONG = [
    ("accumulated_gradient", lambda g, c: g, "returns its argument"),
    ("accumulated_gradient", lambda g, c: g.mean((0, 1)), "more tokens weighs more"),
    ("accumulated_gradient", lambda g, c: g.mean(0).sum(0), "M times too long"),
    (
        "accumulated_gradient",
        lambda g, c: each_rank(g, c).mean(0),
        "divide once, by all tokens",
    ),
    ("accumulated_gradient", each_rank, "every rank needs the mean over all"),
    (
        "accumulated_gradient",
        lambda g, c: (g * c[..., None]).sum((0, 1)),
        "divide by their number",
    ),
    (
        "accumulated_gradient",
        lambda g, c: accumulated_gradient(g[:, -1:], c[:, -1:]),
        "only the last micro-batch",
    ),
    ("bucket_sizes", lambda s, b: s, "returns its argument"),
    ("bucket_sizes", lambda s, b: bucket_sizes(s[::-1], b), "the order"),
    ("bucket_sizes", never_above, "still belongs to the bucket"),
    ("bucket_sizes", full_buckets_only, "the last bucket is missing"),
    ("bucket_sizes", lambda s, b: [sum(s)], "one bucket with everything"),
    ("bucket_sizes", lambda s, b: s[::-1], "add up their bytes"),
    ("bucket_sizes", lambda s, b: [s], "return a list of 2"),
    ("bucket_sizes", lambda s, b: bucket_sizes(s, b + 1), "is full"),
    ("bucket_sizes", rest_always, "nothing in it"),
    ("end_of_step", lambda r, d: r, "returns its argument"),
    ("end_of_step", lambda r, d: r[-1] + sum(d), "communication after backward"),
    ("end_of_step", lambda r, d: r[-1] + d[-1], "wait for the link"),
    (
        "end_of_step",
        lambda r, d: max(a + b for a, b in zip(r, d, strict=True)),
        "one bucket at a time",
    ),
    ("end_of_step", lambda r, d: sum(d), "before it is ready"),
    ("end_of_step", lambda r, d: max(r), "the end of backward"),
    ("end_of_step", lambda r, d: max(r) + max(d), "need not be the last one"),
    ("end_of_step", lambda r, d: r[0] + sum(d), "may also wait for backward"),
]


class TestLaws(ExerciseLaws):
    exercises, wrong = EXERCISES, WRONG


def test_each_exercise_has_a_right_answer():
    assert {name for name, _ in RIGHT} == set(EXERCISES)
