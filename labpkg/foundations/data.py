"""Data that is on every machine, and batches that do not depend on who reads them.

Contract of `batches`: the batch of a step is a function of (seed, step), and the ranks
of an axis cut it into contiguous pieces, so n ranks together see exactly the samples
of one process, in the same order; a run resumes at any step without replaying one.
Nothing is downloaded: digits come with scikit-learn, text is the source of the Python
standard library.

Chapters: foundations/training_loop, processes/data_loading.
"""

from __future__ import annotations

import os
import sysconfig
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

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
        ValueError: if the text is too short for one window, or T < 1.
    """

    def __init__(self, text: bytes | bytearray, *, sequence_length: int) -> None:
        if sequence_length < 1:
            raise ValueError(
                f"sequence_length={sequence_length} must be at least 1; choose e.g. 128"
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


def digits(split: str = "train") -> TensorDataset:
    """Return scikit-learn's 8 x 8 handwritten digits.

    Every fifth image of each class is a test image, so both parts hold the classes in
    equal proportion and the split never changes.

    Args:
        split: "train" (1442 images) or "test" (355).

    Returns:
        x (N, 64) float32 in [0, 1] and y (N,) int64, on the CPU.

    Raises:
        ValueError: for another split, or without scikit-learn.

    Reference:
        Alpaydin and Kaynak 1998, Optical recognition of handwritten digits,
        doi:10.24432/C50P49.
    """
    _require_split(split, "train", "test")
    # Read from scikit-learn's folder: to import it would cost each rank a second.
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise ValueError("digits() needs scikit-learn; pip install scikit-learn")
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(file, delimiter=",", dtype=np.float32)  # 64 pixels, then y
    x, y = table[:, :-1], table[:, -1].astype(np.int64)
    is_test = np.zeros(len(y), dtype=bool)
    for label in range(10):
        is_test[np.flatnonzero(y == label)[4::5]] = True
    chosen = is_test if split == "test" else ~is_test
    return TensorDataset(torch.from_numpy(x[chosen] / 16), torch.from_numpy(y[chosen]))


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
    _require_split(split, "train", "validation")
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
        ValueError: for another split, or a file that is missing, unreadable, or too
            short for one window.
    """
    _require_split(split, "train", "validation")
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
) -> Iterator[tuple[Tensor, ...]]:
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

    Returns:
        An iterator over the batches of steps `start_step` to `steps` - 1, as tensors
        on torch's default device.

    Raises:
        ValueError: at the call, for empty data or a number out of range.
        TypeError: instead of the first batch, for samples of another kind.
    """
    num_samples = len(data)  # pyright: ignore[reportArgumentType]
    if num_samples == 0:
        raise ValueError("the dataset is empty; give at least one sample")
    if global_batch_size < 1 or seed < 0:
        raise ValueError(
            f"global_batch_size={global_batch_size} must be at least 1 and seed={seed} "
            "at least 0"
        )
    one_epoch = -(-num_samples // global_batch_size)
    last_step = one_epoch if steps is None else steps
    if not 0 <= start_step <= last_step:
        raise ValueError(
            f"start_step={start_step} is not in the run of {last_step} steps; choose "
            f"0 to {last_step}, or more steps"
        )
    rank, num_ranks = (
        (0, 1) if shard is None else (shard.get_local_rank(), shard.size())
    )

    def generate() -> Iterator[tuple[Tensor, ...]]:
        order = _SampleOrder(num_samples, seed)
        for step in range(start_step, last_step):
            start, size = step * global_batch_size, global_batch_size
            if steps is None:
                size = min(size, num_samples - start)
            first = start + size * rank // num_ranks
            last = start + size * (rank + 1) // num_ranks
            device = torch.get_default_device()
            columns = _fetch(data, order.samples(first, last))
            yield tuple(column.to(device) for column in columns)

    return generate()


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


def _fetch(data: Dataset[Any], samples: np.ndarray) -> tuple[Tensor, ...]:
    if isinstance(data, (TensorDataset, ByteWindows)):  # index all samples at once
        return tuple(data[torch.from_numpy(samples)])
    # An empty piece takes its columns, dtypes and shapes from sample 0.
    chosen = [data[i] for i in samples.tolist() or [0]]
    columns = default_collate(chosen)
    is_row = isinstance(columns, (tuple, list))  # of a tensor it would iterate the rows
    if not is_row or not all(isinstance(column, Tensor) for column in columns):
        raise TypeError(
            f"{type(data).__name__} has a {type(chosen[0]).__name__} for a sample, "
            "but batches needs tuples of tensors and numbers; let __getitem__ return "
            "(x, y), or (x,) for a single one"
        )
    return tuple(column[: len(samples)] for column in columns)


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


def _require_split(split: str, *choices: str) -> None:
    if split not in choices:
        raise ValueError(f"split={split!r} is unknown; choose {' or '.join(choices)}")
