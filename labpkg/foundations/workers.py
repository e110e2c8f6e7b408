"""Worker processes that prepare results ahead of the step that uses them.

Contract of `map_ahead`: the results come in the order of the tasks, whichever worker
made them, so the number of workers changes the time and nothing else. The processes are
those of torch's `DataLoader`; what is added here is what a reader sees when something
goes wrong: the own traceback of an error, the task and the stack of a worker that
hangs, the signal that killed one, and no process left behind.

Workers are forked: data is shared instead of copied, and functions of notebook cells
need no pickling. Each has one thread and must touch neither a GPU nor a collective.
A result travels in one anonymous memory file, whose descriptor is sent: torch's own way
has a listening socket in the file system for each worker, which a killed one leaves
there, and connects to it for each tensor.

Chapter: processes/data_loading.
"""

from __future__ import annotations

import array
import contextlib
import faulthandler
import itertools
import math
import mmap
import os
import pickle
import signal
import socket
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import cloudpickle
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

Function = Callable[..., tuple[Tensor, ...]]

_NOT_STARTED, _IDLE = -2, -1
_WATCH_S = 0.5
_ALIGNMENT = 64  # bytes
_STACK_S = 1.0  # a worker that does not answer in this time is stopped


class WorkerTraceback(Exception):
    """The traceback of an error in a worker, as the cause of the error here."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def map_ahead(
    function: Function,
    tasks: Iterable[tuple[Any, ...]],
    *,
    num_workers: int,
    prefetch: int,
    timeout_s: float,
    seed: int,
    describe: Callable[[int], str],
    own_files: tuple[str, ...] = (),
) -> Iterator[tuple[Tensor, ...]]:
    """Yield `function(*task)` for each task, computed by worker processes.

    Task k goes to worker k mod `num_workers`, and a worker is given a new one when a
    result of its is taken. The processes start with the first result and end with the
    iterator: when it is exhausted, raises, is closed or is forgotten.

    Args:
        function: called in a worker; returns tensors on the CPU.
        tasks: its arguments.
        num_workers: how many processes.
        prefetch: results that each worker prepares ahead.
        timeout_s: limit of the wait for one result; `math.inf` waits for ever.
        seed: the workers' global generators start from it. That of the caller stays as
            it is.
        describe: says what task k is, for messages.
        own_files: source files to leave out at the start of a traceback.

    Raises:
        Exception: what the function raised, with the worker's traceback as its cause.
        TimeoutError: if a result takes longer, with the task and the worker's stack.
        RuntimeError: if a worker dies, with the task and the signal or exit status.
    """
    work = _Work(function, num_workers, (__file__, *own_files))
    results: Any = _start(
        work, tasks, prefetch=prefetch, timeout_s=timeout_s, seed=seed
    )
    try:
        for number in itertools.count():
            began = time.monotonic()
            try:
                result = next(results)
            except StopIteration:
                return
            except RuntimeError as error:
                is_late = time.monotonic() - began >= timeout_s
                late = timeout_s if is_late else None
                raise work.explained(error, results, number, late, describe) from None
            if isinstance(result, _Failure):
                raise result.error() from WorkerTraceback(result.text)
            yield work.received(result)
    finally:
        work.end(results)


def _start(
    work: _Work,
    tasks: Iterable[tuple[Any, ...]],
    *,
    prefetch: int,
    timeout_s: float,
    seed: int,
) -> Any:
    """Return a running iterator of torch's `DataLoader`."""
    # On the CPU, for the workers inherit it, and so that torch draws its base seed from
    # the given generator. More workers than cores are useful where workers wait.
    with torch.device("cpu"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        loader = DataLoader(
            work,
            batch_size=None,
            sampler=enumerate(tasks),  # pyright: ignore[reportArgumentType]
            num_workers=work.num_workers,
            collate_fn=lambda result: result,
            timeout=0 if timeout_s == math.inf else timeout_s,
            worker_init_fn=work.enter,
            multiprocessing_context="fork",
            generator=torch.Generator("cpu").manual_seed(seed % 2**63),
            prefetch_factor=prefetch,
        )
        return iter(loader)


class _Failure:
    """An error on its way from a worker, with its traceback as text."""

    def __init__(self, error: BaseException, own_files: tuple[str, ...]) -> None:
        trace = error.__traceback__
        while trace and trace.tb_frame.f_code.co_filename in own_files:
            trace = trace.tb_next
        lines = traceback.format_exception(type(error), error, trace)
        self.text, self.pickled = "".join(lines), b""
        if not isinstance(error, Exception):  # SystemExit would end the caller, too
            error = RuntimeError(f"the worker left by {error!r}")
        with contextlib.suppress(Exception):  # not every error can be pickled
            pickled = cloudpickle.dumps(error)
            if type(pickle.loads(pickled)) is type(error):
                self.pickled = pickled

    def error(self) -> Exception:
        """Return the error, or what is left of one that cannot be pickled."""
        if self.pickled:
            return pickle.loads(self.pickled)
        return RuntimeError(self.text.splitlines()[-1])


class _Result:
    """What a worker tells of its tensors, which wait in a memory file."""

    def __init__(self, worker: int, tensors: tuple[Tensor, ...]) -> None:
        self.worker = worker
        self.forms = [(tensor.dtype, tensor.shape) for tensor in tensors]
        sizes = [-tensor.nbytes // _ALIGNMENT * -_ALIGNMENT for tensor in tensors]
        self.offsets = list(itertools.accumulate(sizes, initial=0))
        self.size = max(self.offsets.pop(), _ALIGNMENT)

    def send(self, channel: socket.socket, tensors: tuple[Tensor, ...]) -> None:
        with _memory_file() as file:
            file.truncate(self.size)
            for tensor, offset in zip(tensors, self.offsets, strict=True):
                values = tensor.resolve_conj().resolve_neg().flatten()
                file.seek(offset)
                file.write(values.contiguous().view(torch.uint8).numpy().data)
            file.flush()
            socket.send_fds(channel, [b"r"], [file.fileno()])

    def receive(self, channel: socket.socket) -> tuple[Tensor, ...]:
        _, (fd,), _, _ = socket.recv_fds(channel, 1, 1)
        # A mapping of Python would hold a file open for as long as a tensor lives.
        with os.fdopen(fd):
            memory = torch.from_file(
                f"/dev/fd/{fd}",
                shared=True,
                size=self.size,
                dtype=torch.uint8,
                device="cpu",
            )
        return tuple(
            memory[offset : offset + shape.numel() * dtype.itemsize]
            .view(dtype)
            .view(shape)
            for (dtype, shape), offset in zip(self.forms, self.offsets, strict=True)
        )


def _memory_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("labpkg-worker"), "w+b")
    return tempfile.TemporaryFile()  # macOS


class _Work(Dataset[Any]):
    """The function as a data set of its results, and a record of who is at what.

    It is copied into the workers by the fork; `doing` is shared memory, `log` an open
    file, and `channels` are sockets that carry the memory of results.
    """

    def __init__(
        self, function: Function, num_workers: int, own_files: tuple[str, ...]
    ) -> None:
        self.function, self.num_workers = function, num_workers
        self.own_files, self.parent = own_files, os.getpid()
        self.doing = memoryview(mmap.mmap(-1, 8 * num_workers)).cast("q")
        self.doing[:] = array.array("q", [_NOT_STARTED] * num_workers)
        self.channels = [socket.socketpair() for _ in range(num_workers)]
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - until `end`

    # ---- in a worker ----------------------------------------------------------------

    def enter(self, worker: int) -> None:
        """Prepare this process; torch's handler of SIGTERM is in place."""
        threading.Thread(target=self._end_with_parent, daemon=True).start()
        faulthandler.register(signal.SIGUSR1, file=self.log, all_threads=False)
        self.doing[worker] = _IDLE

    def __getitem__(self, index: tuple[int, tuple[Any, ...]]) -> Any:
        number, task = index
        worker: Any = get_worker_info()
        self.doing[worker.id] = number
        try:
            tensors = self.function(*task)
            _require_transferable(tensors)
            result = _Result(worker.id, tensors)
            result.send(self.channels[worker.id][1], tensors)
        except (Exception, SystemExit) as error:
            result = _Failure(error, self.own_files)
        self.doing[worker.id] = _IDLE
        return result

    def _end_with_parent(self) -> None:
        # torch's own watch looks between two tasks only, which may be never.
        while os.getppid() == self.parent:
            time.sleep(_WATCH_S)
        os.kill(os.getpid(), signal.SIGKILL)

    # ---- in the process that started them -------------------------------------------

    def received(self, result: _Result) -> tuple[Tensor, ...]:
        """Return the tensors of a result; those of a worker are asked for in order."""
        return result.receive(self.channels[result.worker][0])

    def explained(
        self,
        error: RuntimeError,
        results: Any,
        number: int,
        timeout_s: float | None,
        describe: Callable[[int], str],
    ) -> Exception:
        """Return what torch's error means: a worker that died, or result `number` late.

        `timeout_s` is None if the time is not up.
        """
        for worker, process in enumerate(results._workers):
            if process.exitcode is not None:
                task = self.doing[worker]
                where = f", at {describe(task)}" if task >= 0 else ""
                return RuntimeError(
                    f"worker {worker} (process {process.pid}) "
                    f"{_how_it_ended(process.exitcode)}{where}; with num_workers=0 it "
                    "happens in this process, where a debugger can follow"
                )
        if timeout_s is None:
            return error
        return TimeoutError(self._late(results, number, timeout_s, describe))

    def _late(
        self,
        results: Any,
        number: int,
        timeout_s: float,
        describe: Callable[[int], str],
    ) -> str:
        rule = (
            f"{describe(number)} did not arrive within worker_timeout_s={timeout_s:g}"
        )
        if number not in list(self.doing):
            return f"{rule}, and no worker is at it; give them more time"
        worker = list(self.doing).index(number)
        process = results._workers[worker]
        stack = self._stack(process.pid)
        where = f"it is at (most recent call first)\n{stack}"
        if not stack:
            where = "it does not answer, so it is stopped"
        return (
            f"{rule}: worker {worker} (process {process.pid}) still works on it; give "
            f"it more time, or see what keeps it: {where}"
        )

    def _stack(self, pid: int) -> str:
        """Ask a worker for its stack, and return the reader's part of it."""
        os.kill(pid, signal.SIGUSR1)
        text, deadline = "", time.monotonic() + _STACK_S
        # It ends with the frame that runs the process, which is not the reader's.
        while "in _bootstrap" not in text and time.monotonic() < deadline:
            time.sleep(0.01)
            size = os.fstat(self.log.fileno()).st_size
            text = os.pread(self.log.fileno(), size, 0).decode(errors="replace")
        frames = [line for line in text.splitlines() if line.startswith("  File ")]
        is_own = lambda line: any(f'"{file}"' in line for file in self.own_files)
        return "\n".join(itertools.takewhile(lambda line: not is_own(line), frames))

    def end(self, results: Any) -> None:
        """End all workers now: also one that hangs, or is stopped."""
        for worker, process in enumerate(results._workers):
            # torch's handler exits with status 0, so nobody takes it for a failure. One
            # that has not started has no handler yet, and finds out that it is over.
            if self.doing[worker] != _NOT_STARTED and process.is_alive():
                process.terminate()
                os.kill(process.pid, signal.SIGCONT)
        results._shutdown_workers()
        for file in (self.log, *itertools.chain(*self.channels)):
            file.close()


def _how_it_ended(exitcode: int) -> str:
    if exitcode >= 0:
        return f"exited with status {exitcode}"
    names = {number.value: number.name for number in signal.Signals}
    name = names.get(-exitcode, f"signal {-exitcode}")
    reasons = {"SIGKILL": "memory", "SIGBUS": "shared memory (/dev/shm)"}
    reason = f", as when {reasons[name]} runs out" if name in reasons else ""
    return f"was killed by {name}{reason}"


def _require_transferable(tensors: tuple[Tensor, ...]) -> None:
    for tensor in tensors:
        is_plain = tensor.device.type == "cpu" and tensor.layout == torch.strided
        if tensor.requires_grad or not is_plain:
            kind = "that requires grad" if tensor.requires_grad else "on a device"
            if tensor.layout != torch.strided:
                kind = f"of layout {tensor.layout}"
            raise ValueError(
                f"a worker made a tensor {kind}, but only dense values on the CPU can "
                "be sent; use torch.no_grad() and the CPU, or num_workers=0"
            )
