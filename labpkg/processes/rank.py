"""A rank: a process that joins the group, calls one function and reports the result.

A rank is forked for one run and killed after it. It never decides when the run is over:
having reported, it waits, because a peer may still be inside a collective with it. A
thread beside the function watches the socket to the kernel and tells where the function
is when asked. When the kernel is gone or gives the run up, the system itself kills the
rank, even one that is stopped or never leaves an extension (see `_die_with`).

Chapter: processes/ranks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import importlib
import json
import os
import random
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import IO, Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from labpkg.processes import traffic
from labpkg.processes.diagnosis import Failure, Where
from labpkg.processes.parcels import dump, load, send_message
from labpkg.processes.shared_memory import MismatchError, calls_in_flight

_FOREVER = timedelta(days=365)  # the kernel keeps the time: its diagnosis comes first
_LOST_PEER = re.compile(
    r"connection (was likely )?(closed|reset|refused)|broken pipe|connect timeout"
    r"|remote process exited|socket (error|timeout)",
    re.IGNORECASE,
)
# What torch says at the debug level DETAIL: first about this rank, then about another.
_DETAIL = re.compile(
    r"Rank \d+ is running collective: (CollectiveFingerPrint\(.*?\)), but"
)
# Collectives whose input has the same shape on every rank.
_SAME_SIZE = ("all_reduce", "broadcast", "reduce", "all_gather")
_COMMUNICATING = (  # files whose outermost function says what a rank waits in
    "torch/distributed/distributed_c10d.py",
    "labpkg/processes/algorithms.py",
    "labpkg/processes/messages.py",
    "labpkg/processes/collectives.py",
    "labpkg/processes/transport.py",
    "labpkg/processes/shared_memory.py",
)
_OWN_FILES = (__file__, dump.__code__.co_filename)  # left out of tracebacks
_NAMELESS = ("wrapper", "backward", "<lambda>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the ranks of one run have in common; the function travels beside it.

    Attributes:
        world_size: Number of ranks.
        device: `"cpu"` or `"cuda"`.
        backend: Backend of the process group.
        port: Port of the store, which rank 0 serves.
        seed: Every random generator of every rank starts from it.
        max_result_bytes: A larger result is an error.
        environment: The environment variables of the kernel, and those of the job.
        path: `sys.path` of the kernel.
        directory: Working directory of the kernel.
    """

    world_size: int
    device: str
    backend: str
    port: int
    seed: int
    max_result_bytes: int
    environment: dict[str, str]
    path: list[str]
    directory: str


def one_line(error: BaseException) -> str:
    """Return type and text of an error without its traceback."""
    return "".join(traceback.format_exception_only(error)).strip()


def main(
    number: int,
    sock_fd: int,
    out_fd: int,
    life_fd: int,
    payload_fd: int,
    listen_fd: int | None = None,
) -> NoReturn:
    """Be a rank: called in the child of the fork server.

    Args:
        number: The number of the rank.
        sock_fd: The socket to the kernel.
        out_fd: The pipe that takes what the rank prints.
        life_fd: The pipe whose end is the end of the rank.
        payload_fd: A message with the `Job` and then the call.
        listen_fd: The listening socket of the store, for the rank that serves it.
    """
    os.setpgid(0, 0)
    _die_with(life_fd)
    _redirect_output(out_fd)
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=False)
    sock = socket.socket(fileno=sock_fd)
    arguments = (sock, threading.get_ident())
    threading.Thread(target=_listen, args=arguments, daemon=True).start()
    kind, file = _report(lambda: _run(number, load(payload_fd), listen_fd, sock))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError):  # the function has closed it
            stream.flush()
    send_message(sock, kind, file)
    while True:  # peers may still need this rank: the kernel kills all together
        signal.pause()


def _die_with(life_fd: int) -> None:
    """Let the system kill this process group when the other end of a pipe closes."""
    if not hasattr(fcntl, "F_SETSIG"):  # macOS: `_listen` does it, if it can run
        return
    fcntl.fcntl(life_fd, fcntl.F_SETOWN, -os.getpid())
    fcntl.fcntl(life_fd, fcntl.F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(life_fd, fcntl.F_GETFL)
    fcntl.fcntl(life_fd, fcntl.F_SETFL, flags | os.O_ASYNC)
    ended = select.poll()
    ended.register(life_fd, 0)
    if ended.poll(0):  # before anybody watched it
        os.killpg(0, signal.SIGKILL)


def _redirect_output(out_fd: int) -> None:
    for fd in (1, 2):
        os.dup2(out_fd, fd)
    os.close(out_fd)
    sys.stdout, sys.stderr = (
        open(  # noqa: SIM115 - for the life of the process
            fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace"
        )
        for fd in (1, 2)
    )


def _listen(sock: socket.socket, function_thread: int) -> None:
    while True:
        kind = b""
        # A kernel that dies with a message unread resets the connection.
        with contextlib.suppress(ConnectionResetError):
            kind = sock.recv(1)
        if not kind:
            os.killpg(0, signal.SIGKILL)
        send_message(sock, b"s", dump(where(function_thread)))


def _report(run: Callable[[], IO[bytes]]) -> tuple[bytes, IO[bytes]]:
    try:
        return b"v", run()
    except BaseException as error:  # SystemExit too: a rank that leaves has failed
        failure = Failure(
            time_s=time.monotonic(),
            summary=one_line(error),
            traceback="".join(traceback.format_exception(_without_own_frames(error))),
            is_victim=_is_victim(error),
            call=_mismatched_call(error),
        )
        return b"f", dump(failure)


def _run(
    number: int, payload: Iterator[Any], listen_fd: int | None, sock: socket.socket
) -> IO[bytes]:
    job: Job = next(payload)
    _enter(number, job)
    _join(number, job, listen_fd)
    send_message(sock, b"j", None)
    function, args, kwargs = next(payload)
    _seed(job.seed)
    value = function(*args, **kwargs)
    try:
        return dump(value, max_bytes=job.max_result_bytes)
    except ValueError:
        raise
    except Exception as error:
        text = f"the returned value cannot be pickled: {one_line(error)}"
        raise TypeError(text) from None


def _enter(number: int, job: Job) -> None:
    os.environ.clear()
    own = {"RANK": str(number), "LOCAL_RANK": str(number)}
    os.environ.update(job.environment | own)
    sys.path[:] = job.path
    os.chdir(job.directory)
    torch.set_num_threads(1)
    if job.device == "cuda":
        gpu = torch.device("cuda", number % torch.cuda.device_count())
        torch.cuda.set_device(gpu)
        torch.set_default_device(gpu)  # on the CPU it is the default, and costs time


def _join(number: int, job: Job, listen_fd: int | None) -> None:
    dist.set_debug_level_from_env()  # it was read when torch was imported
    # Else the groups of a mesh get 30 minutes.
    dist.distributed_c10d.default_pg_timeout = _FOREVER
    dist.distributed_c10d.default_pg_nccl_timeout = _FOREVER
    # The kernel has bound the listening socket to the loopback: left alone, TCPStore
    # listens on every interface, whatever its host name.
    store = dist.TCPStore(
        "127.0.0.1",
        job.port,
        is_master=listen_fd is not None,
        master_listen_fd=listen_fd,
        wait_for_workers=False,
        timeout=_FOREVER,
    )
    dist.init_process_group(
        job.backend,
        store=store,
        rank=number,
        world_size=job.world_size,
        timeout=_FOREVER,
        # NCCL then connects now, and knows the device of a barrier.
        device_id=torch.device("cuda", number) if job.backend == "nccl" else None,
    )


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _without_own_frames(error: BaseException) -> BaseException:
    trace = error.__traceback__
    while trace and trace.tb_frame.f_code.co_filename in _OWN_FILES:
        trace = trace.tb_next
    return error.with_traceback(trace)


def _is_victim(error: BaseException | None) -> bool:
    while error is not None:
        is_network = isinstance(error, (RuntimeError, ConnectionError))
        if is_network and _LOST_PEER.search(one_line(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _mismatched_call(error: BaseException | None) -> str:
    """Return what this rank called, if the error says that others did not."""
    while error is not None:
        if isinstance(error, MismatchError):
            return error.call
        if found := _DETAIL.search(str(error)):  # of `check=True`
            return found[1]
        error = error.__cause__ or error.__context__
    return ""


def where(thread: int) -> Where:
    """Say what a rank is doing; a thread of it that is alive can ask.

    Args:
        thread: Identifier of the thread that runs the function.
    """
    frames = traceback.extract_stack(sys._current_frames()[thread])
    own = [i for i, frame in enumerate(frames) if frame.filename == __file__]
    frames = frames[own[-1] + 1 :] if own else frames
    names = [
        frame.name.strip("_")
        for frame in frames
        if frame.filename.endswith(_COMMUNICATING) and frame.name not in _NAMELESS
    ]
    name = names[0] if names else ""
    if name == "wait":  # the handle of a transfer that an engine started before
        name = "a transfer"
    pending, num_recorded, record = _flight_record()
    calls = [pending] if pending else []
    if any(frame.name == "open_channel" for frame in frames):
        calls = []  # ranks that find each other: nobody has called that
    elif name:
        calls += calls_in_flight()
    pending = next((it for it in calls if it.split()[0] == name), "".join(calls[:1]))
    is_other = name and pending and pending.split()[0] != name
    return Where(
        collective=f"{name}; pending: {pending}" if is_other else pending or name,
        num_issued=num_recorded + traffic.num_exchanges(),
        stack="".join(traceback.format_list(frames)),
        calls=traffic.latest_calls(),
        record=record,
    )


def _flight_record() -> tuple[str, int, dict[tuple[str, int], str]]:
    """Return the pending collective, how many were issued, and the latest of them.

    torch's flight recorder knows asynchronous collectives too, but no messages of gloo.
    """
    # A private format: where it differs, the Python stack says enough.
    with contextlib.suppress(AttributeError, ImportError, KeyError, ValueError):
        c10d = importlib.import_module("torch._C._distributed_c10d")
        trace = c10d._dump_fr_trace_json(includeCollectives=True, onlyActive=False)
        entries = json.loads(trace)["entries"]
        num_issued = max((entry["record_id"] + 1 for entry in entries), default=0)
        pending = [_call(entry) for entry in entries if not entry["retired"]]
        record = {
            (entry["process_group"][0], entry["collective_seq_id"]): _call(
                entry, sized=_SAME_SIZE
            )
            for entry in entries
        }
        return pending[0] if pending else "", num_issued, record
    return "", 0, {}


def _call(entry: dict[str, Any], sized: Collection[str] | None = None) -> str:
    """Return an entry as `all_reduce [4] (number 2 in default_pg)`."""
    name = entry["profiling_name"].split(":")[-1]
    sizes = [str(size) for size in entry["input_sizes"]]
    number, group = entry["collective_seq_id"], entry["process_group"][1]
    call = " ".join([name, *sizes] if sized is None or name in sized else [name])
    return f"{call} (number {number} in {group})"
