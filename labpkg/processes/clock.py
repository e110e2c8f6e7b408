"""When the actions of a pipeline ran, on the clocks of several ranks.

Chapter: parallelism/pipeline.
"""

from __future__ import annotations

import socket
import time

import torch
from torch.distributed.device_mesh import DeviceMesh

from labpkg.planning.actions import Action
from labpkg.planning.simulator import Span, Timeline
from labpkg.processes.messages import all_gather_object, barrier

Mark = float | torch.cuda.Event


class Clock:
    """Note when actions run; on a GPU when their kernels run, not their calls.

    Making one is a barrier: a clock starts when all ranks of the axis are there.

    Args:
        mesh: The axis of the pipeline.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh, self._is_cuda = mesh, mesh.device_type == "cuda"
        self._spans: list[tuple[Action, Mark, Mark]] = []
        barrier(mesh)
        if self._is_cuda:
            torch.cuda.synchronize()
        self._start_s, self._start = time.monotonic(), self.now()

    def now(self) -> Mark:
        """Return a mark of the present."""
        if not self._is_cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def note(self, action: Action, start: Mark) -> None:
        """Note an action that ends now.

        Args:
            action: What ran.
            start: A mark of its start.
        """
        self._spans.append((action, start, self.now()))

    def timeline(self) -> Timeline:
        """Return what all ranks noted, on every rank.

        The ranks of one machine share a clock; those of several start at the barrier.

        Communication: `all_gather_object` of about 50 bytes per action.
        """
        own = [
            (a, self._seconds(start), self._seconds(end))
            for a, start, end in self._spans
        ]
        mine = socket.gethostname(), self._start_s, own
        ranks = all_gather_object(mine, self._mesh)
        is_one_machine = len({host for host, _, _ in ranks}) == 1
        first = min(start_s for _, start_s, _ in ranks)
        spans = []
        for _, start_s, rows in ranks:
            late = start_s - first if is_one_machine else 0.0
            spans.append([Span(a, start + late, end + late) for a, start, end in rows])
        return Timeline(spans)

    def _seconds(self, mark: Mark) -> float:
        """Return the seconds since the clock started."""
        if not isinstance(mark, torch.cuda.Event):
            return mark - self._start_s
        assert isinstance(self._start, torch.cuda.Event)
        mark.synchronize()
        return self._start.elapsed_time(mark) / 1e3
