"""Batches that do not depend on who reads them.

Contract of `batches`: the batch of a step is a function of (seed, step), and the ranks
of an axis cut it into contiguous pieces, so n ranks together see exactly the samples
of one process, in the same order; a run resumes at any step without replaying one.
Worker processes may prepare batches ahead, which changes none of this.

Chapters: foundations/training_loop, processes/data_loading.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

from labpkg.foundations.text import ByteWindows
from labpkg.foundations.workers import map_ahead

Columns = tuple[Tensor, ...]
Transform = Callable[[Columns, Tensor], Columns]


class Shard(Protocol):
    """What `batches` needs of a one-dimensional `DeviceMesh`."""

    def size(self) -> int:
        """Return the number of ranks."""
        ...

    def get_local_rank(self) -> int:
        """Return this rank's number."""
        ...


def batches(
    data: Dataset[Any],
    *,
    global_batch_size: int,
    shard: Shard | None = None,
    steps: int | None = None,
    seed: int,
    start_step: int = 0,
    transform: Transform | None = None,
    num_workers: int = 0,
    prefetch: int | None = None,
    worker_timeout_s: float | None = None,
) -> Iterator[Columns]:
    """Yield this rank's part of each global batch.

    Samples come in the order of one seeded permutation per epoch, one epoch after the
    other, and the batch of step s is the positions s B to (s + 1) B of that order: each
    epoch uses each sample once, and the last samples of an epoch share a batch with
    the first of the next. Rank r of n gets the contiguous piece from B r / n to
    B (r + 1) / n: sizes differ by at most one, and a piece is empty when B < n.

    Args:
        data: a `TensorDataset`, `ByteWindows`, or any dataset with a length whose
            samples are tuples of tensors and numbers.
        global_batch_size: B, over all ranks.
        shard: the axis that divides the batch, e.g. mesh["dp"]; None is one process.
        steps: the step at which the run ends; None is the end of the first epoch, whose
            last batch may be smaller.
        seed: chooses the permutations.
        start_step: first step to yield, for a run that resumes; earlier ones cost
            nothing.
        transform: called as `transform(columns, positions)` on this rank's part, which
            may be empty, and returns the columns to yield. Sample i of the part has the
            number positions[i] in the endless order, int64 and on the CPU. What is a
            function of (sample, position), such as `augment`, is then the same for any
            number of ranks and workers.
        num_workers: processes that read and transform ahead of the step, for each rank;
            0 does it when a batch is asked for. The batches are the same. A worker sees
            columns on the CPU, without workers they are on torch's default device.
        prefetch: batches that each worker holds ready; None is 2.
        worker_timeout_s: limit of the wait for one batch from a worker; None is 30 s,
            `math.inf` waits for ever.

    Returns:
        An iterator over the batches of steps `start_step` to `steps` - 1, as tensors
        on torch's default device. To a GPU they are copied from pinned memory, so that
        neither the caller nor the GPU waits. Workers start with the first batch and end
        with the iterator.

    Raises:
        ValueError: at the call, for empty data, a number out of range or a mesh of
            several axes; instead of a batch, if a transform changes the number of
            samples.
        TypeError: instead of a batch, for samples or a transform of another kind.
        TimeoutError: instead of a batch that does not come in time.
        RuntimeError: instead of a batch, if a worker dies.

    What the data or the transform raises arrives with a note that names the samples,
    and from a worker with its traceback there as the cause.
    """
    num_samples = len(data)  # pyright: ignore[reportArgumentType]
    _check_numbers(
        num_samples, global_batch_size=global_batch_size, seed=seed, steps=steps
    )
    run = _steps_of(num_samples, global_batch_size, start_step, steps)
    limits = _worker_limits(num_workers, prefetch, worker_timeout_s)
    end = num_samples if steps is None else run.stop * global_batch_size
    parts = _parts(run, global_batch_size, end, *_place(shard))
    read = _Reader(data, _SampleOrder(num_samples, seed), transform)
    if not num_workers:
        return (read(*part, torch.get_default_device()) for part in parts)
    return _from_workers(read, parts, start_step=start_step, seed=seed, **limits)


def _steps_of(
    num_samples: int, global_batch_size: int, start_step: int, steps: int | None
) -> range:
    one_epoch = -(-num_samples // global_batch_size)
    last_step = one_epoch if steps is None else steps
    if not isinstance(start_step, Integral) or not 0 <= start_step <= last_step:
        raise ValueError(
            f"start_step={start_step!r} is not in the run of {last_step} steps; choose "
            f"0 to {last_step}, or more steps"
        )
    return range(start_step, last_step)


def _parts(
    run: range, global_batch_size: int, end: int, rank: int, num_ranks: int
) -> Iterator[tuple[int, int]]:
    """Yield the positions, from first up to last, that a rank reads in each step."""
    for step in run:
        start = step * global_batch_size
        size = min(global_batch_size, end - start)
        yield start + size * rank // num_ranks, start + size * (rank + 1) // num_ranks


def _from_workers(
    read: _Reader, parts: Iterator[tuple[int, int]], *, start_step: int, **options: Any
) -> Iterator[Columns]:
    cpu = torch.device("cpu")
    for columns in map_ahead(
        read,
        ((first, last, cpu) for first, last in parts),
        describe=lambda number: f"the batch of step {start_step + number}",
        own_files=(__file__,),
        **options,
    ):
        device = torch.get_default_device()
        yield tuple(_moved(column, device) for column in columns)


def _check_numbers(num_samples: int, **numbers: int | None) -> None:
    if num_samples == 0:
        raise ValueError("the dataset is empty; give at least one sample")
    least = {"global_batch_size": 1, "seed": 0, "steps": 0}
    for name, value in numbers.items():
        if value is None:
            continue
        if not isinstance(value, Integral) or value < least[name]:
            raise ValueError(
                f"{name}={value!r} must be a whole number, at least {least[name]}; "
                "where it is a quotient, divide with //"
            )


def _worker_limits(
    num_workers: int, prefetch: int | None, timeout_s: float | None
) -> dict[str, Any]:
    if not isinstance(num_workers, Integral) or num_workers < 0:
        raise ValueError(
            f"num_workers={num_workers!r} must be a whole number, at least 0; choose "
            "e.g. 2"
        )
    given = {"prefetch": prefetch, "worker_timeout_s": timeout_s}
    if num_workers == 0:
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{name}={value!r} has no effect with num_workers=0; choose "
                    f"workers, or leave {name} out"
                )
    elif "fork" not in multiprocessing.get_all_start_methods():
        raise ValueError(
            f"num_workers={num_workers} needs processes that can fork, which this "
            "system has not; use num_workers=0"
        )
    prefetch = 2 if prefetch is None else prefetch
    if not isinstance(prefetch, Integral) or prefetch < 1:
        raise ValueError(
            f"prefetch={prefetch!r} must be a whole number, at least 1; choose e.g. 2"
        )
    timeout_s = 30.0 if timeout_s is None else timeout_s
    if not isinstance(timeout_s, Real) or not timeout_s > 0:
        raise ValueError(
            f"worker_timeout_s={timeout_s!r} must be a number of seconds above 0; "
            "choose e.g. 30, or math.inf"
        )
    return {"num_workers": num_workers, "prefetch": prefetch, "timeout_s": timeout_s}


def _place(shard: Shard | None) -> tuple[int, int]:
    """Return this rank and the number of ranks."""
    if shard is None:
        return 0, 1
    if getattr(shard, "ndim", 1) != 1:
        raise ValueError(
            f"shard={shard} has several axes; pass the one that divides the batch, "
            'such as mesh["dp"]'
        )
    return shard.get_local_rank(), shard.size()


class _SampleOrder:
    """The endless sequence of sample numbers: one permutation after the other."""

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples, self.seed = num_samples, seed
        self.epoch, self.permutation = -1, np.empty(0, dtype=np.int64)

    def samples(self, first: int, last: int) -> np.ndarray:
        pieces = [np.empty(0, dtype=np.int64)]
        while first < last:
            epoch, offset = divmod(first, self.num_samples)
            piece = self._epoch(epoch)[offset : offset + last - first]
            pieces.append(piece)
            first += len(piece)
        return np.concatenate(pieces)

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch != self.epoch:
            random = np.random.default_rng((self.seed, epoch))
            self.epoch, self.permutation = epoch, random.permutation(self.num_samples)
        return self.permutation


class _Reader:
    """Reads samples by their positions in the order, in whatever process calls it."""

    def __init__(
        self, data: Dataset[Any], order: _SampleOrder, transform: Transform | None
    ) -> None:
        self.data, self.order, self.transform = data, order, transform

    def __call__(self, first: int, last: int, device: torch.device) -> Columns:
        samples = self.order.samples(first, last)
        columns = tuple(_moved(c, device) for c in _fetch(self.data, samples))
        if self.transform is None:
            return columns
        positions = torch.arange(first, last, device="cpu")
        try:
            return _transformed(self.transform, columns, positions)
        except Exception as error:
            error.add_note(
                f"in the transform of positions {first} up to {last}, which are the "
                f"samples {samples.tolist()}"
            )
            raise


def _moved(column: Tensor, device: torch.device) -> Tensor:
    """Return a column on a device."""
    if device.type != "cuda" or column.device.type != "cpu":
        return column.to(device)
    # From pinned memory the copy is queued: this returns at once, and the kernels that
    # are queued before it still run.
    return column.pin_memory().to(device, non_blocking=True)


def _fetch(data: Dataset[Any], samples: np.ndarray) -> Columns:
    if isinstance(data, (TensorDataset, ByteWindows)):  # index all samples at once
        return tuple(data[torch.from_numpy(samples)])
    # An empty piece takes its columns, dtypes and shapes from sample 0.
    chosen = [_sample(data, i) for i in samples.tolist() or [0]]
    columns = default_collate(chosen)
    if not _are_columns(columns):
        raise TypeError(
            f"{type(data).__name__} has a {type(chosen[0]).__name__} for a sample, "
            "but batches needs tuples of tensors and numbers; let __getitem__ return "
            "(x, y), or (x,) for a single one"
        )
    return tuple(column[: len(samples)] for column in columns)


def _sample(data: Dataset[Any], index: int) -> Any:
    try:
        return data[index]
    except Exception as error:
        error.add_note(f"in sample {index} of the data")
        raise


def _transformed(transform: Transform, columns: Columns, positions: Tensor) -> Columns:
    new = transform(columns, positions)
    if not _are_columns(new):
        raise TypeError(
            f"the transform returned a {type(new).__name__}, but batches needs a tuple "
            "of tensors; return (x, y), or (x,) for a single one"
        )
    if any(column.shape[:1] != positions.shape for column in new):
        raise ValueError(
            f"the transform made columns of shape {[tuple(c.shape) for c in new]} of "
            f"{len(positions)} samples; keep the first dim"
        )
    return tuple(new)


def _are_columns(columns: Any) -> bool:
    is_row = isinstance(columns, (tuple, list))  # of a tensor it would iterate the rows
    return is_row and all(isinstance(column, Tensor) for column in columns)
