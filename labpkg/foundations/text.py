"""Text that is on every machine, as windows of bytes.

Nothing is downloaded: the text is the source of the Python standard library, or yours.
A byte is a token, so there is no tokenizer to train.

Chapter: foundations/transformer.
"""

from __future__ import annotations

import os
import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from labpkg.foundations.tables import require_split

# Left out of the text: what installations of one Python version may lack or add.
_OPTIONAL_FOLDERS = {
    *("__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib"),
    *("tkinter", "turtledemo", "ensurepip", "lib2to3", "distutils"),
}


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
