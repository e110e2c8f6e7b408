"""Callbacks: what else happens in a training run, around its steps.

Contract: every rank calls the same callbacks in the same order at the same step, so a
callback may communicate, and one that decides something lets all ranks decide alike. An
exception in a callback is an error of its rank and ends the job.

Chapters: runs/checkpointing, runs/faults.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from labpkg.runs.composition import Composition, StepReport
    from labpkg.runs.config import TrainConfig


class Run(Protocol):
    """The run that a callback is called from, on one rank."""

    @property
    def config(self) -> TrainConfig:
        """What is trained, with nothing left to choose."""
        ...

    @property
    def composition(self) -> Composition:
        """The model in its engines, its optimizer, its layout and its mesh."""
        ...

    @property
    def step(self) -> int:
        """Steps done, also those that all ranks have skipped."""
        ...

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes and speaks for all."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        ...

    def save(self) -> None:
        """Save a checkpoint of the steps done, unless there is one; all ranks call.

        Raises:
            OSError: If it cannot be written.
        """
        ...

    def stop(self, reason: str) -> None:
        """End the run before its next step; all ranks call.

        A checkpoint is saved, and nothing is evaluated: who stops a run early has
        little time.

        Args:
            reason: What to say about it.
        """
        ...

    def say(self, line: str) -> None:
        """Print a line on rank 0.

        Args:
            line: Without a line break at its end.
        """
        ...


class Callback:
    """Do something at some points of a run; each method may be left out."""

    def on_start(self, run: Run) -> None:
        """Before the first step, after the state of a checkpoint was loaded.

        Args:
            run: The run.
        """

    def before_step(self, run: Run) -> None:
        """Before a step; `run.step` are done.

        Args:
            run: The run.
        """

    def after_step(self, run: Run, report: StepReport) -> None:
        """After a step, before the checkpoint that may be due.

        Args:
            run: The run.
            report: What the step has found, or why it was skipped.
        """

    def after_save(self, run: Run, path: Path) -> None:
        """After a checkpoint is complete, also one that was written asynchronously.

        Args:
            run: The run.
            path: The folder of the checkpoint.
        """

    def on_end(self, run: Run) -> None:
        """After the last step and the last checkpoint; not after an error.

        Args:
            run: The run.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know: JSON values, the same on all ranks."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` has returned, before `on_start`.

        Args:
            state: From the checkpoint.
        """

    def close(self) -> None:
        """Undo what `on_start` has done to the process, whatever has happened.

        Other ranks may have failed: it must not communicate.
        """
