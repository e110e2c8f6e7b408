"""Traffic of a mesh axis: counted, named for the profiler, and switchable.

`start` is the only way to `transport`: it runs the transfer inside a profiler range
`lab.<collective>[<axis>]`, adds its bytes to every open `count_comms` block, or leaves
it out inside an `off` block.

The state below is process-wide on purpose: autograd runs backward in threads of its
own, which see no context variables of the caller. The library has no other such state,
but for `ForkServer._current` and the open channels of shared memory. The latest
collectives of each group are kept for the diagnosis of a hang: those of torch are not
all, since shared memory and messages are not among them.

Chapter: processes/collectives.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import record_function

from labpkg.processes.transport import Done, Transfer, Work


@dataclass(frozen=True, slots=True)
class CommCount:
    """What one rank communicated: calls, full-tensor bytes, bytes that it sent."""

    calls: int = 0
    payload_bytes: int = 0
    wire_bytes: float = 0.0


class CommLog:
    """The traffic of this rank, by axis and collective; see `count_comms`."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[str, str]] = Counter()
        self._payload: Counter[tuple[str, str]] = Counter()
        self._wire: dict[tuple[str, str], float] = {}
        self._waits: list[_Wait] = []
        self._wait_s = 0.0

    @property
    def wait_s(self) -> float:
        """Seconds in which this rank, or the stream of its GPU, waited for transfers.

        What is left of a step is this rank's own work. Reading it waits for the GPU.
        """
        with _lock:
            waits, self._waits = self._waits, []
        self._wait_s += sum(wait.seconds() for wait in waits)
        return self._wait_s

    def _add(self, axis: str, op: str, payload_bytes: int, wire_bytes: float) -> None:
        key = (axis, op)
        self._calls[key] += 1
        self._payload[key] += payload_bytes
        self._wire[key] = self._wire.get(key, 0.0) + wire_bytes

    def __getitem__(self, key: str | tuple[str, str]) -> CommCount:
        """Return the count of `log["dp"]` or `log["dp", "all_reduce"]`, else zeros."""
        wanted = (key,) if isinstance(key, str) else key
        found = [k for k in self._calls if k[: len(wanted)] == wanted]
        return CommCount(
            sum(self._calls[k] for k in found),
            sum(self._payload[k] for k in found),
            sum(self._wire[k] for k in found),
        )

    @property
    def axes(self) -> list[str]:
        """The axes with traffic, in order of first use."""
        return list(dict.fromkeys(axis for axis, _ in self._calls))

    def __str__(self) -> str:
        rows = [
            f"{'axis':8} {'collective':15} {'calls':>6} {'payload':>12} {'sent':>12}"
        ]
        for axis, op in self._calls:
            c = self[axis, op]
            sizes = f"{c.calls:6} {c.payload_bytes:12,} {c.wire_bytes:12,.0f}"
            rows.append(f"{axis:8} {op:15} {sizes}")
        return "\n".join(rows)


class _Timed:
    """A transfer whose first wait is timed for the open byte counts."""

    def __init__(self, work: Work, logs: list[CommLog]) -> None:
        self._work, self._logs = work, logs

    def wait(self) -> None:
        started, before = time.perf_counter(), _mark()
        self._work.wait()
        wait = _Wait(time.perf_counter() - started, before, _mark())
        with _lock:
            for log in self._logs:
                log._waits.append(wait)
        self._logs = []


class _Wait(NamedTuple):
    """How long the host waited, and events of the stream around that."""

    host_s: float
    before: torch.cuda.Event | None
    after: torch.cuda.Event | None

    def seconds(self) -> float:
        """The host waits for gloo, the stream of a GPU for NCCL."""
        if self.before is None or self.after is None:
            return self.host_s
        self.after.synchronize()
        return max(self.host_s, self.before.elapsed_time(self.after) / 1e3)


def _mark() -> torch.cuda.Event | None:
    if not torch.cuda.is_initialized():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


_lock = threading.Lock()
_logs: list[CommLog] = []
_off_depth = 0
_num_exchanges = 0
_num_calls: Counter[str] = Counter()
_latest: deque[tuple[tuple[str, int], str]] = deque(maxlen=256)
_MESSAGES = ("send", "recv", "sendrecv")


def latest_calls() -> dict[tuple[str, int], str]:
    """Return this rank's latest collectives: group and number in it -> which."""
    with _lock:
        return dict(_latest)


def num_exchanges() -> int:
    """Return how many collectives this rank has started as plain messages.

    torch's flight recorder counts the others; together they tell a rank that is behind.
    """
    return _num_exchanges


@contextmanager
def count_comms() -> Iterator[CommLog]:
    """Count what this rank communicates inside the block, backward passes included.

    `payload_bytes` is the size of the full logical tensor (all_reduce, broadcast,
    reduce: the tensor; reduce_scatter: its input; all_gather: its output; all_to_all
    and send: what this rank sends; recv: nothing). `wire_bytes` is what this rank sends
    under the algorithm that runs. Control traffic is included. Blocks may be nested.

    Yields:
        A `CommLog`: `log["dp"].payload_bytes`, `log["dp", "all_reduce"].calls`. The key
        is the axis name, `"world"` without a mesh; no traffic gives zeros. `log.wait_s`
        is how long this rank waited.
    """
    log = CommLog()
    with _lock:
        _logs.append(log)
    try:
        yield log
    finally:
        with _lock:
            _logs[:] = [other for other in _logs if other is not log]


@contextmanager
def off() -> Iterator[None]:
    """Switch communication off: each collective answers from local data alone.

    For tests: an engine that passes its equality test inside this block never needed
    to communicate. all_reduce and broadcast return their input, all_gather repeats the
    own shard, reduce_scatter takes the own slice, recv gives zeros. Nothing is counted.
    """
    global _off_depth
    with _lock:
        _off_depth += 1
    try:
        yield
    finally:
        with _lock:
            _off_depth -= 1


@contextmanager
def always_on() -> Iterator[None]:
    """Communicate inside the block even within `off`.

    For what ranks agree on before data move, such as the shapes that they will receive:
    without it there would be no correctly shaped answer from local data.
    """
    global _off_depth
    with _lock:
        before, _off_depth = _off_depth, 0
    try:
        yield
    finally:
        with _lock:
            _off_depth = before


class Axis(NamedTuple):
    """A communicator: the axis name, its group, size and this rank's place in it."""

    name: str
    group: ProcessGroup
    size: int
    rank: int

    def check_rank(self, name: str, rank: int) -> None:
        """Raise a ValueError unless `rank` is one of this axis."""
        if not 0 <= rank < self.size:
            raise ValueError(
                f"{name}={rank} is not a rank of axis {self.name!r} with {self.size} "
                f"ranks; choose 0 to {self.size - 1}"
            )


def axis_of(mesh: DeviceMesh | None) -> Axis:
    """Return the communicator of a one-dimensional mesh; None means all ranks."""
    if not dist.is_initialized():
        raise RuntimeError(
            "there is no process group; call lab.make_mesh() first, or run under World"
        )
    if mesh is None:
        group = dist.group.WORLD
        assert group is not None
        return Axis("world", group, group.size(), group.rank())
    if mesh.ndim != 1:
        raise ValueError(
            f"the mesh has {mesh.ndim} axes {mesh.mesh_dim_names}; a collective takes "
            "one, such as mesh['dp']"
        )
    name = mesh.mesh_dim_names[0] if mesh.mesh_dim_names else "unnamed"
    group = mesh.get_group()
    return Axis(name, group, group.size(), group.rank())


def start(
    op: str,
    axis: Axis,
    payload_bytes: int,
    move: Callable[[], Transfer],
    local: Callable[[], object] | None = None,
) -> Work:
    """Start a transfer, counted and named; or do only `local` when switched off.

    Args:
        op: The collective's name.
        axis: The communicator.
        payload_bytes: Size of the full logical tensor; see `count_comms`.
        move: Starts the transfer.
        local: Writes the answer from local data, if it is not already there.
    """
    global _num_exchanges
    with record_function(f"lab.{op}[{axis.name}]"):
        if _off_depth:
            if local is not None:
                local()
            return Done()
        if op not in _MESSAGES:
            _note(op, axis)
        transfer = move()
    if not _logs and not transfer.is_exchange:
        return transfer.work
    with _lock:
        _num_exchanges += transfer.is_exchange
        for log in _logs:
            log._add(axis.name, op, payload_bytes, transfer.wire_bytes)
        return _Timed(transfer.work, list(_logs)) if _logs else transfer.work


def _note(op: str, axis: Axis) -> None:
    group = axis.group.group_name
    with _lock:
        _num_calls[group] += 1
        number = _num_calls[group]
        _latest.append(((group, number), f"{op} (number {number} on axis {axis.name})"))
