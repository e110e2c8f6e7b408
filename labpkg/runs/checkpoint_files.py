"""The files of a checkpoint: tensors in safetensors, and a manifest of them all.

A checkpoint is a folder `step_000100`. `model-<rank>-<k>.safetensors` and
`training-<rank>-<k>.safetensors` hold the pieces that a rank has written, the k-th
piece of each tensor in the k-th file, with the offsets where torch's
`HuggingFaceStorageReader` looks for them. `manifest.json` says what there is in all:
shapes, where each piece lies, size and CRC-32 of each file, all that is no tensor, and
its own SHA-256. Nothing is a pickle, so nothing that is read can run code.

CRC-32 finds every flipped bit and costs a fraction of what writing costs; it is no
protection against somebody who wants to deceive.

Chapter: runs/checkpointing. Reference: Pillai et al. 2014, All file systems are not
created equal, OSDI (why write, flush and rename in this order).
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORMAT = "labpkg-checkpoint"
VERSION = 2
MANIFEST = "manifest.json"
_CHUNK_BYTES = 2**20  # stays in the cache between reading and checksum
_OFFSETS = "DCP_SHARDING_INFO"  # where torch.distributed.checkpoint looks
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class Piece(NamedTuple):
    """A box of a tensor: what one rank writes of it.

    Attributes:
        name: Of the whole tensor.
        offsets: Where it begins there.
        sizes: Its shape.
    """

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a verified checkpoint says about itself.

    Attributes:
        step: Optimizer steps done.
        identity: What decides the weights of its run; see `TrainConfig.identity`.
        state: What the run gave to be saved with it; tensors on the CPU once loaded.
        world_size: Ranks that saved it; any number can load it.
        names: Each name of the model, and the name under which its tensor is saved:
            the same for tied parameters.
        tensors: Dtype and shape of each tensor by its name.
        extras: What modules keep that is no tensor.
        optimizer: Class, groups and numbers of the optimizer; None without one.
        random: The random state of each rank.
        files: Size, CRC-32 and pieces of each file by its name.
    """

    step: int
    identity: dict[str, Any]
    state: Any
    world_size: int
    names: dict[str, str]
    tensors: dict[str, list[Any]]
    extras: dict[str, Any]
    optimizer: dict[str, Any] | None
    random: list[Any]
    files: dict[str, dict[str, Any]]


_FIELDS = tuple(Manifest.__dataclass_fields__)


def dtype_name(dtype: torch.dtype) -> str | None:
    """Return what safetensors calls a dtype, or None if it has no such thing."""
    return _NAMES.get(dtype)


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of a name of safetensors."""
    return _DTYPES[name]


# ---- writing -----------------------------------------------------------------------


def write_tensors(path: Path, pieces: Iterable[tuple[Piece, Tensor]]) -> dict[str, Any]:
    """Write pieces to a new file, flush it, and return its entry in the manifest.

    One piece after the other is copied to the CPU, so there is never a second copy of
    all of them.

    Args:
        path: The file.
        pieces: At most one for each name.

    Raises:
        OSError: If it cannot be written.
    """
    # Elements lie at multiples of their size if the large ones come first.
    ordered = sorted(pieces, key=lambda p: -p[1].element_size())
    header: dict[str, Any] = {
        "__metadata__": {
            _OFFSETS: json.dumps(
                {p.name: {"saved_offsets": list(p.offsets)} for p, _ in ordered}
            )
        }
    }
    end = 0
    for piece, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[piece.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(piece.sizes),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    num_bytes = 8 + len(text) + end
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        if hasattr(os, "posix_fallocate"):  # faster, and a full disk is found at once
            os.posix_fallocate(fd, 0, num_bytes)
        _write(fd, memoryview(len(text).to_bytes(8, "little") + text))
        for _, tensor in ordered:
            flat = tensor.detach().cpu().reshape(-1)
            _write(fd, flat.view(torch.uint8).numpy().data)
        # The disk takes long, and needs no processor.
        with ThreadPoolExecutor(1) as pool:
            checksum = pool.submit(_size_and_checksum, path)
            os.fsync(fd)
    finally:
        os.close(fd)
    return {
        "bytes": num_bytes,
        "crc32": checksum.result()[1],
        "pieces": {p.name: [list(p.offsets), list(p.sizes)] for p, _ in ordered},
    }


def _write(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint with its own checksum.

    Args:
        path: The folder of the checkpoint.
        manifest: What to write.

    Raises:
        OSError: If it cannot be written.
    """
    named = {name: getattr(manifest, name) for name in _FIELDS}
    fields = {"format": FORMAT, "version": VERSION, **named}
    with open(path / MANIFEST, "wb") as file:
        file.write(json.dumps({**fields, "sha256": _sha256(fields)}).encode())
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Let the names in a folder reach the disk, which the flush of a file does not.

    Raises:
        OSError: If the folder cannot be flushed.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- reading -----------------------------------------------------------------------


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read what a checkpoint says about itself, and verify that but not its files.

    Args:
        path: The folder of the checkpoint.

    Returns:
        The manifest.

    Raises:
        ValueError: If it is missing, foreign, of another version, or damaged.
    """
    path = Path(path)
    try:
        fields = json.loads((path / MANIFEST).read_bytes())
        checksum = fields.pop("sha256", None)
        is_ours = fields["format"] == FORMAT
    except OSError as error:
        raise bad(path, f"{MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise bad(path, f"{MANIFEST} is damaged or foreign") from None
    if not is_ours:
        raise bad(path, f"its format is {fields['format']!r}, not {FORMAT!r}")
    if fields.get("version") != VERSION:
        raise bad(
            path,
            f"it has version {fields.get('version')}, and this labpkg reads {VERSION}",
        )
    if checksum != _sha256(fields):
        raise bad(path, f"{MANIFEST} is damaged (its checksum differs)")
    try:
        manifest = Manifest(**{name: fields[name] for name in _FIELDS})
    except KeyError as error:
        raise bad(path, f"{MANIFEST} lacks {error}") from None
    for name in manifest.files:
        if Path(name).name != name:
            raise bad(path, f"{MANIFEST} names {name!r}, which is not a file in it")
    return manifest


def verify_files(path: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Check every byte of files of a checkpoint.

    Args:
        path: The folder of the checkpoint.
        files: Their entries in the manifest, by name.

    Returns:
        What is wrong with the first that is damaged, or None.
    """
    for name, expected in files.items():
        try:
            num_bytes, checksum = _size_and_checksum(path / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if num_bytes != expected["bytes"]:
            return f"{name} has {num_bytes} bytes instead of {expected['bytes']}"
        if checksum != expected["crc32"]:
            return f"{name} is damaged (its CRC-32 differs)"
    return None


def _size_and_checksum(path: Path) -> tuple[int, int]:
    buffer = bytearray(_CHUNK_BYTES)
    num_bytes = checksum = 0
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(buffer):
            checksum = zlib.crc32(memoryview(buffer)[:n], checksum)
            num_bytes += n
    return num_bytes, checksum


def bad(path: Path, why: str) -> ValueError:
    """Return the error for a checkpoint that cannot be used."""
    return ValueError(
        f"{path} is not a usable checkpoint: {why}; choose another step_* folder"
    )


def _sha256(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
