"""Whether a job is started again: what its launcher and its ranks tell each other.

The elastic engine restarts a job after any failure. Two endings are no failures that
another attempt could heal: a refusal, and a notice that the machine will be taken.

# Note [notice]
SIGTERM and SIGUSR1 are how batch systems and clouds announce the end. They go on to the
ranks, which may save and return: then `launch` returns, too. Ranks that do not handle
the signal die of it, and the job ends. In neither case is anything started again.

Chapter: runs/faults.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NOTICES = (signal.SIGTERM, signal.SIGUSR1)
"""Signals by which batch systems and clouds announce the end of a job."""
_GRACE_S = 30  # what torchrun gives its ranks after SIGTERM, too


class NoRestart(Exception):
    """The job must not be started again."""


class Job:
    """What launcher and ranks tell each other, through a folder that both know.

    Args:
        folder: An empty folder; the engine may use it, too.

    Attributes:
        notice: The latest signal that the launcher has passed on, or None.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.notice: int | None = None

    def enter(self) -> None:
        """As a rank: be found by `send`."""
        (self.folder / f"pid-{os.getpid()}").touch()

    def send(self, number: int) -> bool:
        """Send a signal to the ranks.

        Args:
            number: The signal.

        Returns:
            Whether there were any ranks.
        """
        pids = [int(path.name[4:]) for path in self.folder.glob("pid-*")]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        return bool(pids)

    def refuse(self, error: Exception) -> None:
        """As a rank: say that another attempt would end in the same refusal.

        Args:
            error: What it would end in.
        """
        report = {
            "rank": os.environ["RANK"],
            "message": f"{type(error).__name__}: {error}",
            "details": "".join(traceback.format_exception(error)),
        }
        partial = self.folder / f"refusal-{os.getpid()}"
        partial.write_text(json.dumps(report))
        partial.rename(self.folder / "refusal")

    @property
    def refusal(self) -> dict[str, str] | None:
        """What a rank has refused, or None."""
        path = self.folder / "refusal"
        return json.loads(path.read_text()) if path.exists() else None

    def begin_attempt(self) -> None:
        """Forget the ranks of the attempt before, which are dead.

        Raises:
            NoRestart: If another attempt makes no sense.
        """
        if self.notice is not None or self.refusal is not None:
            raise NoRestart
        for path in self.folder.glob("pid-*"):
            path.unlink()


@contextmanager
def notices_passed_on(job: Job) -> Iterator[None]:
    """Let the ranks answer SIGTERM and SIGUSR1; the caller restores the handlers.

    Args:
        job: Whose ranks.
    """
    timers: list[threading.Timer] = []

    def pass_on(number: int, _: object) -> None:
        job.notice = number
        if not job.send(number):
            raise SystemExit(128 + number)  # nobody is there yet
        if number == signal.SIGTERM:
            timers.append(threading.Timer(_GRACE_S, job.send, [signal.SIGKILL]))
            timers[-1].daemon = True
            timers[-1].start()

    for number in NOTICES:
        signal.signal(number, pass_on)
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
