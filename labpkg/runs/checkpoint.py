"""Checkpoints: a folder that is either complete and verified, or not there.

A checkpoint is a folder `step_000100` with three files: `model.safetensors` (weights,
readable by any tool), `training.pt` (optimizer and random states, loaded with
`weights_only=True`, so it can run no code) and `manifest.json` (format, step, identity
of the run, size and SHA-256 of the files, and its own checksum).

Contract: saving writes to a sibling folder, flushes it to the disk and renames it, so
whatever breaks off leaves the older checkpoints as they are. Loading verifies before it
changes anything. The position in the data needs no file: a batch is a function of
(seed, step).

# Note [replacing]
No rename takes the place of a folder that is not empty. So an older checkpoint of the
same step moves to a hidden name first, under which `newest_checkpoint` finds it should
the process end right then; `clean_up` then gives it its name back.

Chapter: runs/checkpointing. Reference: Pillai et al. 2014, All file systems are not
created equal, OSDI (why write, flush and rename in this order).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_FORMAT = "labpkg-checkpoint"
_VERSION = 1
_WEIGHTS, _TRAINING, _MANIFEST = "model.safetensors", "training.pt", "manifest.json"
# They start with a dot: no pattern for checkpoints finds them.
_PARTIAL, _REPLACED = ".partial-", ".replaced-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a verified checkpoint says about itself.

    Attributes:
        step: Optimizer steps done.
        identity: What decides the weights of its run; see `TrainConfig.identity`.
        files: Size and SHA-256 of each file by its name.
    """

    step: int
    identity: dict[str, Any]
    files: dict[str, dict[str, Any]]


def random_state() -> dict[str, Tensor]:
    """Return the state of torch's random generators of this rank."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # else asking would take memory of a GPU
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def save_checkpoint(
    folder: str | os.PathLike[str],
    *,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    identity: Mapping[str, Any] | None = None,
    random_states: Sequence[Mapping[str, Tensor]] | None = None,
) -> Path:
    """Save a training state so that a run can go on bit by bit from it.

    One rank calls it; with data parallelism every rank holds the same weights. The
    files are built in memory first (a second copy of the state, on the CPU).

    Args:
        folder: Where checkpoints are collected; the new one is
            `folder/step_<six digits>` and replaces one of the same step.
        step: Optimizer steps done.
        model: Its state is saved under the names of `state_dict`; tied parameters once.
        optimizer: Its state.
        identity: JSON values that a run must share to resume from here.
        random_states: `random_state()` of every rank; None is this process alone.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: If it cannot be written; what is half-written is removed.
    """
    target = Path(folder) / f"step_{step:06d}"
    partial = target.with_name(_PARTIAL + target.name)
    states = (
        [random_state()] if random_states is None else list(map(dict, random_states))
    )
    training = io.BytesIO()
    torch.save(
        {
            "optimizer_class": type(optimizer).__name__,
            "optimizer": optimizer.state_dict(),
            "random_states": states,
        },
        training,
    )
    weights = {n: t.detach().cpu().contiguous() for n, t in _state(model).items()}
    files = {
        _WEIGHTS: safetensors.torch.save(weights),
        _TRAINING: training.getvalue(),
    }
    files[_MANIFEST] = _manifest(step, dict(identity or {}), files)
    try:
        clean_up(folder)
        partial.mkdir(parents=True)
        for name, content in files.items():
            _write(partial / name, content)
        _flush_folder(partial)
        _put_in_place(partial, target)
    except OSError as error:
        with suppress(OSError):
            clean_up(folder)
        failure = OSError(
            f"cannot save {target}: {error.strerror}; the older checkpoints are "
            "intact: make room and resume"
        )
        failure.errno = error.errno
        raise failure from error
    return target


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    rank: int = 0,
) -> Manifest:
    """Verify a checkpoint, then put its state into a model and an optimizer.

    Every rank calls it. A rank that did not exist when it was saved keeps its own
    random state.

    Args:
        path: The folder of the checkpoint.
        model: Gets the weights; names, shapes and dtypes must agree.
        optimizer: Gets its state, built over the same parameters; None leaves it and
            the random state out, as for evaluation.
        rank: Whose random state to restore.

    Returns:
        The manifest.

    Raises:
        ValueError: If the checkpoint is missing, foreign, damaged, or of another
            model; nothing is changed then.
    """
    path = Path(path)
    manifest = read_manifest(path)
    files = {name: _read_file(path, name, manifest) for name in manifest.files}
    weights = safetensors.torch.load(files[_WEIGHTS])
    own = _state(model)
    _check_same_tensors(path, weights, own)
    if optimizer is not None:
        content = io.BytesIO(files[_TRAINING])
        training = torch.load(content, map_location="cpu", weights_only=True)
        _check_same_optimizer(path, training["optimizer_class"], optimizer)
        optimizer.load_state_dict(training["optimizer"])
        if rank < len(training["random_states"]):
            _set_random_state(training["random_states"][rank])
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    return manifest


def verify_checkpoint(path: str | os.PathLike[str]) -> Manifest:
    """Check every byte of a checkpoint against its manifest, without loading it.

    Args:
        path: The folder of the checkpoint.

    Returns:
        The manifest.

    Raises:
        ValueError: If the checkpoint is missing, foreign, of another version, or
            damaged; one line says which file and why.
    """
    manifest = read_manifest(path)
    for name in manifest.files:
        _read_file(Path(path), name, manifest)
    return manifest


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
        manifest = json.loads((path / _MANIFEST).read_bytes())
        checksum = manifest.pop("sha256", None)
        is_ours = manifest["format"] == _FORMAT
    except OSError as error:
        raise _bad(path, f"{_MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _bad(path, f"{_MANIFEST} is damaged or foreign") from None
    if not is_ours:
        raise _bad(path, f"its format is {manifest['format']!r}, not {_FORMAT!r}")
    if manifest.get("version") != _VERSION:
        raise _bad(
            path, f"it has version {manifest.get('version')}, this is {_VERSION}"
        )
    if checksum != _sha256(_canonical(manifest)):
        raise _bad(path, f"{_MANIFEST} is damaged (its checksum differs)")
    return Manifest(**{key: manifest[key] for key in ("step", "identity", "files")})


def newest_checkpoint(
    folder: str | os.PathLike[str],
) -> tuple[Path | None, list[str]]:
    """Find the newest valid checkpoint, and say why newer ones were passed over.

    Args:
        folder: Where checkpoints are collected.

    Returns:
        The checkpoint or None, and one reason for each newer one that is not valid.
    """
    skipped = []
    for path in list_checkpoints(folder):
        try:
            verify_checkpoint(path)
        except ValueError as error:
            skipped.append(str(error))
        else:
            return path, skipped
    return None, skipped


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """List the checkpoints of a folder, valid or not, the newest first.

    Args:
        folder: Where checkpoints are collected; it may be missing.
    """

    def age(path: Path) -> tuple[int, str, bool]:
        name = path.name.removeprefix(_REPLACED)
        return len(name), name, name == path.name  # of one step, the hidden is older

    found = [*Path(folder).glob("step_*"), *Path(folder).glob(f"{_REPLACED}*")]
    return sorted(found, key=age, reverse=True)


def clean_up(folder: str | os.PathLike[str]) -> None:
    """Repair what a save that was broken off has left behind; see Note [replacing].

    For the process that saves, or when there is none: what looks broken off may be a
    save that still goes on.

    Args:
        folder: Where checkpoints are collected; it may be missing.
    """
    for partial in Path(folder).glob(f"{_PARTIAL}*"):
        shutil.rmtree(partial, ignore_errors=True)
    for replaced in Path(folder).glob(f"{_REPLACED}*"):
        target = replaced.with_name(replaced.name.removeprefix(_REPLACED))
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(target)


def _put_in_place(partial: Path, target: Path) -> None:
    replaced = target.with_name(_REPLACED + target.name)  # see Note [replacing]
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    _flush_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return the live tensors of the state by name, a tied one under its first name."""
    found: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {
        name: tensor
        for name, tensor in state.items()
        if found.setdefault(id(tensor), name) == name
    }


def _check_same_tensors(
    path: Path, saved: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> None:
    for name in dict.fromkeys([*own, *saved]):
        theirs, mine = (
            f"{tuple(t.shape)} {t.dtype}" if t is not None else "missing"
            for t in (saved.get(name), own.get(name))
        )
        if theirs != mine:
            raise ValueError(
                f"{path} holds another model: {name} is {theirs} there and {mine} "
                "here; build the model that was saved"
            )


def _check_same_optimizer(path: Path, saved: str, optimizer: Optimizer) -> None:
    own = type(optimizer).__name__
    if saved != own:
        raise ValueError(
            f"{path} holds the state of {saved}, which {own} cannot use; resume with "
            f"{saved}, or load the weights alone (optimizer=None)"
        )


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def _manifest(step: int, identity: dict[str, Any], files: dict[str, bytes]) -> bytes:
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "step": step,
        "identity": identity,
        "files": {
            name: {"bytes": len(content), "sha256": _sha256(content)}
            for name, content in files.items()
        },
    }
    manifest["sha256"] = _sha256(_canonical(manifest))
    return json.dumps(manifest, indent=2).encode()


def _read_file(path: Path, name: str, manifest: Manifest) -> bytes:
    """Return the content of a file of a checkpoint if it is what the manifest says."""
    expected = manifest.files[name]
    try:
        content = (path / name).read_bytes()
    except OSError as error:
        raise _bad(path, f"{name} cannot be read ({error.strerror})") from None
    if len(content) != expected["bytes"]:
        raise _bad(
            path, f"{name} has {len(content)} bytes instead of {expected['bytes']}"
        )
    if _sha256(content) != expected["sha256"]:
        raise _bad(path, f"{name} is damaged (its SHA-256 differs)")
    return content


def _bad(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path} is not a usable checkpoint: {why}; choose another step_* folder"
    )


def _canonical(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    # The names in a folder reach the disk on their own, not with the files.
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
