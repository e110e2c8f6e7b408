"""The checkers of parallelism/data_parallel accept right answers and name mistakes."""

from itertools import pairwise
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


def shard_batch(batch, n):
    bounds = [len(batch) * r // n for r in range(n + 1)]
    return [batch[a:b] for a, b in pairwise(bounds)]


def mean_gradients(gradients):
    return [sum(of_ranks) / len(of_ranks) for of_ranks in zip(*gradients, strict=True)]


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
    ("shard_batch", shard_batch),
    ("mean_gradients", mean_gradients),
    ("mean_gradients", lambda g: tuple(mean_gradients(g))),
    ("loss_weights", lambda c: c / c.double().mean()),
    ("accumulated_gradient", accumulated_gradient),
    ("bucket_sizes", bucket_sizes),
    ("end_of_step", end_of_step),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_pass(name, answer):
    result = EXERCISES[name](answer)
    assert result, result.message
    assert result.cases >= 8


def dropped_rest(batch, n):
    size = len(batch) // n
    return [batch[r * size : (r + 1) * size] for r in range(n)]


def piled_rest(batch, n):
    return [*dropped_rest(batch, n)[:-1], batch[len(batch) // n * (n - 1) :]]


def in_place_mean(gradients):
    for other in gradients[1:]:
        for mine, theirs in zip(gradients[0], other, strict=True):
            mine += theirs
    return [g / len(gradients) for g in gradients[0]]


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


WRONG = [
    ("shard_batch", lambda b, n: b, "returns its argument"),
    ("shard_batch", lambda b, n: [b for _ in range(n)], "n times the work"),
    ("shard_batch", dropped_rest, "samples are lost"),
    ("shard_batch", piled_rest, "everything that remains"),
    ("shard_batch", lambda b, n: [b[r::n] for r in range(n)], "contiguous"),
    ("shard_batch", lambda b, n: b.chunk(n), "torch.chunk"),
    ("shard_batch", lambda b, n: b.tensor_split(n), "the right sizes on other ranks"),
    ("mean_gradients", lambda g: g, "returns its argument"),
    ("mean_gradients", lambda g: [sum(x) for x in zip(*g, strict=True)], "the sum"),
    ("mean_gradients", lambda g: g[0], "nothing was averaged"),
    ("mean_gradients", lambda g: [mean_gradients(g) for _ in g], "return one list"),
    (
        "mean_gradients",
        lambda g: [torch.cat([x.flatten() for x in own]).mean() for own in g],
        "not rank r over its parameters",
    ),
    (
        "mean_gradients",
        lambda g: [x * len(g) / len(g[0]) for x in mean_gradients(g)],
        "not of parameters",
    ),
    ("mean_gradients", in_place_mean, "changes its argument gradients"),
    ("loss_weights", lambda c: c, "returns its argument"),
    ("loss_weights", lambda c: c / c.sum(), "multiply by n"),
    ("loss_weights", lambda c: [1.0] * len(c), "return a tensor of shape (2,)"),
    ("loss_weights", lambda c: torch.ones(len(c)), "ignore the counts"),
    ("loss_weights", lambda c: c.sum() / c / len(c), "the same say"),
    ("loss_weights", lambda c: len(c) * c, "number of all samples"),
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
    ("end_of_step", lambda r, d: r[0] + sum(d), "may also wait for backward"),
]


class TestLaws(ExerciseLaws):
    exercises, wrong = EXERCISES, WRONG


def test_each_exercise_has_a_right_answer():
    assert {name for name, _ in RIGHT} == set(EXERCISES)
