"""Start the ranks of a job on this machine, with torchrun's own engine.

`launch` runs a function on n ranks through `elastic_launch`: it watches them, restarts
them all when one dies, and returns what they return. It adds what the engine leaves
open: everything listens on the loopback only, an error of a rank arrives as one error
with that rank's traceback, a refusal ends the job instead of being tried again, Ctrl-C
ends the job at once, ranks never outlive the launcher, and signal handlers and
environment are restored.

# Note [lost peers]
When a rank dies, its peers fail a moment later because they have lost a connection, and
the engine blames whom it finds first. So a rank whose error may be of that kind waits
before it gives up: the engine then finds the one that is dead already.

Chapters: processes/ranks, runs/faults.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    SignalException,
)
from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    get_error_handler,
)
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from labpkg.runs.attempts import NOTICES, Job, NoRestart, notices_passed_on
from labpkg.runs.preload import start_fork_server

_BACKEND = "labpkg-loopback"
_LOOPBACK = "127.0.0.1"
_FATAL = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_LOST_PEER_WAIT_S = 1.0
_STORE_TIMEOUT = timedelta(seconds=60)
_REFUSED, _FAILED = 2, 1


class JobFailed(Exception):
    """A rank failed, and there was no restart left.

    Args:
        message: One line: the rank, and its error or the signal that killed it.
        details: The rank's traceback; empty after a signal.
        refusal: The text of the error alone if `is_refusal`; else empty.
    """

    def __init__(self, message: str, *, details: str, refusal: str) -> None:
        super().__init__(message)
        self.details, self.refusal = details, refusal


def is_refusal(error: Exception) -> bool:
    """Say whether an error is about a value or a file, and its text says what to do.

    A lost peer is an OSError too, but nothing that a user could have done otherwise.

    Args:
        error: What a rank has raised.
    """
    is_lost_peer = isinstance(error, (ConnectionError, TimeoutError))
    return isinstance(error, (ValueError, OSError)) and not is_lost_peer


def launch(
    function: Callable[..., Any], *args: Any, num_ranks: int, max_restarts: int = 0
) -> list[Any]:
    """Run `function(*args)` on ranks of this machine and return what they return.

    A rank finds RANK, WORLD_SIZE and MASTER_* in its environment, as under torchrun.
    When one fails, all are restarted, and TORCHELASTIC_RESTART_COUNT tells them; but a
    refusal (see `is_refusal`) ends the job, since the next attempt would refuse, too.

    SIGTERM and SIGUSR1 are passed on to the ranks; see Note [notice] in `attempts`.
    After SIGTERM they have 30 seconds.

    Args:
        function: Importable by name; runs on every rank.
        *args: Picklable arguments.
        num_ranks: How many ranks.
        max_restarts: How often the job may be restarted.

    Returns:
        One value per rank, in rank order.

    Raises:
        ValueError: If MASTER_PORT is set and taken, or a number is too small.
        JobFailed: If a rank failed.
        KeyboardInterrupt: On SIGINT; the ranks are dead then.
        SystemExit: With 128 + the signal, on SIGHUP and SIGQUIT, and on SIGTERM and
            SIGUSR1 unless the ranks return.
    """
    if num_ranks < 1 or max_restarts < 0:
        raise ValueError(
            f"num_ranks={num_ranks} must be at least 1 and max_restarts={max_restarts} "
            "at least 0"
        )
    start_fork_server()
    with (
        _listen_on_loopback(os.environ.get("MASTER_PORT", 0)) as listener,
        tempfile.TemporaryDirectory(prefix="labpkg-") as logs,
        _restored_signals(),
        _quiet_engine(),
    ):
        job = Job(logs)
        config = _launch_config(num_ranks, max_restarts, listener, job)
        try:
            with notices_passed_on(job):
                values = elastic_launch(config, _rank)(job, function, args)
        except (NoRestart, ChildFailedError) as error:
            if job.notice is not None:
                raise SystemExit(128 + job.notice) from None
            raise _job_failed(job, error, num_ranks) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None
    return [values[rank] for rank in range(num_ranks)]


def _launch_config(
    num_ranks: int, max_restarts: int, listener: socket.socket, job: Job
) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=f"labpkg-{os.getpid()}",
        rdzv_backend=_BACKEND,
        rdzv_configs={"listener": listener, "job": job},
        max_restarts=max_restarts,
        monitor_interval=0.05,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(job.folder)),
        local_addr=_LOOPBACK,
        signals_to_handle=",".join(number.name for number in _FATAL),
    )


class _LoopbackRendezvous(RendezvousHandler):
    """The meeting point of one agent: a store behind a socket that is bound already.

    Left alone, a TCPStore listens on every interface, whatever its host name. Each
    start of the ranks gets a new store: in the old one they would find dead addresses.
    """

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        self._listener: socket.socket | None = parameters.config["listener"]
        self._job: Job = parameters.config["job"]

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return _BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        self._job.begin_attempt()
        listener = self._listener or _listen_on_loopback(0)
        self._listener = None
        port = listener.getsockname()[1]
        store = TCPStore(
            _LOOPBACK,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=_STORE_TIMEOUT,
            master_listen_fd=listener.detach(),  # the store closes it
        )
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(_LOOPBACK, port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nothing else could join."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


rendezvous_handler_registry.register(_BACKEND, _LoopbackRendezvous)


def _listen_on_loopback(port: str | int) -> socket.socket:
    try:
        return socket.create_server((_LOOPBACK, int(port)), backlog=128)
    except (OSError, ValueError, OverflowError) as error:
        why = getattr(error, "strerror", None) or "not a port number"
        raise ValueError(
            f"cannot listen on MASTER_PORT={port} ({why}); choose another port, or "
            "unset MASTER_PORT to get a free one"
        ) from None


@contextmanager
def _restored_signals() -> Iterator[None]:
    """Undo what the engine leaves behind: its handlers, and how it chose them."""
    name = "TORCHELASTIC_SIGNALS_TO_HANDLE"
    before = os.environ.get(name)
    handlers = {number: signal.getsignal(number) for number in (*_FATAL, *NOTICES)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


@contextmanager
def _quiet_engine() -> Iterator[None]:
    """Keep the engine's log lines back: this module reports failures itself."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn")
    ]
    propagated = [log.propagate for log in loggers]
    silent = logging.NullHandler()
    for log in loggers:
        log.propagate = False
        log.addHandler(silent)
    try:
        yield
    finally:
        for log, propagate in zip(loggers, propagated, strict=True):
            log.propagate = propagate
            log.removeHandler(silent)


def _job_failed(
    job: Job, error: NoRestart | ChildFailedError, num_ranks: int
) -> JobFailed:
    if isinstance(error, NoRestart):
        refused = job.refusal
        assert refused is not None
        return JobFailed(
            f"rank {refused['rank']} of {num_ranks}: {refused['message']}",
            details=refused["details"],
            refusal=refused["message"].partition(": ")[2],
        )
    rank, failure = error.get_first_failure()
    details = refusal = ""
    report: Any = failure.message  # what the rank has written, else a sentence
    if isinstance(report, dict):
        message, details = report["message"], report["extraInfo"]["py_callstack"]
        if failure.exitcode == _REFUSED:
            refusal = message.partition(": ")[2]
    elif failure.exitcode < 0:
        message = f"killed by {failure.signal_name()}"
    else:
        message = f"ended with exit code {failure.exitcode}"
    message = f"rank {rank} of {num_ranks}: {message}"
    return JobFailed(message, details=details, refusal=refusal)


def _rank(job: Job, function: Callable[..., Any], args: tuple) -> Any:
    """Be a rank: called in a process that the fork server has forked."""
    from tqdm import tqdm

    # Its own lock would be a named semaphore, which a killed rank leaves behind.
    tqdm.set_lock(threading.RLock())
    # Python's own handler would wait until a collective returns, and the fork server
    # ignores what the others are for.
    for number in (signal.SIGINT, *NOTICES):
        signal.signal(number, signal.SIG_DFL)
    job.enter()
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    try:
        return function(*args)
    except Exception as error:
        _give_up(job, error)


def _give_up(job: Job, error: Exception) -> NoReturn:
    refused = is_refusal(error)
    if refused:
        job.refuse(error)
    if isinstance(error, (RuntimeError, OSError)) and not refused:
        # See Note [lost peers].
        time.sleep(_LOST_PEER_WAIT_S)
    get_error_handler().record_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: leaving the group could wait for peers that are stuck.
    os._exit(_REFUSED if refused else _FAILED)


def _end_with_launcher() -> None:
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os._exit(_FAILED)
