"""The fork server: one process per kernel that starts and buries ranks.

Importing torch takes seconds, forking a process that has imported it milliseconds. So
each kernel (notebook, script, test) keeps one process that has imported everything and
does nothing else: it forks a rank for every request, reports its process id, and later
its death. It runs a single thread and never touches CUDA, because a fork copies neither
threads nor a CUDA context. When the kernel ends, however it ends, the fork server kills
the ranks and ends too.

The server speaks to the kernel only through the socket of each rank (see `parcels.py`):
`p` and the process id after the fork, `x` and wait status with time after the death.

Chapter: processes/ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import pkgutil
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from labpkg.processes import rank

PID = struct.Struct("=i")
DEATH = struct.Struct("=id")  # wait status, monotonic time
_REQUEST = struct.Struct("=i")  # rank number
_PACKAGES = ("foundations", "planning", "processes", "parallelism", "runs")
_WATCH_S = 0.25
_QUIET_END_S = 0.5
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # Else asking whether there is a GPU initializes CUDA, and no rank could use it.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


def kill_group(pid: int) -> None:
    """Kill a rank and the processes that it started, as far as they still exist.

    Args:
        pid: The rank, which leads a process group.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


class ForkServer:
    """The kernel's handle on its fork server.

    There is one per process because it costs seconds and 300 MB. It starts with the
    first `get` and imports in the background; requests wait in its socket until then.
    """

    _current: ForkServer | None = None
    _lock = threading.Lock()

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._sock, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives with the server
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from labpkg.processes.fork_server import serve; "
            f"serve({theirs.fileno()}, {self._owner})"
        )
        with theirs:
            # A process group of its own: Jupyter and terminals interrupt the whole
            # group of the kernel, but only the kernel shall see that.
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env={**os.environ, **_ENVIRONMENT},
                process_group=0,
            )
        atexit.register(self.close)

    @classmethod
    def get(cls) -> ForkServer:
        """Return the fork server of this process; start one if there is none alive."""
        with cls._lock:
            it = cls._current
            if it is None or it._owner != os.getpid() or not it.alive:
                if it is not None:
                    it.close()
                it = cls._current = ForkServer()
            return it

    @property
    def pid(self) -> int:
        """The process id of the server."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the server can take requests."""
        if self._sock.fileno() < 0:
            return False
        # The server never writes here: there is something to read only at its end,
        # and that shows sooner than the exit of the process.
        try:
            self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except ConnectionResetError:  # it ended with a request unread
            return False
        return False

    def fork(self, number: int, fds: Sequence[int]) -> None:
        """Ask for a rank; its process id arrives later on the socket of the rank.

        Args:
            number: The number of the rank.
            fds: The descriptors that the rank gets: its socket, the pipe for its
                output, the pipe that it lives with, the payload and, for one rank, the
                socket of the store.
        """
        # A server that died leaves its mark on the socket of the rank: no pid comes.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError), self._lock:
            socket.send_fds(self._sock, [_REQUEST.pack(number)], list(fds))

    def log(self) -> str:
        """Return what the server has printed: warnings, or why it could not start."""
        end = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), end, 0).decode(errors="replace")

    def close(self) -> None:
        """End the server and its ranks, quietly; closing twice is fine."""
        if self._owner != os.getpid() or self._sock.fileno() < 0:
            return  # a forked child of the kernel owns nothing here
        self._sock.close()
        atexit.unregister(self.close)
        try:
            self._process.wait(_QUIET_END_S)
        except subprocess.TimeoutExpired:  # it still imports (no ranks), or is stopped
            self._process.kill()
            self._process.wait()
        self._log.close()


def serve(sock_fd: int, kernel_pid: int) -> NoReturn:
    """Run the fork server: fork, bury, and end with the kernel.

    Args:
        sock_fd: The server's end of the socket to the kernel.
        kernel_pid: The process to live for.
    """
    ranks: dict[int, socket.socket] = {}  # process -> the socket to report its death

    def watch(_signal: int, _frame: FrameType | None) -> None:
        # The end of the socket does not suffice: while torch is imported nobody reads
        # it, and a child that the kernel forked may hold the other end open.
        if os.getppid() != kernel_pid:
            _end(ranks)

    signal.signal(signal.SIGALRM, watch)
    signal.setitimer(signal.ITIMER_REAL, _WATCH_S, _WATCH_S)
    _preload()
    sock = socket.socket(fileno=sock_fd)
    wake, wake_end = socket.socketpair()
    wake_end.setblocking(False)
    signal.set_wakeup_fd(wake_end.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # Asks a rank for its stack; it must not kill one that has hardly started.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([sock, wake], [], [])
        if wake in ready:
            wake.recv(4096)
            _bury(ranks)
        if sock in ready:
            request, fds, _, _ = socket.recv_fds(sock, _REQUEST.size, 5)
            if not request:
                _end(ranks)
            (number,) = _REQUEST.unpack(request)
            _fork(number, fds, ranks, private=(sock, wake, wake_end))


def _preload() -> None:
    """Import what ranks use, then move it out of the garbage collector's sight."""
    import numpy  # noqa: F401 - for ranks
    import torch._dynamo
    import torch.distributed  # noqa: F401

    # By name, since the package is lazy. An import that fails ends the server, and
    # `RuntimeError` shows its log: a broken module must not wait for its first use.
    for package in _PACKAGES:
        module = importlib.import_module(f"labpkg.{package}")
        for info in pkgutil.iter_modules(module.__path__, f"{module.__name__}."):
            importlib.import_module(info.name)
    gc.collect()
    gc.freeze()  # a collection in a rank then takes microseconds instead of 0.1 s


def _fork(
    number: int,
    fds: list[int],
    ranks: dict[int, socket.socket],
    *,
    private: Sequence[socket.socket],
) -> None:
    try:
        pid = os.fork()
    except OSError:  # no memory, or no process left: the kernel sees the socket close
        traceback.print_exc()
        for fd in fds:
            os.close(fd)
        return
    if pid == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        # A rank that held the socket of another would keep it open after its death.
        for other in (*private, *ranks.values()):
            other.close()
        try:
            rank.main(number, *fds)
        finally:
            traceback.print_exc()
            os._exit(1)
    for fd in fds[1:]:
        os.close(fd)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(pid, pid)  # the rank does it too; whoever comes first
    ranks[pid] = socket.socket(fileno=fds[0])
    _report(ranks[pid], b"p" + PID.pack(pid))


def _bury(ranks: dict[int, socket.socket]) -> None:
    for pid in list(ranks):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            kill_group(pid)  # what it started and left behind
            with ranks.pop(pid) as sock:
                _report(sock, b"x" + DEATH.pack(status, time.monotonic()))


def _report(sock: socket.socket, message: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(message)  # else the kernel has stopped listening


def _end(ranks: dict[int, socket.socket]) -> NoReturn:
    for pid in ranks:
        kill_group(pid)
    os._exit(0)
