"""Heartbeats: when a run stands still, say which rank stopped.

A rank that hangs, or that a debugger or the kernel has stopped, raises no error
anywhere: its peers wait for it until a timeout of the process group, which names the
waiting collective but not the one to blame. So a thread of each rank writes a file
every second, and when no step has ended for a while, where the rank is. A process that
writes no more is stopped or gone; else who is not waiting is suspected.

# Note [no clock]
Files of several hosts are compared without their clocks: a rank is alive if its file
changes while another one looks.

Chapter: runs/faults.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from labpkg.processes.diagnosis import Where, suspect
from labpkg.processes.messages import barrier
from labpkg.processes.rank import where
from labpkg.runs.callbacks import Callback, Run

if TYPE_CHECKING:
    from labpkg.runs.composition import StepReport

_SILENT_BEATS = 3


class Heartbeat(Callback):
    """Write signs of life, and name the rank that the others wait for.

    Each rank keeps `folder/rank_<number>.json` up to date: host, pid, steps done and
    for how long none has ended, and then its Python stack. If that lasts `stall_s`, the
    first living rank says whom it suspects, on stderr and in `folder/stall.txt`.

    Args:
        stall_s: After how many seconds without a step; longer than the longest step,
            checkpoint or evaluation, and shorter than the timeout of the process group.
        every_s: Seconds between two beats.
        folder: Where, seen by all ranks; None is `heartbeat` in the folder of the run.
        ends_job: Also kill the suspected process if it is on the host of the rank that
            speaks, else that rank itself, so that the launcher restarts the job now.

    Raises:
        ValueError: If `stall_s` is shorter than three beats.

    Communication: one barrier at the start.
    """

    def __init__(
        self,
        *,
        stall_s: float = 45.0,
        every_s: float = 1.0,
        folder: str | os.PathLike[str] | None = None,
        ends_job: bool = False,
    ) -> None:
        if not 0 < _SILENT_BEATS * every_s <= stall_s:
            raise ValueError(
                f"stall_s={stall_s} is shorter than {_SILENT_BEATS} beats of every_s="
                f"{every_s}, so that a late beat looks like a stopped rank; choose "
                f"stall_s={_SILENT_BEATS * abs(every_s)} or more"
            )
        self.stall_s, self.every_s, self.ends_job = stall_s, every_s, ends_job
        self.folder = None if folder is None else Path(folder)
        self._num_beats = 0
        self._ended: threading.Event | None = None  # made where it is used

    def on_start(self, run: Run) -> None:
        """Show the first sign of life, and watch from when all have.

        Args:
            run: The run.
        """
        self._folder = self.folder or run.config.out / "heartbeat"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._function_thread = threading.get_ident()
        self._step, self._since = run.step, time.monotonic()
        ended = self._ended = threading.Event()
        self._beat()
        barrier()  # no rank may find the file of an earlier attempt
        self._thread = threading.Thread(target=self._watch, args=[ended], daemon=True)
        self._thread.start()

    def after_step(self, run: Run, report: StepReport) -> None:
        """Note that a step has ended.

        Args:
            run: The run.
            report: What the step has found.
        """
        self._step, self._since = run.step, time.monotonic()

    def after_save(self, run: Run, path: Path) -> None:
        """Note that something has ended; after the last step stop watching.

        Args:
            run: The run.
            path: The folder of the checkpoint.
        """
        self._since = time.monotonic()
        if run.step >= run.config.steps:
            self.close()

    def close(self) -> None:
        """Stop the thread."""
        if self._ended is not None:
            self._ended.set()

    def _watch(self, ended: threading.Event) -> None:
        told = -math.inf  # a stall is told once, named by when its last step ended
        while not ended.wait(self.every_s):
            since = self._since
            is_stall = time.monotonic() - since >= self.stall_s
            with suppress(OSError):  # a full disk; the next beat may find room
                self._beat()
                if is_stall and since != told and self._speak(since, ended):
                    told = since

    def _beat(self) -> None:
        self._num_beats += 1
        idle_s = time.monotonic() - self._since
        beat: dict[str, Any] = {
            "beat": self._num_beats,
            "host": _host(),
            "pid": os.getpid(),
            "step": self._step,
            "idle_s": round(idle_s, 1),
        }
        if 2 * idle_s >= self.stall_s:
            place = where(self._function_thread)
            beat["collective"], beat["stack"] = place.collective, place.stack
            beat["num_issued"] = place.num_issued
        path = self._path(self._rank)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(beat))
        partial.replace(path)

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.json"

    def _speak(self, since: float, ended: threading.Event) -> bool:
        """Report, if this is the first living rank; return whether it has spoken."""
        before = self._read()
        for _ in range(_SILENT_BEATS):
            if ended.wait(self.every_s):
                return False
            self._beat()
        after = self._read()
        if self._since != since:
            return False  # late, but it goes on
        # See Note [no clock].
        silent = {r for r in after if after[r]["beat"] == before[r]["beat"]}
        if any(rank < self._rank for rank in after if rank not in silent):
            return False  # that one will speak, unless it stops, too
        places = {
            rank: Where(
                stack=beat.get("stack", ""),
                collective=beat.get("collective", ""),
                num_issued=beat.get("num_issued"),
                is_stopped=rank in silent and not _may_be_late(beat),
            )
            for rank, beat in after.items()
        }
        guilty, reason = suspect(places, [], {})
        self._report(guilty, reason, after[guilty], places)
        if self.ends_job:
            self._end_job(after[guilty])
        return True

    def _read(self) -> dict[int, dict[str, Any]]:
        return {r: json.loads(self._path(r).read_text()) for r in range(self._size)}

    def _report(
        self, guilty: int, reason: str, beat: dict[str, Any], places: dict[int, Where]
    ) -> None:
        if guilty in places and places[guilty].is_stopped:
            reason = "it gives no sign of life, so its process is stopped or gone"
        else:
            reason = f"it {reason}"
        others = [f"  (rank {r}: {places[r]})" for r in sorted(places) if r != guilty]
        lines = [
            f"no step has ended for {self.stall_s:g} s after step {self._step}; rank "
            f"{guilty} (pid {beat['pid']} on {beat['host']}) is suspected (an "
            f"inference): {reason}",
            *others,
            *places[guilty].stack.splitlines(),
        ]
        text = "\n".join(lines) + "\n"
        (self._folder / "stall.txt").write_text(text)
        sys.stderr.write(text)
        sys.stderr.flush()

    def _end_job(self, beat: dict[str, Any]) -> None:
        if beat["host"] == _host():
            with suppress(ProcessLookupError):
                os.kill(beat["pid"], signal.SIGKILL)
        else:
            os._exit(1)  # the engine ends the ranks of all hosts when one fails


def _may_be_late(beat: dict[str, Any]) -> bool:
    """Whether a process without a beat is of this host and neither stopped nor gone.

    It may wait for a processor, or its threads for one that never yields.
    """
    if beat["host"] != _host():
        return False
    try:
        stat = Path(f"/proc/{beat['pid']}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "TtZX"


def _host() -> str:
    """Return the name of what a pid belongs to: containers have pids of their own."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid").removeprefix("pid:")
    return f"{socket.gethostname()}{space}"
