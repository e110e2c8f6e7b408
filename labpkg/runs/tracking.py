"""What a run shows while it works: a progress bar and TensorBoard scalars, on rank 0.

Chapter: runs/debugging.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes.collectives import all_reduce


class RunningMean:
    """A mean over what all ranks have seen since the last question, by counts.

    Sums and counts travel, not means, so ranks with different shards weigh right, and
    only one collective is needed however rarely one asks. It stays on the device: a GPU
    is waited for when the mean is read.

    Args:
        mesh: The data-parallel axis.
        device: Where the losses are.
    """

    def __init__(self, mesh: DeviceMesh, device: torch.device) -> None:
        self._mesh = mesh
        self._totals = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, mean: Tensor, count: int) -> None:
        """Add a mean of this rank and what it was taken over."""
        self._totals[0] += mean.detach() * count
        self._totals[1] += count

    def read(self) -> tuple[float, int]:
        """Return mean and count over all ranks, and start again; every rank calls it.

        Communication: an all_reduce of two numbers.
        """
        total, count = all_reduce(self._totals, self._mesh).tolist()
        self._totals.zero_()
        return total / count, int(count)


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
