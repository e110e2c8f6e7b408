"""Stragglers: ranks that all others wait for, found by their own work.

Chapter: runs/faults.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from labpkg.processes.messages import all_gather_object
from labpkg.processes.traffic import count_comms
from labpkg.runs.callbacks import Callback, Run

if TYPE_CHECKING:
    from labpkg.runs.composition import StepReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Straggler:
    """A rank that needs longer than its peers.

    Attributes:
        rank: Which.
        last_step: The last step of the window in which it was seen.
        own_s: Seconds of its own work in a step, the median of the window.
        usual_s: The same of its peers, the median over them.
    """

    rank: int
    last_step: int
    own_s: float
    usual_s: float

    @property
    def slowdown(self) -> float:
        """How many times longer it needs."""
        return self.own_s / self.usual_s

    def __str__(self) -> str:
        return (
            f"rank {self.rank} is a straggler: it works {self.slowdown:.1f} times as "
            f"long on a step as its peers ({1e3 * self.own_s:.1f} ms, usual "
            f"{1e3 * self.usual_s:.1f} ms, up to step {self.last_step})"
        )


class Stragglers(Callback):
    """Name the ranks that all others wait for.

    A step takes as long on every rank: those that are ready wait. What differs is a
    rank's own work, its time less its waits for transfers. Its median over a window is
    compared with that of its peers: the ranks of its stage, else those of all stages.

    Args:
        factor: From how many times the usual on a rank is reported, above 1.
        window: Steps between two reports.

    Attributes:
        found: Every `Straggler` so far.
        own_s: Each rank's own seconds in a step of the last window, in rank order.

    Raises:
        ValueError: If a number is too small.

    Communication: an all_gather_object of one number in each window.
    """

    def __init__(self, *, factor: float = 2.0, window: int = 50) -> None:
        if not factor > 1 or window < 1:
            raise ValueError(
                f"factor={factor} must be above 1 and window={window} at least 1; "
                "choose e.g. factor=2, window=50"
            )
        self.factor, self.window = factor, window
        self.found: list[Straggler] = []
        self.own_s: list[float] = []
        self._times: list[float] = []
        self._stack = ExitStack()

    def on_start(self, run: Run) -> None:
        """Start the clocks.

        Args:
            run: The run.
        """
        self._times.clear()
        self._log = self._stack.enter_context(count_comms())
        self._mark = self._now()

    def after_step(self, run: Run, report: StepReport) -> None:
        """Note the step; at the end of a window compare all ranks.

        Args:
            run: The run.
            report: What the step has found.
        """
        mark = self._now()
        self._times.append(mark - self._mark)
        if len(self._times) == self.window:
            self._compare(run)
            self._times.clear()
        self._mark = self._now()

    def close(self) -> None:
        """Stop counting."""
        self._stack.close()

    def _now(self) -> float:
        """Return seconds of a clock that stands still while this rank waits."""
        return time.perf_counter() - self._log.wait_s

    def _compare(self, run: Run) -> None:
        self.own_s = all_gather_object(statistics.median(self._times))
        layout = run.composition.layout
        size = layout.dp * layout.tp
        size = size if size > 1 else layout.world_size
        for rank, own in enumerate(self.own_s):
            first = rank - rank % size
            peers = [r for r in range(first, first + size) if r != rank]
            usual = statistics.median([self.own_s[r] for r in peers] or [own])
            if own > self.factor * usual:
                what = {"rank": rank, "last_step": run.step, "own_s": own}
                self.found.append(Straggler(usual_s=usual, **what))
                run.say(str(self.found[-1]))
