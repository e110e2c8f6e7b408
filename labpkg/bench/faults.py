"""What can go wrong in a rank, who is blamed for it, and how soon.

`FAULTS` is the catalogue: one rank of four does something wrong while the others go on,
in a program of three collectives. Wanted is that `World` names this rank within 2 s,
or for a hang within 2 s of the time limit, that the next run works, and that no process
is left. The tests of `World` take the faults from here.

There is no peer to compare with: `wall_ratio` is the share of the time that is wanted,
`value` the longest of the samples. The time counts from the call of `run` to its error,
from the interrupt to the prompt, from the death of the kernel to that of the last rank.
So nothing takes turns, and no median is taken: `labpkg.bench.measure` is not used.

Chapter: processes/ranks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from labpkg.processes import transport
from labpkg.processes.collectives import all_gather, all_reduce
from labpkg.processes.diagnosis import RankError
from labpkg.processes.messages import recv
from labpkg.processes.world import World

NUM_RANKS = 4
WANTED_S = 2.0
MAX_RESULT_BYTES = 2**20
_GUILTY = 1
_HANG_S = 0.5
_START_S = 60.0  # for a second kernel to start its ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something that one rank does.

    Attributes:
        act: What it does, given the tensor that the others reduce.
        says: A regular expression for the error.
        hangs: Whether the run ends by its time limit; None if that depends.
        place: `"middle"` (then it goes on), `"return"` (there it leaves) or `"end"`,
            when the others may have returned.
        by_gloo: The ranks do without shared memory, as on several hosts.
    """

    act: Callable[[Tensor], Any]
    says: str
    hangs: bool | None = False
    place: str = "middle"
    by_gloo: bool = False


class Stubborn(Exception):
    """An exception that can neither be pickled nor printed."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one)
        self.lock = threading.Lock()

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Poison:
    """A value that can be pickled in a rank and not be unpickled in the kernel."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle_poison, ()


def _unpickle_poison() -> None:
    if "RANK" not in os.environ:
        raise OSError("poison")


def _raise(error: BaseException) -> Any:
    raise error


def _raise_late(x: Tensor) -> None:
    time.sleep(0.3)
    raise ValueError("too late")


def _kill(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


def _die_while_waiting(x: Tensor) -> None:
    threading.Timer(0.2, _kill, ["SIGKILL"]).start()
    _wait_for_nobody(x)


def _wait_for_nobody(x: Tensor) -> None:
    recv(x, src=(dist.get_rank() + 1) % NUM_RANKS, tag=1)


def _loop(x: Tensor) -> None:
    while True:
        pass


FAULTS = {
    "raise before a collective": Fault(
        act=lambda x: _raise(ValueError("broken")), says="ValueError: broken"
    ),
    "raise inside a collective": Fault(
        act=lambda x: all_reduce(x, op="median"), says="ValueError: .*median"
    ),
    "raise after the last collective": Fault(
        act=_raise_late, says="ValueError: too late", place="end"
    ),
    "an exception that cannot be pickled": Fault(
        act=lambda x: _raise(Stubborn(1, 2)), says="Stubborn"
    ),
    "sys.exit": Fault(act=lambda x: sys.exit(3), says="SystemExit: 3"),
    "os._exit": Fault(act=lambda x: os._exit(7), says="exit code 7"),
    "SIGKILL": Fault(act=lambda x: _kill("SIGKILL"), says="killed by SIGKILL"),
    "SIGKILL inside a message": Fault(act=_die_while_waiting, says="killed by SIGKILL"),
    "SIGKILL, gloo": Fault(
        act=lambda x: _kill("SIGKILL"), says="killed by SIGKILL", by_gloo=True
    ),
    "SIGSEGV": Fault(act=lambda x: _kill("SIGSEGV"), says="killed by SIGSEGV"),
    "a result that cannot be pickled": Fault(
        act=lambda x: threading.Lock(), says="cannot be pickled", place="end"
    ),
    "a result that cannot be unpickled": Fault(
        act=lambda x: Poison(), says="OSError: poison", place="end"
    ),
    "a result above the limit": Fault(
        act=lambda x: bytes(2 * MAX_RESULT_BYTES),
        says=f"max_result_bytes={MAX_RESULT_BYTES}",
        place="end",
    ),
    "another collective, shared memory": Fault(
        act=all_gather, says="different collectives: .*all_gather of 16 .* on rank"
    ),
    "another shape, shared memory": Fault(
        act=lambda x: all_reduce(torch.ones(2000)),
        says="different collectives: .*sum of 2000 .* on rank",
    ),
    "another order, shared memory": Fault(
        act=lambda x: (all_gather(x), all_reduce(x)),
        says="different collectives",
        place="return",
    ),
    "another collective, gloo": Fault(
        act=all_gather, says="do not match: .*all_gather", hangs=True, by_gloo=True
    ),
    "another shape, gloo": Fault(
        act=lambda x: all_reduce(torch.ones(8)),
        says=r"do not match: .*all_reduce \[8\]",
        hangs=None,
        by_gloo=True,
    ),
    "another order, gloo": Fault(
        act=lambda x: (all_gather(x), all_reduce(x)),
        says="do not match: .*all_gather",
        hangs=True,
        place="return",
        by_gloo=True,
    ),
    "SIGSTOP": Fault(act=lambda x: _kill("SIGSTOP"), says="was stopped", hangs=True),
    "sleep": Fault(
        act=lambda x: time.sleep(1000), says="ran outside collectives", hangs=True
    ),
    "infinite loop in Python": Fault(
        act=_loop, says="ran outside collectives", hangs=True
    ),
    "infinite loop in C": Fault(
        act=lambda x: any(itertools.repeat(0)),
        says="ran outside collectives",
        hangs=True,
    ),
    "a message that nobody sends": Fault(
        act=_wait_for_nobody, says="waited in recv", hangs=True
    ),
    "a return before the others": Fault(
        act=lambda x: "done",
        says="had returned while others wait",
        hangs=True,
        place="return",
    ),
}
"""Name -> what one rank does."""


def commit(name: str, guilty: int = _GUILTY, *, by_gloo: bool = False) -> Any:
    """Be a rank of a job in which one rank commits a fault.

    Args:
        name: One of `FAULTS`.
        guilty: The rank.
        by_gloo: Do without shared memory, also for a fault that would use it.
    """
    fault, group = FAULTS[name], dist.group.WORLD
    if group is not None and (by_gloo or fault.by_gloo):
        transport.use_messages(group)
    x = torch.ones(4)
    all_reduce(x)
    place = fault.place if dist.get_rank() == guilty else "nowhere"
    if place in ("middle", "return"):
        result = fault.act(x)
        if place == "return":
            return result
    all_reduce(x)
    all_gather(x)
    return fault.act(x) if place == "end" else None


def rows(*, quick: bool = False) -> list[dict[str, Any]]:
    """Commit every fault, interrupt the hangs, kill a kernel; measure how long it took.

    Args:
        quick: Once each, instead of five times.

    Returns:
        Rows as in `labpkg.bench.run`, seconds; `variant` is the fault.

    Raises:
        RuntimeError: If another rank is blamed, if an error says something else, or if
            a process is left.
    """
    num_samples = 1 if quick else 5
    found = []
    with World(NUM_RANKS, device="cpu", max_result_bytes=MAX_RESULT_BYTES) as world:
        world.run(dist.get_rank)  # the fork server is warm from here on
        for name, fault in FAULTS.items():
            samples = [measure(world, name) for _ in range(num_samples)]
            kind = "a rank fails" if fault.hangs is False else "a rank hangs"
            extra_s = 0.0 if fault.hangs is False else _HANG_S
            found.append(_row(f"{kind}: named after", name, samples, extra_s))
        for name in (name for name, fault in FAULTS.items() if fault.hangs):
            samples = [interrupt(world, name) for _ in range(num_samples)]
            found.append(_row("an interrupt: ended after", name, samples))
    samples = [kill_kernel() for _ in range(num_samples)]
    found.append(_row("the kernel is killed: all gone after", "SIGKILL", samples))
    return found


def measure(world: World, name: str, guilty: int = _GUILTY) -> float:
    """Return the seconds until a fault is reported, the time to wait for included.

    Args:
        world: Four ranks on the CPU.
        name: One of `FAULTS`.
        guilty: The rank that commits it.

    Raises:
        RuntimeError: If the error blames another rank or says something else.
    """
    fault = FAULTS[name]
    limit_s = 60.0 if fault.hangs is False else _HANG_S
    start_s = time.perf_counter()
    try:
        world.run(commit, name, guilty, timeout_s=limit_s, show=None)
    except RankError as error:
        took_s, text = time.perf_counter() - start_s, str(error)
        summary = text.partition("\n")[0]
        if error.rank == guilty and re.search(fault.says, text):
            return took_s
        raise RuntimeError(f"{name!r} of rank {guilty} is reported as {summary}") from (
            error
        )
    raise RuntimeError(f"{name!r} of rank {guilty} is not noticed")


def interrupt(world: World, name: str) -> float:
    """Return the seconds from an interrupt during a hang until the run has ended.

    Args:
        world: Four ranks on the CPU; the call must come from the main thread.
        name: A fault that hangs.

    Raises:
        RuntimeError: If the run ends otherwise.
    """
    pressed_s: list[float] = []

    def press() -> None:
        pressed_s.append(time.perf_counter())
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    timer = threading.Timer(_HANG_S, press)
    timer.start()
    try:
        world.run(commit, name, timeout_s=30, show=None)
    except KeyboardInterrupt:
        return time.perf_counter() - pressed_s[0]
    finally:
        timer.cancel()
    raise RuntimeError(f"{name!r} was not interrupted")


_KERNEL = """
from labpkg.bench import faults
from labpkg.processes.world import World
world = World(faults.NUM_RANKS, device="cpu", timeout_s=None)
world.run(faults.commit, {name!r}, show=None)
"""


def kill_kernel(name: str = "infinite loop in C") -> float:
    """Return the seconds from the death of a kernel until its processes are gone.

    Args:
        name: A fault that hangs, in which the ranks are meanwhile.

    Raises:
        ValueError: If the fault is no hang.
        RuntimeError: If the ranks do not start, or if a process is left 10 s later.
    """
    if not FAULTS[name].hangs:
        hangs = ", ".join(it for it, fault in FAULTS.items() if fault.hangs)
        raise ValueError(f"name={name!r} is no hang; choose one of {hangs}")
    command = [sys.executable, "-c", _KERNEL.format(name=name)]
    null = subprocess.DEVNULL
    kernel = subprocess.Popen(command, stdout=null, stderr=null)
    try:
        family = psutil.Process(kernel.pid)
        deadline_s = time.perf_counter() + _START_S
        while len(processes := family.children(recursive=True)) < 1 + NUM_RANKS:
            if time.perf_counter() > deadline_s or kernel.poll() is not None:
                raise RuntimeError("the kernel has started no ranks")
            time.sleep(0.05)
        time.sleep(_HANG_S)
    finally:
        kernel.kill()
        start_s = time.perf_counter()
        kernel.wait()
    while left := [process for process in processes if _runs(process)]:
        if time.perf_counter() - start_s > 10:
            raise RuntimeError(f"{len(left)} processes outlive their kernel")
        time.sleep(0.01)
    return time.perf_counter() - start_s


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _row(
    config: str, name: str, samples: list[float], extra_s: float = 0.0
) -> dict[str, Any]:
    wanted_s = WANTED_S + extra_s
    return {
        "config": f"{config} ({wanted_s:g} s wanted)",
        "variant": name,
        "wall_ratio": max(samples) / wanted_s,
        "cpu_ratio": None,
        "samples": len(samples),
        "value": max(samples),
        "unit": "s",
    }
