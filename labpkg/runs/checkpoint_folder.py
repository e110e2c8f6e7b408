"""The folder of checkpoints: each is complete, or it is not there.

A checkpoint is written under a hidden name and renamed once all of it is on the disk.
The newest is the one of the highest step: clocks of several hosts, which may differ,
are never asked.

# Note [replacing]
No rename takes the place of a folder that is not empty. So an older checkpoint of the
same step moves to a hidden name first, under which `newest_checkpoint` finds it should
the process end right then; `clean_up` then gives it its name back.

Chapter: runs/checkpointing. Reference: Pillai et al. 2014, All file systems are not
created equal, OSDI.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from labpkg.runs.checkpoint_files import (
    Manifest,
    bad,
    flush_folder,
    read_manifest,
    verify_files,
)

# They start with a dot: no pattern for checkpoints finds them.
_PARTIAL, _REPLACED = ".partial-", ".replaced-"


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
    damage = verify_files(Path(path), manifest.files)
    if damage is not None:
        raise bad(Path(path), damage)
    return manifest


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


def target_of(folder: str | os.PathLike[str], step: int) -> tuple[Path, Path]:
    """Return where the checkpoint of a step will be, and where it is written.

    Args:
        folder: Where checkpoints are collected.
        step: Optimizer steps done.
    """
    target = Path(folder) / f"step_{step:06d}"
    return target, target.with_name(_PARTIAL + target.name)


def put_in_place(partial: Path, target: Path) -> None:
    """Make a checkpoint visible; one of the same step gives way.

    Raises:
        OSError: If it cannot be renamed; then the older one stays.
    """
    flush_folder(partial)
    replaced = target.with_name(_REPLACED + target.name)  # see Note [replacing]
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    flush_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def retire(newest: Path, keep: int) -> None:
    """Remove checkpoints that are older than one just saved.

    Those that are younger stay, whatever they are: the run went back behind them. Of
    the older ones a damaged one counts for nothing and goes, too.

    Args:
        newest: The checkpoint just saved, which stays.
        keep: How many stay, with this one.
    """
    older = list_checkpoints(newest.parent)
    older = older[older.index(newest) + 1 :]
    num_kept = 1
    for path in older:
        if num_kept < keep and _is_complete(path):
            num_kept += 1
        else:
            hidden = path.with_name(_PARTIAL + path.name.removeprefix(_REPLACED))
            with suppress(OSError):  # it stays, and the next save tries again
                path.rename(hidden)  # or a kill would leave one that looks damaged
            shutil.rmtree(hidden, ignore_errors=True)


def _is_complete(path: Path) -> bool:
    """Whether all files are there, at full length; what they contain is not read."""
    try:
        files = read_manifest(path).files
        return all((path / n).stat().st_size == f["bytes"] for n, f in files.items())
    except (ValueError, OSError):
        return False
