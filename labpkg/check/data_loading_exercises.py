"""Checkers of the exercises of the chapter processes/data_loading.

Notation: N samples, n ranks, B samples in the global batch, W workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labpkg.check.result import CheckResult, Exercise


def padded_indices(fn: Callable[..., Any]) -> CheckResult:
    """Check `padded_indices(num_samples, num_ranks, rank)`: a rank's list of samples.

    Without shuffling, torch's `DistributedSampler` repeats the first samples until
    their number is divisible, and deals them out in turn, like cards.

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _PADDED_INDICES.check(fn)


def rank_batch(fn: Callable[..., Any]) -> CheckResult:
    """Check `rank_batch(permutations, step, global_batch_size, rank, num_ranks)`.

    The order of the run is one permutation after the other. The batch of a step is the
    next B of it, which may reach into the next epoch; a rank reads its contiguous piece
    from B r / n up to B (r + 1) / n, rounded down. Return its samples.

    Shape:
        permutations (epochs, N) -> (c,)

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _RANK_BATCH.check(fn)


def position_noise(fn: Callable[..., Any]) -> CheckResult:
    """Check `position_noise(x, positions, seed)`: noise that no cutting changes.

    Add standard normal numbers: row i gets those of a new
    `np.random.default_rng((seed, positions[i]))`. A batch may be empty.

    Shape:
        x (B, D) float64, positions (B,) -> (B, D)

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _POSITION_NOISE.check(fn)


def batch_time(fn: Callable[..., Any]) -> CheckResult:
    """Check `batch_time(wait_s, compute_s, step_s, num_workers, num_cores)`.

    The seconds from one step to the next in a long run: a worker waits `wait_s` and
    computes for `compute_s` to make a batch, and the step takes `step_s` on a GPU. With
    `num_workers=0` the training process does it all.

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _BATCH_TIME.check(fn)


def step_starts(fn: Callable[..., Any]) -> CheckResult:
    """Check `step_starts(fetch_s, step_s, num_workers, prefetch)`: when steps begin.

    Batch i is made by worker i mod W and takes `fetch_s[i]`. The first W x prefetch
    batches are requested at time 0, batch i later when step i - W x prefetch begins. A
    worker does what is requested of it in order, one after the other. Step i begins
    when batch i is ready and step i - 1, which takes `step_s`, is over.

    Args:
        fn: your function; returns a list of seconds, one per batch.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _STEP_STARTS.check(fn)


# ---- padded_indices -----------------------------------------------------------------


def _padded(num_samples: int, num_ranks: int) -> list[int]:
    total = -(-num_samples // num_ranks) * num_ranks
    return [i % num_samples for i in range(total)]


def _contiguous(num_samples: int, num_ranks: int, rank: int) -> list[int]:
    padded = _padded(num_samples, num_ranks)
    each = len(padded) // num_ranks
    return padded[rank * each : (rank + 1) * each]


_PADDED_INDICES = Exercise(
    name="padded_indices",
    arguments=("num_samples", "num_ranks", "rank"),
    reference=lambda N, n, r: _padded(N, n)[r::n],
    cases=[
        (8, 2, 0),
        (8, 2, 1),
        (10, 4, 0),
        (10, 4, 2),  # gets a repeated sample
        (10, 4, 3),
        (7, 3, 1),
        (6, 1, 0),
        (2, 5, 4),  # fewer samples than ranks: they are repeated more than once
    ],
    mistakes={
        "these are contiguous pieces; rank 0 gets 0, n, 2 n, ...": _contiguous,
        "the ranks get different numbers of samples; repeat the first ones until the "
        "number is divisible": lambda N, n, r: list(range(r, N, n)),
        "the last samples are dropped; here the first ones are repeated until all "
        "ranks have equally many": lambda N, n, r: list(range(r, N // n * n, n)),
        "the last sample is repeated; fill up with the first ones": lambda N, n, r: [
            min(i, N - 1) for i in range(r, len(_padded(N, n)), n)
        ],
        "this is what all ranks get together": lambda N, n, r: _padded(N, n),
        "with fewer samples than ranks, go around more than once: i % "
        "num_samples": lambda N, n, r: [*range(N), *range(-N % n)][r::n],
    },
    hint=(
        "ceil(N / n) * n numbers in all, i % N for i = 0, 1, 2, ...; rank r takes "
        "every n-th of them, beginning with number r"
    ),
)

# ---- rank_batch ---------------------------------------------------------------------


def _piece(order: Tensor, start: int, B: int, rank: int, n: int) -> Tensor:
    return order[start + B * rank // n : start + B * (rank + 1) // n]


def _tail_dropped(permutations: Tensor, step: int, B: int, r: int, n: int) -> Tensor:
    per_epoch = permutations.shape[1] // B
    if not per_epoch or step // per_epoch >= len(permutations):
        return permutations.new_empty(0)
    epoch, step = divmod(step, per_epoch)
    return _piece(permutations[epoch], step * B, B, r, n)


def _chunked(permutations: Tensor, step: int, B: int, r: int, n: int) -> Tensor:
    chunks = permutations.flatten()[step * B : (step + 1) * B].chunk(n)
    return chunks[r] if r < len(chunks) else permutations.new_empty(0)


def _equal_pieces(permutations: Tensor, step: int, B: int, r: int, n: int) -> Tensor:
    size = B // n
    return permutations.flatten()[step * B + r * size : step * B + (r + 1) * size]


def _permutations(num_samples: int, epochs: int, seed: int) -> Tensor:
    random = np.random.default_rng(seed)
    rows = [random.permutation(num_samples) for _ in range(epochs)]
    return torch.from_numpy(np.stack(rows))


_RANK_BATCH = Exercise(
    name="rank_batch",
    arguments=("permutations", "step", "global_batch_size", "rank", "num_ranks"),
    reference=lambda p, s, B, r, n: _piece(p.flatten(), s * B, B, r, n),
    cases=[
        (_permutations(4, 4, seed=0), 1, 4, 1, 2),
        (_permutations(8, 4, seed=0), 0, 4, 0, 2),
        (_permutations(8, 6, seed=1), 2, 4, 0, 2),  # the first of the second epoch
        (_permutations(10, 3, seed=2), 2, 4, 1, 2),  # half in each of two epochs
        (_permutations(10, 3, seed=2), 4, 4, 0, 1),
        (_permutations(10, 2, seed=3), 1, 7, 0, 3),  # 7 over 3 ranks: 2, 2, 3
        (_permutations(10, 2, seed=3), 0, 7, 2, 3),
        (_permutations(6, 2, seed=4), 2, 2, 0, 3),  # more ranks than samples
        (_permutations(6, 2, seed=4), 2, 2, 2, 3),
        (_permutations(3, 4, seed=5), 1, 5, 0, 1),  # three epochs in one batch
    ],
    mistakes={
        "this is the batch of all ranks; a rank reads its piece of "
        "it": lambda p, s, B, r, n: p.flatten()[s * B : (s + 1) * B],
        "the samples are dealt out in turn; take contiguous pieces, so that they "
        "join to the batch": lambda p, s, B, r, n: p.flatten()[s * B : (s + 1) * B][
            r::n
        ],
        "each rank reads B samples; B is the size of the global batch, which the ranks "
        "share": lambda p, s, B, r, n: p.flatten()[(s * n + r) * B :][:B],
        "each epoch uses the same permutation; permutations[e] is that of epoch "
        "e": lambda p, s, B, r, n: _piece(
            p[:1].expand(2 * len(p), -1).flatten(), s * B, B, r, n
        ),
        "the end of each epoch is dropped; a batch may reach into the next "
        "one": _tail_dropped,
        "the remainder is lost: B // n samples for each rank are not B "
        "in all": _equal_pieces,
        "chunk and tensor_split make the first pieces larger; piece r is from "
        "B r // n up to B (r + 1) // n": _chunked,
        "this is right in the first epoch only; join all "
        "permutations": lambda p, s, B, r, n: _piece(p[0], s * B, B, r, n),
    },
    hint=(
        "join the permutations to one order; the batch starts at step * B, and the "
        "piece of rank r at B * r // n in it"
    ),
)

# ---- position_noise -----------------------------------------------------------------


def _noise(x: Tensor, seeds: Sequence[Any]) -> Tensor:
    """Return one row of normal numbers for each seed."""
    rows = [np.random.default_rng(s).standard_normal(x.shape[1]) for s in seeds]
    return torch.from_numpy(np.array(rows).reshape(x.shape))


_POSITION_NOISE = Exercise(
    name="position_noise",
    arguments=("x", "positions", "seed"),
    reference=lambda x, p, s: x + _noise(x, [(s, i) for i in p.tolist()]),
    cases=[
        (torch.zeros(2, 3).double(), torch.tensor([4, 5]), 3),
        (torch.ones(3, 2).double(), torch.tensor([0, 1, 2]), 1),
        (torch.arange(4.0).view(2, 2).double(), torch.tensor([1000, 1001]), 7),
        (torch.zeros(1, 4).double(), torch.tensor([12]), 3),
        (torch.zeros(3, 1).double(), torch.tensor([7, 2, 9]), 2),
        (torch.zeros(0, 2).double(), torch.arange(0), 0),  # of a rank without samples
    ],
    mistakes={
        "one generator for the whole batch: what a sample gets depends on the samples "
        "before it; make one for each position": lambda x, p, s: (
            x + _noise(x.reshape(1, -1), [s]).view(x.shape)
        ),
        "the row in the batch is not the position: it changes with the number of "
        "ranks; use positions[i]": lambda x, p, s: (
            x + _noise(x, [(s, i) for i in range(len(x))])
        ),
        "every row gets the same noise; make a generator for each "
        "position": lambda x, p, s: x + _noise(x, [s] * len(x)),
        "seed + position is the same for (1, 0) and (0, 1), so that two seeds share "
        "noise; give both: default_rng((seed, position))": lambda x, p, s: (
            x + _noise(x, [s + i for i in p.tolist()])
        ),
        "the seed does not matter here; give both: default_rng((seed, "
        "position))": lambda x, p, s: x + _noise(x, p.tolist()),
        "the order is (seed, position)": lambda x, p, s: (
            x + _noise(x, [(i, s) for i in p.tolist()])
        ),
        "add the noise to x": lambda x, p, s: _noise(x, [(s, i) for i in p.tolist()]),
    },
    hint=(
        "for each row a new np.random.default_rng((seed, position)) and "
        ".standard_normal(columns) of it; without rows, return an empty (0, D)"
    ),
)

# ---- batch_time ---------------------------------------------------------------------


def _batch_time(wait: float, compute: float, step: float, W: int, C: int) -> float:
    if W == 0:
        return wait + compute + step
    return max(step, (wait + compute) / W, compute / C)


def _with_workers(
    formula: Callable[[float, float, float, int, int], float],
) -> Callable[[float, float, float, int, int], float]:
    """Return the answer that is right without workers and uses a formula with them."""
    return lambda w, c, s, W, C: formula(w, c, s, W, C) if W else w + c + s


_BATCH_TIME = Exercise(
    name="batch_time",
    arguments=("wait_s", "compute_s", "step_s", "num_workers", "num_cores"),
    reference=_batch_time,
    cases=[
        (3.0, 1.0, 2.0, 0, 2),
        (3.0, 1.0, 2.0, 1, 2),
        (3.0, 1.0, 1.0, 2, 2),
        (6.0, 0.0, 0.5, 8, 2),  # waiting needs no core
        (0.0, 6.0, 0.5, 8, 2),  # computing does
        (5.0, 1.0, 0.1, 4, 2),
        (2.0, 4.0, 0.1, 8, 4),
        (2.0, 4.0, 5.0, 8, 4),  # the step is the longest
        (1.0, 1.0, 0.0, 1, 8),
    ],
    mistakes={
        "the step and the loading run at the same time: the longer one decides, not "
        "the sum": _with_workers(lambda w, c, s, W, C: _batch_time(w, c, 0, W, C) + s),
        "without workers nothing overlaps: the times add up": lambda w, c, s, W, C: (
            _batch_time(w, c, s, max(W, 1), C)
        ),
        "computing needs cores: in all it takes at least compute_s / num_cores per "
        "batch": _with_workers(lambda w, c, s, W, C: max(s, (w + c) / W)),
        "waiting needs no core; only compute_s is limited by them": _with_workers(
            lambda w, c, s, W, C: max(s, (w + c) / min(W, C))
        ),
        "while one worker waits, another one can compute, so these are two separate "
        "limits: (wait_s + compute_s) / workers and compute_s / cores": _with_workers(
            lambda w, c, s, W, C: max(s, w / W + c / min(W, C))
        ),
        "the step may be the longest of all": _with_workers(
            lambda w, c, s, W, C: max((w + c) / W, c / C)
        ),
    },
    hint=(
        "with workers the slowest of three decides: the step, a batch divided by the "
        "workers, and its computing divided by the cores; without workers, their sum"
    ),
)

# ---- step_starts --------------------------------------------------------------------


def _starts(
    fetch: Sequence[float],
    step: float,
    W: int,
    prefetch: int,
    *,
    requested_after: float = 0.0,
    in_stock: int | None = None,
) -> list[float]:
    starts, ready = [], []
    for i, seconds in enumerate(fetch):
        late = i - (in_stock or W * prefetch)
        requested = starts[late] + requested_after if late >= 0 else 0.0
        free = ready[i - W] if i >= W else 0.0
        ready.append(max(requested, free) + seconds)
        starts.append(max(ready[i], starts[i - 1] + step if i else 0.0))
    return starts


def _any_free_worker(
    fetch: Sequence[float], step: float, W: int, prefetch: int
) -> list[float]:
    starts, free = [], [0.0] * W
    for i, seconds in enumerate(fetch):
        worker = free.index(min(free))
        late = i - W * prefetch
        free[worker] = max(free[worker], starts[late] if late >= 0 else 0.0) + seconds
        starts.append(max(free[worker], starts[i - 1] + step if i else 0.0))
    return starts


_STEP_STARTS = Exercise(
    name="step_starts",
    arguments=("fetch_s", "step_s", "num_workers", "prefetch"),
    reference=_starts,
    cases=[
        ([2.0, 2.0, 2.0], 1.0, 1, 2),  # the loading is the slower one
        ([3.0, 1.0, 1.0, 1.0, 2.0, 5.0, 5.0], 1.0, 2, 2),
        ([1.0, 1.0, 1.0, 1.0], 3.0, 1, 2),  # the step is
        ([4.0, 4.0, 4.0, 4.0], 1.0, 2, 2),
        ([3.0, 1.0, 1.0, 1.0, 3.0, 1.0], 1.0, 2, 1),  # batch 1 is ready before batch 0
        ([1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2.0, 2, 2),  # one is slow
        ([1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2.0, 2, 4),  # more in stock
        ([5.0, 1.0, 1.0, 5.0, 1.0, 1.0, 5.0, 1.0, 1.0], 1.0, 3, 1),
        ([2.0], 5.0, 4, 2),
        ([1.0, 1.0, 1.0, 6.0, 6.0, 1.0], 4.0, 1, 1),
    ],
    mistakes={
        "the time of the step is missing: step i begins step_s after step i - 1, or "
        "later": lambda f, s, W, P: _starts(f, 0, W, P),
        "this is one process that loads and steps in turn; workers load while the "
        "trainer computes": lambda f, s, W, P: [
            sum(f[: i + 1]) + i * s for i in range(len(f))
        ],
        "the workers run too far ahead: batch i is requested when step i - W * "
        "prefetch begins": lambda f, s, W, P: _starts(f, s, W, len(f)),
        "batch i belongs to worker i mod W, also if another one is free": (
            _any_free_worker
        ),
        "prefetch counts the batches of each worker; W * prefetch are on their "
        "way": lambda f, s, W, P: _starts(f, s, W, P, in_stock=P),
        "a batch is requested when a step begins, not when it "
        "ends": lambda f, s, W, P: _starts(f, s, W, P, requested_after=s),
    },
    hint=(
        "keep two lists, ready and start: a worker begins batch i when it is requested "
        "and batch i - W is ready; step i begins when batch i is ready and step i - 1 "
        "is over"
    ),
)
