"""What a run shows while it works: a progress bar and TensorBoard scalars, on rank 0.

Chapter: runs/debugging.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Tracker:
    """Show and record scalars; on ranks other than 0 it does nothing.

    Args:
        folder: Where TensorBoard files go.
        active: Whether this is rank 0.
        first_step: Steps that were done before; later records of an earlier attempt are
            hidden.
        steps: Steps in all.
    """

    def __init__(
        self, folder: Path, *, active: bool, first_step: int, steps: int
    ) -> None:
        self._active = active
        if not active:
            return
        # Here, because other ranks need not pay for the imports.
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 5,
        )

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._active:
            self._bar.write(line, file=sys.stderr)

    def report(self, step: int, scalars: Mapping[str, float], **shown: Any) -> None:
        """Record scalars of a step and move the bar.

        Args:
            step: Steps done.
            scalars: TensorBoard tag and value.
            **shown: What the bar shows.
        """
        if self._active:
            for tag, value in scalars.items():
                self._writer.add_scalar(tag, value, step)
            if shown:
                self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Write what is pending and end the bar."""
        if self._active:
            self._bar.close()
            self._writer.close()
