"""One writer for each folder of checkpoints.

Two jobs that save into one folder would remove each other's checkpoints as leftovers.
So the process that writes holds a file `.lock`, which says who it is. A process that
ended without giving it back, killed or with its machine, is recognised: no process of
this number runs, or one that started at another time, or the machine did. No clock
decides, so hosts whose clocks differ agree.

# Note [taking over]
Whoever finds a lock of a process that is gone must not simply remove it: by then it may
be that of a third. So there is one claim for each such holder, a file which only one
process can create. The one that has it looks at the lock again, and replaces it in one
move, so that there is a lock at any time. The claim of a process that is gone is taken
over like a lock.

Chapter: runs/checkpointing.
"""

from __future__ import annotations

import json
import os
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_LOCK = ".lock"
_JOBS = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")
_NO_JOB = (None, "", "none")  # the last is torchrun's name for any job
_NUM_TRIES, _PAUSE_S = 10, 0.02


@contextmanager
def claim_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Let this process alone save checkpoints into a folder, inside the block.

    Nothing happens if this process has claimed it already. What a process that has
    ended, or an earlier attempt of the same job, had claimed is taken over.

    Args:
        folder: Where checkpoints are collected; it is made if it is missing.

    Raises:
        ValueError: If another process that runs has claimed the folder.
        OSError: If the folder cannot be written to.
    """
    is_new = take_lock(folder)
    try:
        yield
    finally:
        if is_new:
            give_lock_back(folder)


def take_lock(folder: str | os.PathLike[str]) -> bool:
    """Claim a folder until `give_lock_back`; return False if this process has it.

    Args:
        folder: Where checkpoints are collected; it is made if it is missing.

    Raises:
        ValueError: If another process that runs has claimed the folder.
        OSError: If the folder cannot be written to.
    """
    path, me = Path(folder) / _LOCK, _who_am_i()
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(_NUM_TRIES):
        with suppress(FileExistsError):
            _create(path, me)
            return True
        holder = _read(path)
        if holder == me:
            return False
        if holder and _is_alive(holder, me):
            break
        # One that says nothing may be written just now.
        is_gone = bool(holder) or attempt >= _NUM_TRIES // 2
        if is_gone and _take_over(path, holder, me):
            return True
        time.sleep(_PAUSE_S)
    raise _refused(folder, _read(path))


def _create(path: Path, me: dict[str, Any]) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.write(fd, json.dumps(me).encode())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _take_over(path: Path, holder: dict[str, Any], me: dict[str, Any]) -> bool:
    """Put this process in the place of a holder who is gone; see Note [taking over]."""
    claim = path.with_name(f"{path.name}-{zlib.crc32(_text(holder).encode()):08x}")
    try:
        _create(claim, me)
    except FileExistsError:
        rival = _read(claim)
        if not rival or _is_alive(rival, me) or not _take_over(claim, rival, me):
            return False
    try:
        if _read(path) != holder:
            return False
        mine = claim.with_name(f"{claim.name}-mine")
        mine.write_text(_text(me))
        mine.replace(path)
        return True
    finally:
        claim.unlink(missing_ok=True)


def _text(holder: dict[str, Any]) -> str:
    return json.dumps(holder, sort_keys=True)


def give_lock_back(folder: str | os.PathLike[str]) -> None:
    """Let others claim a folder that this process has.

    Args:
        folder: Where checkpoints are collected.
    """
    path = Path(folder) / _LOCK
    if _read(path) == _who_am_i():
        path.unlink(missing_ok=True)


def _who_am_i() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pids": _process_space(),
        "boot": _boot(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "job": next((j for j in map(os.environ.get, _JOBS) if j not in _NO_JOB), None),
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_alive(holder: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether the holder may still write."""
    if any(holder.get(key) != me[key] for key in ("host", "pids")):
        # Nobody can look there; but a launcher ends an attempt before the next.
        return me["job"] is None or holder.get("job") != me["job"]
    if holder.get("boot") != me["boot"]:
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, as somebody else
    return _started(holder["pid"]) == holder.get("started")


def _boot() -> str | None:
    """Return what changes when the machine starts again, where the system tells."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _process_space() -> str | None:
    """Return where numbers of processes mean something: a container has its own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Return when a process was started, in ticks of the machine, if it tells."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # its name may contain spaces
    return "dead" if fields[0] in "ZX" else fields[19]


def _refused(folder: str | os.PathLike[str], holder: dict[str, Any]) -> ValueError:
    return ValueError(
        f"{folder} is written to by process {holder.get('pid')} on host "
        f"{holder.get('host')}, and two writers would remove each other's checkpoints; "
        f"choose another folder, or remove {Path(folder) / _LOCK} if that process has "
        "ended"
    )
