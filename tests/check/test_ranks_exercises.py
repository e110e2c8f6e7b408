import math
from typing import Any

import pytest
import torch

import labpkg as lab
from labpkg import check
from labpkg.check import ranks_exercises
from labpkg.processes.diagnosis import Failure, Where, diagnose
from tests.check.laws import ExerciseLaws

EXERCISES: dict[str, Any] = {
    name: checker
    for name, checker in vars(check).items()
    if getattr(checker, "__module__", "") == "labpkg.check.ranks_exercises"
}


def shard_bounds(num_items, world_size, rank):
    return num_items * rank // world_size, num_items * (rank + 1) // world_size


def ring_neighbours(rank, world_size):
    return (rank + world_size - 1) % world_size, (rank + 1) % world_size


def global_rank(coordinates, sizes):
    ranks = torch.arange(math.prod(sizes)).reshape(sizes)
    return ranks[tuple(coordinates)]


def first_failure(times_s, lost_connection):
    failed = [rank for rank, time_s in enumerate(times_s) if time_s < math.inf]
    culprits = [rank for rank in failed if not lost_connection[rank]]
    return min(culprits or failed, key=lambda rank: times_s[rank])


def hang_suspect(num_issued, in_collective):
    ranks = range(len(num_issued))
    outside = [rank for rank in ranks if not in_collective[rank]]
    return min(outside or ranks, key=lambda rank: num_issued[rank])


RIGHT = [shard_bounds, ring_neighbours, global_rank, first_failure, hang_suspect]


@pytest.mark.parametrize("answer", RIGHT)
def test_right_answers_pass(answer):
    result = EXERCISES[answer.__name__](answer)
    assert result, result.message
    assert result.cases >= 10


def test_lists_are_as_good_as_pairs():
    assert check.shard_bounds(lambda *case: list(shard_bounds(*case)))
    assert check.ring_neighbours(lambda *case: list(ring_neighbours(*case)))


WRONG = [
    ("shard_bounds", lambda N, n, r: N, "returns its argument"),
    ("shard_bounds", lambda N, n, r: (N * r // n, N // n), "returns (start, size)"),
    (
        "shard_bounds",
        lambda N, n, r: (N * r // n, N * (r + 1) // n - 1),
        "the end is not included",
    ),
    ("shard_bounds", lambda N, n, r: (N // n * r, N // n * (r + 1)), "lose up to"),
    (
        "shard_bounds",
        lambda N, n, r: (N // n * r, N // n * (r + 1) if r < n - 1 else N),
        "the whole remainder",
    ),
    (
        "shard_bounds",
        lambda N, n, r: (math.ceil(N / n) * r, min(N, math.ceil(N / n) * (r + 1))),
        "rounded up",
    ),
    (
        "shard_bounds",
        lambda N, n, r: (
            min(N, math.ceil(N / n) * r),
            min(N, math.ceil(N / n) * (r + 1)),
        ),
        "rounded up",
    ),
    (
        "shard_bounds",
        lambda N, n, r: tuple(k * (N // n) + min(k, N % n) for k in (r, r + 1)),
        "the longer pieces first",
    ),
    ("shard_bounds", lambda N, n, r: (N * r / n, N * (r + 1) / n), "round down"),
    ("shard_bounds", lambda N, n, r: range(N * r // n, N), "a tuple of 2, not a range"),
    ("ring_neighbours", lambda r, n: r, "returns its argument"),
    ("ring_neighbours", lambda r, n: ring_neighbours(r, n)[::-1], "(previous, next)"),
    ("ring_neighbours", lambda r, n: (r - 1, r + 1), "a ring closes"),
    ("ring_neighbours", lambda r, n: (r - 1, (r + 1) % n), "the previous one does not"),
    ("ring_neighbours", lambda r, n: ((r - 1) % n, r + 1), "the next one does not"),
    (
        "ring_neighbours",
        lambda r, n: (max(0, r - 1), min(n - 1, r + 1)),
        "this is a line",
    ),
    (
        "ring_neighbours",
        lambda r, n: ((r - 1) % (n - 1), (r + 1) % (n - 1)),
        "the modulus is world_size",
    ),
    ("global_rank", lambda c, s: c, "returns its argument"),
    ("global_rank", lambda c, s: global_rank(c[::-1], s[::-1]), "outermost axis"),
    ("global_rank", lambda c, s: sum(c), "jumps over all ranks"),
    (
        "global_rank",
        lambda c, s: sum(x * math.prod(s[i:]) for i, x in enumerate(c)),
        "without its own size",
    ),
    (
        "global_rank",
        lambda c, s: sum(x * t for x, t in zip(c, [*s[1:], 1], strict=True)),
        "not by the next size alone",
    ),
    ("global_rank", lambda c, s: math.prod(c), "not by coordinates"),
    ("first_failure", lambda t, lost: t, "returns its argument"),
    ("first_failure", lambda t, lost: t.index(min(t)), "often a victim's"),
    ("first_failure", lambda t, lost: min(t), "return the rank, not the time"),
    (
        "first_failure",
        lambda t, lost: max(
            (r for r in range(len(t)) if t[r] < math.inf), key=lambda r: t[r]
        ),
        "the last failure",
    ),
    (
        "first_failure",
        lambda t, lost: min(range(len(t)), key=lambda r: (lost[r], t[r])),
        "a rank that has not failed",
    ),
    ("first_failure", lambda t, lost: lost.index(False), "the lowest rank without"),
    ("hang_suspect", lambda n, inside: n, "returns its argument"),
    ("hang_suspect", lambda n, inside: n.index(min(n)), "a rank outside collectives"),
    ("hang_suspect", lambda n, inside: n.index(max(n)), "is ahead, so it waits"),
    ("hang_suspect", lambda n, inside: min(n), "not the count"),
    ("hang_suspect", lambda n, inside: inside.index(True), "is a victim"),
    (
        "hang_suspect",
        lambda n, inside: inside.index(False) if not all(inside) else 0,
        "if several ranks are outside",
    ),
]


class TestLaws(ExerciseLaws):
    exercises, wrong = EXERCISES, WRONG


def test_the_exercise_divides_like_the_library():
    class Axis:
        def __init__(self, rank):
            self.get_local_rank, self.size = (lambda: rank), (lambda: 3)

    data = torch.utils.data.TensorDataset(torch.arange(10))
    for rank in range(3):
        parts = lab.batches(data, global_batch_size=10, shard=Axis(rank), seed=0)
        start, stop = shard_bounds(10, 3, rank)
        assert len(next(parts)[0]) == stop - start


def cases(exercise):
    return [pytest.param(*case, id=str(i)) for i, case in enumerate(exercise.cases)]


@pytest.mark.parametrize(("times_s", "lost"), cases(ranks_exercises._FIRST_FAILURE))
def test_the_library_blames_the_same_rank(times_s, lost):
    failures = {
        rank: Failure(time_s=time_s, summary="", is_victim=lost[rank])
        for rank, time_s in enumerate(times_s)
        if time_s < math.inf
    }
    returned = set(range(len(times_s))) - failures.keys()
    error = diagnose(returned=returned, failures=failures, where={}, limit_s=1)
    assert error.rank == first_failure(times_s, lost)


@pytest.mark.parametrize(("issued", "inside"), cases(ranks_exercises._HANG_SUSPECT))
def test_the_library_suspects_the_same_rank(issued, inside):
    where = {
        rank: Where(stack="", collective="all_reduce" * inside[rank], num_issued=number)
        for rank, number in enumerate(issued)
    }
    error = diagnose(returned=[], failures={}, where=where, limit_s=1)
    assert error.rank == hang_suspect(issued, inside)
