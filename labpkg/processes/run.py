"""One run of a `World`, seen from the kernel.

A `Run` has a socket and an output pipe to each rank. It forks the ranks, prints what
they print, collects values and failures until the run is over, and kills what is left.
No rank ends earlier, so in a good run no peer loses a connection. After a hang it first
asks the ranks where they are, which gives the diagnosis its stacks.

Chapter: processes/ranks.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from io import FileIO
from typing import IO, Any

import psutil

from labpkg.processes.diagnosis import Failure, Where, diagnose
from labpkg.processes.fork_server import DEATH, PID, ForkServer, kill_group
from labpkg.processes.parcels import load, send_message
from labpkg.processes.rank import one_line

_START_S = 120.0  # for the fork server to import everything
_JOIN_S = 60.0  # for the ranks to form the group, unless the run may take longer
_GRACE_S = 0.3  # for more failures after the first one
_VICTIM_S = 1.5  # for the culprit to show after a lost connection
_STACK_S = 0.8  # for a rank to say where it is
_SIGNAL_S = 0.3  # for a signal handler to do it instead
_REST_S = 0.05  # for the rest of what it writes
_END_S = 2.0  # for killed processes to be gone
_TAIL_BYTES = 8000  # of output kept for the error of a rank that leaves no traceback


def _pipe() -> tuple[FileIO, FileIO]:
    """Return the ends for reading and for writing."""
    source, target = os.pipe()
    return FileIO(source, "rb"), FileIO(target, "wb")


class _Rank:
    """The kernel's end of one rank."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pid = 0  # until the fork server has told it
        self.is_alive, self.has_joined = True, False
        self.tail = b""
        self._line = b""
        self.sock, self.their_sock = socket.socketpair()
        self.out, self.their_out = _pipe()
        os.set_blocking(self.out.fileno(), False)
        # Nothing is ever written here: the system kills the rank when it closes.
        self.their_life, self._life = _pipe()

    def close_theirs(self) -> None:
        for file in (self.their_sock, self.their_out, self.their_life):
            file.close()

    def give_up(self) -> None:
        self._life.close()

    def close(self) -> None:
        self.close_theirs()
        self.give_up()
        for file in (self.sock, self.out):
            file.close()

    def read_output(self) -> bytes | None:
        """Keep and return what the rank has printed; b"" at the end."""
        data = self.out.read(65536)
        self.tail = (self.tail + (data or b""))[-_TAIL_BYTES:]
        return data

    def print_lines(self, data: bytes) -> None:
        """Print the lines that are whole now, each with the prefix of the rank."""
        # A progress bar ends its lines with a carriage return.
        parts = re.split(rb"(?<=\n)|(?<=\r)(?!\n)", self._line + data)
        *lines, self._line = parts
        if lines:
            text = [f"[{self.number}] {it.decode(errors='replace')}" for it in lines]
            sys.stdout.write("".join(text))
            sys.stdout.flush()

    def end_line(self) -> None:
        if self._line:
            self.print_lines(b"\n")

    def receive(self) -> tuple[bytes, list[int]]:
        """Return kind and descriptors of the next message; note birth and death."""
        try:
            kind, fds, _, _ = socket.recv_fds(self.sock, 1, 1)
        except ConnectionResetError:
            kind, fds = b"", []
        if kind == b"p":
            (self.pid,) = PID.unpack(self.sock.recv(PID.size, socket.MSG_WAITALL))
        elif kind == b"x" or not kind:
            self.is_alive = False
        return kind, fds

    def death(self, *, is_checked: bool) -> Failure:
        status, time_s = DEATH.unpack(self.sock.recv(DEATH.size, socket.MSG_WAITALL))
        code = os.waitstatus_to_exitcode(status)
        summary = f"the process ended with exit code {code}"
        if code < 0:
            summary = f"killed by {_signal_name(-code)}"
        has_aborted = code == -signal.SIGABRT and not is_checked
        if has_aborted:
            summary += "; collectives that do not match abort: check=True names them"
        output = self.tail.decode(errors="replace")
        return Failure(
            time_s=time_s, summary=summary, traceback=output, has_aborted=has_aborted
        )


class Run:
    """One run: its ranks and what they have reported so far."""

    def __init__(
        self, world_size: int, show: int | str | None, *, is_checked: bool
    ) -> None:
        self._show, self._is_checked = show, is_checked
        self._server = ForkServer.get()
        self._ranks = [_Rank(number) for number in range(world_size)]
        self._values: dict[int, Any] = {}
        self._failures: dict[int, Failure] = {}
        self._where: dict[int, Where] = {}
        self._selector = selectors.DefaultSelector()
        for rank in self._ranks:
            self._selector.register(rank.sock, selectors.EVENT_READ, rank)
            self._selector.register(rank.out, selectors.EVENT_READ, rank)

    def start(self, payload: IO[bytes], store: socket.socket) -> None:
        """Fork the ranks."""
        for rank in self._ranks:
            files = [rank.their_sock, rank.their_out, rank.their_life, payload]
            files += [store] if rank.number == 0 else []
            self._server.fork(rank.number, [file.fileno() for file in files])
            rank.close_theirs()
        self._pump(
            lambda: all(rank.pid or not rank.is_alive for rank in self._ranks), _START_S
        )
        if not all(rank.pid for rank in self._ranks):
            log = self._server.log()
            raise RuntimeError(f"the fork server could not start the ranks:\n{log}")

    def collect(self, limit_s: float) -> list[Any]:
        """Wait for every rank and return the values, or raise the diagnosis.

        The limit counts from the moment when all ranks have joined the group, so that a
        busy machine, or the start of NCCL, takes nothing from the function's time.
        """
        join_s = max(limit_s, _JOIN_S)
        self._pump(lambda: self._all_joined() or bool(self._failures), join_s)
        if self._all_joined():
            self._pump(lambda: self._all_reported() or bool(self._failures), limit_s)
        else:
            limit_s = join_s
        if self._failures:  # the first error to arrive is not always the first failure
            self._pump(lambda: self._all_reported() or self._has_culprit(), _VICTIM_S)
            self._pump(self._all_reported, _GRACE_S)
        if self._failures or not self._all_reported():
            returned = list(self._values)  # later is too late
            where = self._locate()
            raise diagnose(
                returned=returned,
                failures=self._failures,
                where=where,
                limit_s=limit_s,
            )
        return [self._values[rank.number] for rank in self._ranks]

    def end(self) -> None:
        """Kill the ranks, print the rest of their output, and wait until they are gone.

        A rank whose process id has not arrived ends because its pipe is closed.
        """
        for rank in self._ranks:
            rank.give_up()
            if rank.pid and rank.is_alive:
                kill_group(rank.pid)
        self._pump(
            lambda: not any(rank.pid and rank.is_alive for rank in self._ranks), _END_S
        )
        for rank in self._ranks:
            self._drain(rank)
            rank.close()
        self._selector.close()

    def _all_joined(self) -> bool:
        return all(rank.has_joined for rank in self._ranks)

    def _all_reported(self) -> bool:
        return len(self._values) + len(self._failures) == len(self._ranks)

    def _has_culprit(self) -> bool:
        return any(not failure.is_victim for failure in self._failures.values())

    def _pump(self, done: Callable[[], bool], limit_s: float) -> None:
        """Handle what arrives until `done()`, or for `limit_s` at most."""
        deadline = time.monotonic() + limit_s
        while not done() and (left := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(min(left, 3600)):
                rank: _Rank = key.data
                if key.fileobj is rank.sock:
                    self._handle(rank)
                elif self._take_output(rank) == b"":
                    self._selector.unregister(rank.out)

    def _take_output(self, rank: _Rank) -> bytes | None:
        data = rank.read_output()
        if data and self._show in ("all", rank.number):
            rank.print_lines(data)
        return data

    def _drain(self, rank: _Rank) -> None:
        for _ in range(32):  # a pipe holds 64 kB or 1 MB; a lost child may still write
            if not self._take_output(rank):
                break
        rank.end_line()

    def _handle(self, rank: _Rank) -> None:
        kind, fds = rank.receive()
        if not rank.is_alive:
            self._selector.unregister(rank.sock)
            self._values.pop(rank.number, None)  # it died while peers may need it
            failure = (
                rank.death(is_checked=self._is_checked)
                if kind
                else Failure(
                    time_s=time.monotonic(), summary="lost: its fork server ended first"
                )
            )
            self._failures.setdefault(rank.number, failure)
        elif kind == b"j":
            rank.has_joined = True
        elif kind != b"p":
            try:
                content = next(load(fds[0]))
            except Exception as error:
                text = f"the kernel cannot unpickle the result: {one_line(error)}"
                kind, content = b"f", Failure(time_s=time.monotonic(), summary=text)
            kinds = {b"v": self._values, b"f": self._failures, b"s": self._where}
            kinds[kind][rank.number] = content

    def _locate(self) -> dict[int, Where]:
        """Ask the ranks that live where they are; who has reported can answer too."""
        for rank in self._ranks:
            self._drain(rank)
        self._show = None  # what follows is for the diagnosis
        living = [rank for rank in self._ranks if rank.is_alive]
        for rank in living:
            if _is_stopped(rank.pid):
                stack = "no stack: the process is stopped\n"
                self._where[rank.number] = Where(stack=stack, is_stopped=True)
            else:
                send_message(rank.sock, b"?", None)
        self._pump(lambda: all(it.number in self._where for it in living), _STACK_S)
        silent = [rank for rank in living if rank.number not in self._where]
        for rank in silent:  # some extension holds the GIL: a signal handler still runs
            rank.tail = b""
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGUSR1)
        self._pump(lambda: all(rank.tail for rank in silent), _SIGNAL_S)
        if silent:
            self._pump(lambda: False, _REST_S)
        for rank in silent:
            stack = rank.tail.decode(errors="replace") or "no stack: no answer\n"
            self._where[rank.number] = Where(stack=stack)
        return self._where


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # Python names the first and the last real-time signal only
        return f"signal {number}"


def _is_stopped(pid: int) -> bool:
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return False
    return status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
