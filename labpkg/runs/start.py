"""Where a run starts: from which checkpoint, and what becomes of an earlier run.

Contract: two runs never mix in one folder, and a checkpoint is given up only when a
younger run in the same folder has one. So a new run moves the run before it to
`out/previous`, once per job: what a restarted rank finds in `out` is its own.

# Note [once per job]
`labpkg train` moves the earlier run before it starts a rank. Under torchrun nobody is
there before the ranks, so rank 0 does it first of all; should the job be restarted
earlier than that, it refuses the checkpoint of another run and destroys nothing.

Chapter: runs/checkpointing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from labpkg.runs.checkpoint import (
    clean_up,
    list_checkpoints,
    newest_checkpoint,
    read_manifest,
    verify_checkpoint,
)
from labpkg.runs.checkpoint_lock import claim_folder
from labpkg.runs.config import TrainConfig, first_difference

_OWN = ("newest", "auto")  # go on in the own folder


def find_start(config: TrainConfig, fingerprint: str) -> tuple[Path | None, list[str]]:
    """Find the checkpoint that a run starts from; nothing is changed.

    A restarted job takes the newest valid one of its own, and without one starts as it
    did the first time; so does `resume="auto"`, which finds out by itself whether it is
    the first time.

    Args:
        config: The resolved run.
        fingerprint: The checksum of its training data.

    Returns:
        The verified checkpoint or None, and what was passed over and why.

    Raises:
        ValueError: If the checkpoint is not usable, belongs to another run, or there is
            none where one was asked for, or if another job writes to `out`.
    """
    folder = config.out / "checkpoints"
    checkpoint, skipped = None, []
    if folder.exists():
        with claim_folder(folder):  # or refuse while another job writes there
            pass
    if _is_restart() or config.resume in _OWN:
        checkpoint, skipped = newest_checkpoint(folder)
    if checkpoint is None and config.resume == "newest":
        why = "; ".join(skipped) or "it has none"
        raise ValueError(
            f"{folder} has no checkpoint to resume from ({why}); start without resume, "
            "or with resume='auto'"
        )
    if checkpoint is None and config.resume not in (None, "auto"):
        checkpoint = Path(config.resume)
        verify_checkpoint(checkpoint)
    if checkpoint is not None:
        _require_same_run(checkpoint, config.identity(fingerprint))
    return checkpoint, [f"Skipped: {reason}" for reason in skipped]


def set_aside(config: TrainConfig) -> list[str]:
    """Move an earlier run out of the way of this one, to `out/previous`.

    Nothing happens in a restarted job, or when the run goes on in its own folder. What
    a run without a checkpoint has left is removed: it replaces no earlier run.

    Args:
        config: The run; `find_start` has accepted it.

    Returns:
        What was done, in a line.

    Raises:
        ValueError: If the checkpoint to resume from would be removed.
    """
    out, previous = config.out, config.out / "previous"
    checkpoints, scalars = out / "checkpoints", out / "tensorboard"
    if _is_restart() or config.resume in _OWN or _is_inside(config, checkpoints):
        return []
    if not list_checkpoints(checkpoints):
        shutil.rmtree(scalars, ignore_errors=True)
        return []
    if _is_inside(config, previous):
        raise ValueError(
            f"to move the run of {out} to {previous} would remove "
            f"resume={config.resume!r}; choose another out"
        )
    shutil.rmtree(previous, ignore_errors=True)
    previous.mkdir()
    for path in (checkpoints, scalars):
        if path.exists():
            path.rename(previous / path.name)
    return [f"Moved the earlier run of {out} to {previous}."]


def clean_up_after(config: TrainConfig) -> None:
    """Remove what dead ranks have left half done, and their lock.

    Another host could not tell that they are dead. Nothing happens when another job
    writes to `out` by now.

    Args:
        config: The run, whose ranks have ended.
    """
    folder = config.out / "checkpoints"
    if folder.exists():
        with suppress(ValueError, OSError), claim_folder(folder):
            clean_up(folder)


def _is_restart() -> bool:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _is_inside(config: TrainConfig, folder: Path) -> bool:
    """Whether the run resumes from a checkpoint of a folder."""
    resume = config.resume
    return resume is not None and folder.resolve() in Path(resume).resolve().parents


def _require_same_run(checkpoint: Path, own: Mapping[str, Any]) -> None:
    difference = first_difference(read_manifest(checkpoint).identity, own)
    if difference is not None:
        raise ValueError(
            f"{checkpoint} belongs to another run: {difference}; resume with the same "
            "options, or start a new run in another folder (out)"
        )
