"""Data that is on every machine, and batches that do not depend on who reads them.

Contract of `batches`: the batch of a step is a function of (seed, step), and the ranks
of an axis cut it into contiguous pieces, so n ranks together see exactly the samples
of one process, in the same order; a run resumes at any step without replaying one.
Nothing is downloaded: the text is the source of the Python standard library, or yours.

Chapters: foundations/training_loop, processes/data_loading.
"""

from __future__ import annotations

import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

from labpkg.foundations.tables import require_split

Columns = tuple[Tensor, ...]
Transform = Callable[[Columns, Tensor], Columns]

# Left out of the text: what installations of one Python version may lack or add.
_OPTIONAL_FOLDERS = {
    *("__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib"),
    *("tkinter", "turtledemo", "ensurepip", "lib2to3", "distutils"),
}


class Shard(Protocol):
    """What `batches` needs of a one-dimensional `DeviceMesh`."""

    def size(self) -> int:
        """Return the number of ranks."""
        ...

    def get_local_rank(self) -> int:
        """Return this rank's number."""
        ...


class ByteWindows(Dataset[tuple[Tensor, Tensor]]):
    """Text as windows of bytes, each with itself shifted by one as the target.

    Window i is x = bytes[i T : (i + 1) T] and y = bytes[i T + 1 : (i + 1) T + 1]: no
    byte is a target twice. The text is kept as one byte per token.

    Args:
        text: the bytes.
        sequence_length: T.

    Shape:
        windows[i]: x (T,), y (T,); windows[indices (B,)]: x (B, T), y (B, T); int64

    Raises:
        ValueError: if the text is too short for one window or no bytes, or T < 1.
    """

    def __init__(self, text: bytes | bytearray, *, sequence_length: int) -> None:
        if sequence_length < 1:
            raise ValueError(
                f"sequence_length={sequence_length} must be at least 1; choose e.g. 128"
            )
        if not isinstance(text, bytes | bytearray):
            raise ValueError(
                f"the text is a {type(text).__name__}, but windows are made of bytes; "
                "call text.encode()"
            )
        if not text:
            raise ValueError(
                f"the text is empty; sequence_length={sequence_length} needs at least "
                f"{sequence_length + 1} bytes"
            )
        if len(text) <= sequence_length:
            raise ValueError(
                f"{len(text)} bytes are too short for one window: sequence_length="
                f"{sequence_length} needs {sequence_length + 1}; shorten the window"
            )
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return (self.text.numel() - 1) // self.sequence_length

    def __getitem__(self, index: int | Tensor) -> tuple[Tensor, Tensor]:
        T = self.sequence_length
        windows = self.text.unfold(0, T + 1, T)[index].long()  # (..., T + 1)
        return windows[..., :-1].contiguous(), windows[..., 1:].contiguous()


def stdlib_text(split: str = "train", *, sequence_length: int = 128) -> ByteWindows:
    """Return the source of the Python standard library as byte windows.

    About one file in ten, chosen by a hash of its path, belongs to the validation
    part. Folders that installations of one version may lack or add (site-packages,
    tests, idlelib, tkinter, distutils, ...) and generated build settings are left out,
    so machines with the same Python version see the same text.

    Args:
        split: "train" or "validation".
        sequence_length: T, bytes per window.

    Returns:
        A dataset of (x, y) windows, on the CPU.

    Raises:
        ValueError: for another split, or a Python without source files.
    """
    require_split(split, "train", "validation")
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [name for name in _stdlib_files(root) if _split_of(name) == split]
    if not names:
        raise ValueError(
            f"no Python source in {root}; use file_text(path) with a text of your own"
        )
    text = b"".join((root / name).read_bytes() for name in names)
    return ByteWindows(text, sequence_length=sequence_length)


def file_text(
    path: str | os.PathLike[str], split: str = "train", *, sequence_length: int = 128
) -> ByteWindows:
    """Return a file of yours as byte windows.

    The first nine tenths are for training, the rest is for validation.

    Args:
        path: any file; its bytes are the tokens.
        split: "train" or "validation".
        sequence_length: T, bytes per window.

    Returns:
        A dataset of (x, y) windows, on the CPU.

    Raises:
        ValueError: for another split, or a file that is missing, unreadable, empty, or
            too short for one window.
    """
    require_split(split, "train", "validation")
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(
            f"cannot read {os.fspath(path)!r}: {error.strerror}; give the path of a "
            "readable file"
        ) from error
    border = len(text) * 9 // 10
    part = text[:border] if split == "train" else text[border:]
    try:
        return ByteWindows(part, sequence_length=sequence_length)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r}, {split} part: {error}") from None


def batches(
    data: Dataset[Any],
    *,
    global_batch_size: int,
    shard: Shard | None = None,
    steps: int | None = None,
    seed: int,
    start_step: int = 0,
    transform: Transform | None = None,
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
            number of ranks.

    Returns:
        An iterator over the batches of steps `start_step` to `steps` - 1, as tensors
        on torch's default device.

    Raises:
        ValueError: at the call, for empty data, a number out of range or a mesh of
            several axes; instead of a batch, if a transform changes the number of
            samples.
        TypeError: instead of a batch, for samples or a transform of another kind.
    """
    num_samples = len(data)  # pyright: ignore[reportArgumentType]
    _check_numbers(
        num_samples, global_batch_size=global_batch_size, seed=seed, steps=steps
    )
    one_epoch = -(-num_samples // global_batch_size)
    last_step = one_epoch if steps is None else steps
    if not 0 <= start_step <= last_step:
        raise ValueError(
            f"start_step={start_step} is not in the run of {last_step} steps; choose "
            f"0 to {last_step}, or more steps"
        )
    rank, num_ranks = _place(shard)

    def generate() -> Iterator[Columns]:
        order = _SampleOrder(num_samples, seed)
        for step in range(start_step, last_step):
            start, size = step * global_batch_size, global_batch_size
            if steps is None:
                size = min(size, num_samples - start)
            first = start + size * rank // num_ranks
            last = start + size * (rank + 1) // num_ranks
            device = torch.get_default_device()
            columns = _fetch(data, order.samples(first, last))
            columns = tuple(column.to(device) for column in columns)
            if transform is not None:
                positions = torch.arange(first, last, device="cpu")
                columns = _transformed(transform, columns, positions)
            yield columns

    return generate()


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


def _fetch(data: Dataset[Any], samples: np.ndarray) -> Columns:
    if isinstance(data, (TensorDataset, ByteWindows)):  # index all samples at once
        return tuple(data[torch.from_numpy(samples)])
    # An empty piece takes its columns, dtypes and shapes from sample 0.
    chosen = [data[i] for i in samples.tolist() or [0]]
    columns = default_collate(chosen)
    if not _are_columns(columns):
        raise TypeError(
            f"{type(data).__name__} has a {type(chosen[0]).__name__} for a sample, "
            "but batches needs tuples of tensors and numbers; let __getitem__ return "
            "(x, y), or (x,) for a single one"
        )
    return tuple(column[: len(samples)] for column in columns)


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


def _stdlib_files(root: Path) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _OPTIONAL_FOLDERS and not name.startswith("config-")
        ]
        names += [
            (Path(folder) / name).relative_to(root).as_posix()
            for name in files
            if name.endswith(".py")
            and not name.startswith(("_sysconfigdata", "sitecustomize"))
        ]
    return sorted(names)


def _split_of(name: str) -> str:
    return "validation" if zlib.crc32(name.encode()) % 10 == 0 else "train"
