"""Faults of a run, noticed on every rank at the same step: callbacks of the `Trainer`.

Synchronous training goes on only if all ranks do the same. So what one rank notices is
agreed on at the end of a step, by a few bytes; a decision by numbers that are equal on
all ranks, such as the loss, needs none. `heartbeat` notices what ends no step at all,
`stragglers` who needs longer than its peers.

Chapter: runs/faults. References: Chowdhery et al. 2022, PaLM, arXiv:2204.02311 (spikes
of the loss); Dixit et al. 2021, Silent Data Corruptions at Scale, arXiv:2102.11245.
"""

from __future__ import annotations

import math
import signal
import statistics
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from labpkg.processes.collectives import all_reduce
from labpkg.processes.messages import all_gather_object
from labpkg.processes.replicas import check_replicas
from labpkg.processes.traffic import axis_of
from labpkg.processes.transport import control_device
from labpkg.runs.attempts import NOTICES
from labpkg.runs.callbacks import Callback, Run

if TYPE_CHECKING:
    from labpkg.runs.composition import StepReport


class Preemption(Callback):
    """Save and stop when a signal announces that the machine will be taken.

    Batch systems send SIGTERM or SIGUSR1 (`sbatch --signal=B:USR1@120`), often to one
    process or one node. All ranks agree after each step whether any of them has got
    one, save a checkpoint together and stop; `labpkg train` then ends with exit code
    75, "try again later", and the same command with `--resume` goes on.

    The handlers are there from the first step to the end of the run. Python gives
    signals to the main thread only: a run in another thread notices none itself.

    Communication: after each step an all_reduce of 8 bytes.
    """

    def __init__(self) -> None:
        self._got = 0
        self._before: dict[int, Any] = {}

    def on_start(self, run: Run) -> None:
        """Take over the signals.

        Args:
            run: The run.
        """
        self._got = 0
        if threading.current_thread() is threading.main_thread():
            for number in NOTICES:
                self._before[number] = signal.signal(number, self._notice)

    def after_step(self, run: Run, report: StepReport) -> None:
        """Stop on all ranks if one of them has got a signal.

        Args:
            run: The run.
            report: What the step has found.
        """
        number = int(_largest(self._got))
        if number:
            name = signal.Signals(number).name
            run.stop(f"{name} announced the end of the job")

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():  # None is one that is not Python's
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _notice(self, number: int, _: object) -> None:
        self._got = number


class SkippedSteps(Callback):
    """End a run that only skips: after so many steps in a row it learns nothing.

    Single skipped steps are harmless, and fp16 starts with several while its scale
    falls.

    Args:
        max_in_a_row: How many may follow each other.

    Raises:
        ValueError: If the number is below 1.
    """

    def __init__(self, *, max_in_a_row: int = 30) -> None:
        if max_in_a_row < 1:
            raise ValueError(
                f"max_in_a_row={max_in_a_row} ends a run at its first skipped step or "
                "before; choose 1 or more"
            )
        self.max_in_a_row = max_in_a_row
        self._in_a_row = 0

    def on_start(self, run: Run) -> None:
        """Forget the steps of another run.

        Args:
            run: The run.
        """
        if run.step == 0:
            self._in_a_row = 0

    def after_step(self, run: Run, report: StepReport) -> None:
        """Count; the report is the same on every rank.

        Args:
            run: The run.
            report: What the step has found.

        Raises:
            RuntimeError: On every rank, if there were too many.
        """
        self._in_a_row = 0 if report.skipped is None else self._in_a_row + 1
        if self._in_a_row > self.max_in_a_row:
            raise RuntimeError(
                f"{self._in_a_row} steps in a row were skipped, the last one, step "
                f"{run.step}, because {report.skipped}; resume from an older "
                "checkpoint with a lower learning rate"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return how many steps in a row were skipped."""
        return {"in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting.

        Args:
            state: From the checkpoint.
        """
        self._in_a_row = state["in_a_row"]


class LossSpike(Callback):
    """Skip a step whose loss is far above the usual, on all ranks together.

    A step is left out if its loss exceeds `factor` times the median loss of the last
    `window` steps that were done. The loss is the same number on every rank, so nothing
    is communicated. The losses are part of a checkpoint: a resumed run decides alike.

    Args:
        factor: How many times the median is too much, above 1.
        window: Steps that are looked back on; the rule starts after a fifth of them.

    Raises:
        ValueError: If a number is too small.

    Reference: Chowdhery et al. 2022, arXiv:2204.02311, section 5.1, which goes back to
    a checkpoint and leaves out the batches around a spike.
    """

    def __init__(self, *, factor: float = 2.0, window: int = 100) -> None:
        if not factor > 1 or window < 5:
            raise ValueError(
                f"factor={factor} must be above 1 and window={window} at least 5, or "
                "ordinary steps are skipped; choose e.g. factor=2, window=100"
            )
        self.factor, self.window = factor, window
        self._losses: deque[float] = deque(maxlen=window)
        self._rules: list[Any] = []

    def on_start(self, run: Run) -> None:
        """Add the rule to those of the composition.

        Args:
            run: The run.
        """
        if run.step == 0:
            self._losses.clear()  # those of another run
        self._rules = run.composition.skip_rules
        self._rules.append(self._judge)

    def close(self) -> None:
        """Take the rule away."""
        if self._judge in self._rules:
            self._rules.remove(self._judge)

    def state_dict(self) -> dict[str, Any]:
        """Return the losses that the next step is compared with."""
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the losses.

        Args:
            state: From the checkpoint.
        """
        self._losses = deque(state["losses"], maxlen=self.window)

    def _judge(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if len(self._losses) >= self.window // 5:
            usual = statistics.median(self._losses)
            if loss > self.factor * usual:
                return (
                    f"its loss {loss:.4g} is {loss / usual:.1f} times the median "
                    f"{usual:.4g} of {len(self._losses)} steps"
                )
        self._losses.append(loss)
        return None


class ReplicaCheck(Callback):
    """Prove now and then that replicas are still equal, bit by bit.

    A flipped bit in one rank, or an update that it has missed, raises no error, and
    training goes on with different models. Every `every` steps, before a checkpoint of
    the same step, the ranks compare fingerprints over `dp`, within each stage and each
    part of the layers. At `zero=1` and 2 only a change since the last step shows.

    Args:
        every: Steps between two checks; None takes `checkpoint_every` of the run.

    Raises:
        ValueError: If the number is below 1.

    Communication: about 100 bytes per tensor every so many steps.

    Reference: Dixit et al. 2021, arXiv:2102.11245.
    """

    def __init__(self, *, every: int | None = None) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every={every} is too small; choose 1 or more")
        self.every = every

    def on_start(self, run: Run) -> None:
        """Refuse a run in which there is nothing to compare.

        Args:
            run: The run.

        Raises:
            ValueError: On every rank.
        """
        layout = run.composition.layout
        if layout.dp == 1 or layout.zero == 3:
            why = "dp=1" if layout.dp == 1 else "zero=3"
            raise ValueError(
                f"{why} leaves one copy of each parameter, so that there are no "
                "replicas to compare; leave ReplicaCheck out"
            )
        if self._every(run) < 1:
            raise ValueError(
                "checkpoint_every=0 does not say how often replicas are compared; give "
                "ReplicaCheck its own every"
            )

    def after_step(self, run: Run, report: StepReport) -> None:
        """Compare, if it is time.

        Args:
            run: The run.
            report: What the step has found.

        Raises:
            RuntimeError: On every rank, with each differing rank and its first
                differing parameter.
        """
        if run.step % self._every(run):
            return
        axis, found = run.composition.mesh["dp"], ""
        try:
            check_replicas(run.composition.model, axis, buffers=False)
        except RuntimeError as error:
            ranks = dist.get_process_group_ranks(axis.get_group())
            where = "" if len(ranks) == dist.get_world_size() else f" of ranks {ranks}"
            found = f"after step {run.step}{where}: {error}"
        strays = dict.fromkeys(text for text in all_gather_object(found) if text)
        if strays:
            raise RuntimeError("\n".join(strays))

    def _every(self, run: Run) -> int:
        return run.config.checkpoint_every if self.every is None else self.every


def _largest(value: float) -> float:
    """Return the largest value of all ranks."""
    device = control_device(axis_of(None).group)
    mine = torch.tensor([value], dtype=torch.float64, device=device)
    return all_reduce(mine, op="max").item()
