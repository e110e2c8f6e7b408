from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler, TensorDataset

import labpkg as lab
from labpkg import check
from tests.check.laws import ExerciseLaws

EXERCISES: dict[str, Any] = {
    name: checker
    for name, checker in vars(check).items()
    if getattr(checker, "__module__", "") == "labpkg.check.data_loading_exercises"
}


def padded_indices(num_samples, num_ranks, rank):
    """Ask torch."""
    data = TensorDataset(torch.arange(num_samples))
    return list(DistributedSampler(data, num_ranks, rank, shuffle=False))


class Axis:
    def __init__(self, rank, num_ranks):
        self.rank, self.num_ranks = rank, num_ranks

    def size(self):
        return self.num_ranks

    def get_local_rank(self):
        return self.rank


def rank_batch(permutations, step, global_batch_size, rank, num_ranks):
    start = step * global_batch_size
    batch = permutations.flatten()[start : start + global_batch_size]
    cuts = [global_batch_size * r // num_ranks for r in (rank, rank + 1)]
    return batch[slice(*cuts)]


def position_noise(x, positions, seed):
    noise = torch.zeros_like(x)
    for row, position in zip(noise, positions.tolist(), strict=True):
        random = np.random.default_rng((seed, position))
        row += torch.from_numpy(random.standard_normal(x.shape[1]))
    return x + noise


def batch_time(wait_s, compute_s, step_s, num_workers, num_cores):
    if not num_workers:
        return wait_s + compute_s + step_s
    loading = (wait_s + compute_s) / num_workers
    return max(step_s, loading, compute_s / num_cores)


def step_starts(fetch_s, step_s, num_workers, prefetch):
    """Play it in small steps of time, one worker and one queue after the other."""
    N, tick, now = len(fetch_s), 0.5, 0.0
    left, starts, ready = list(fetch_s), [], [False] * N
    while len(starts) < N:
        i = len(starts)
        if ready[i] and (not i or now >= starts[-1] + step_s):
            starts.append(now)
            continue
        requested = min(N, num_workers * prefetch + len(starts))
        for worker in range(num_workers):
            own = [k for k in range(worker, requested, num_workers) if not ready[k]]
            if own:
                left[own[0]] -= tick
        now += tick
        ready = [r or s <= 0 for r, s in zip(ready, left, strict=True)]
    return starts


RIGHT = [
    ("padded_indices", padded_indices),
    ("rank_batch", rank_batch),
    ("position_noise", position_noise),
    ("batch_time", batch_time),
    ("step_starts", step_starts),
]

WRONG = [
    ("padded_indices", lambda N, n, r: list(range(r, N, n)), "different numbers"),
    ("padded_indices", lambda N, n, r: [r] * -(-N // n), "ceil(N / n)"),
    (
        "padded_indices",
        lambda N, n, r: (list(range(N)) + list(range(n)))[r : -(-N // n) * n : n],
        "go around more than once",
    ),
    ("padded_indices", lambda N, n, r: N, "returns its argument"),
    (
        "rank_batch",
        lambda p, s, B, r, n: p[0][s * B : (s + 1) * B][B * r // n : B * (r + 1) // n],
        "right in the first epoch only",
    ),
    ("rank_batch", lambda p, s, B, r, n: p.flatten()[s * B : s * B + B], "all ranks"),
    (
        "rank_batch",
        lambda p, s, B, r, n: p.flatten()[s * B :][r * (B // n) :][: B // n],
        "the remainder is lost",
    ),
    (
        "rank_batch",
        lambda p, s, B, r, n: p.flatten()[s * B : (s + 1) * B].tensor_split(n)[r],
        "tensor_split make the first pieces larger",
    ),
    ("rank_batch", lambda p, s, B, r, n: p, "returns its argument"),
    (
        "position_noise",
        lambda x, p, s: (
            x + torch.from_numpy(np.random.default_rng(s).standard_normal(x.shape))
        ),
        "one generator for the whole batch",
    ),
    (
        "position_noise",
        lambda x, p, s: (
            x
            + torch.from_numpy(
                np.stack(
                    [
                        np.random.default_rng((s, i)).standard_normal(x.shape[1])
                        for i in p.tolist()
                    ]
                )
            )
        ),
        "raises ValueError",  # np.stack of nothing
    ),
    ("position_noise", lambda x, p, s: x + torch.randn_like(x), "a new np.random"),
    ("position_noise", lambda x, p, s: x, "returns its argument"),
    ("batch_time", lambda w, c, s, W, C: max(s, (w + c) / max(W, 1)), "the times add"),
    ("batch_time", lambda w, c, s, W, C: w + c + s, "not the sum"),
    ("batch_time", lambda w, c, s, W, C: (w + c) / W, "raises ZeroDivisionError"),
    (
        "batch_time",
        lambda w, c, s, W, C: max(s, (w + c) / W) if W else w + c + s,
        "computing needs cores",
    ),
    ("batch_time", lambda w, c, s, W, C: s, "returns its argument"),
    (
        "step_starts",
        lambda f, s, W, P: [i * s for i in range(len(f))],
        "keep two lists",
    ),
    (
        "step_starts",
        lambda f, s, W, P: [sum(f[: i + 1]) + i * s for i in range(len(f))],
        "loads and steps in turn",
    ),
    (
        "step_starts",
        lambda f, s, W, P: step_starts(f, s, W, len(f)),
        "run too far ahead",
    ),
    ("step_starts", lambda f, s, W, P: f, "returns its argument"),
]


class TestDataLoadingExercises(ExerciseLaws):
    exercises = EXERCISES
    wrong = WRONG


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_pass(name, answer):
    result = EXERCISES[name](answer)
    assert result, result.message


def test_every_exercise_has_a_right_answer():
    assert set(EXERCISES) == {name for name, _ in RIGHT}


def test_the_batches_of_the_library_are_those_of_the_exercise():
    data = TensorDataset(torch.arange(10))
    whole = lab.batches(data, global_batch_size=10, steps=3, seed=5)
    permutations = torch.stack([x for (x,) in whole])
    options = {"global_batch_size": 4, "steps": 7, "seed": 5}
    for rank in range(3):
        own = lab.batches(data, **options, shard=Axis(rank, 3))
        for step, (x,) in enumerate(own):
            assert torch.equal(x, rank_batch(permutations, step, 4, rank, 3))
