"""Planted faults: who is blamed, how soon, and that no process is left."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

import labpkg as lab
from labpkg.bench.faults import FAULTS, MAX_RESULT_BYTES, WANTED_S, commit, interrupt
from labpkg.processes import run
from labpkg.processes.fork_server import ForkServer
from tests.processes.survivors import gone, started_with

HANGS = "did not end within 1 s"
# Faults that can meet both transports: shared memory unless the test asks for gloo.
ANYWHERE = [it for it in FAULTS if not it.endswith((", gloo", ", shared memory"))]
GUILTY = (0, 1, 3)
SEEDED = random.Random(0)


def with_a_child(name, guilty, by_gloo=False):
    subprocess.Popen(["sleep", "1000"])  # it must not outlive the run
    return commit(name, guilty, by_gloo=by_gloo)


@pytest.fixture(scope="module")
def idle(world4):
    """The fork server and what is open when nothing runs; the server is warm then."""
    world4.run(dist.get_rank)
    seen = [time.sleep(0.05) or open_files() for _ in range(20)]  # it closes some late
    return ForkServer.get().pid, tuple(map(min, zip(*seen, strict=True)))


@pytest.fixture(autouse=True)
def leave_no_process(idle, monkeypatch):
    """Whatever inherits this variable must be gone at the end of the test."""
    server_pid, before = idle
    token = f"LABPKG_TEST_{os.getpid()}"
    monkeypatch.setenv(token, "1")
    yield
    servers = {server_pid, ForkServer.get().pid}
    deadline = time.monotonic() + 2
    while left := [pid for pid in started_with(token) if pid not in servers]:
        assert time.monotonic() < deadline, [psutil.Process(p).cmdline() for p in left]
        time.sleep(0.05)
    server = psutil.Process(ForkServer.get().pid)
    assert server.children(recursive=True) == []
    while open_files() != before and len(servers) == 1:  # the server closes its own
        assert time.monotonic() < deadline, (before, open_files())
        time.sleep(0.05)
    assert not [*Path("/dev/shm").glob("*labpkg*")]


def open_files():
    """Sockets, pipes and memory files live as long as somebody has them open."""
    gc.collect()
    return psutil.Process().num_fds(), psutil.Process(ForkServer.get().pid).num_fds()


@pytest.fixture(scope="module")
def world():
    with lab.World(4, device="cpu", max_result_bytes=MAX_RESULT_BYTES) as world:
        yield world


def check_fault(world, name, guilty, by_gloo=False):
    fault, start = FAULTS[name], time.monotonic()
    limit_s = 30 if fault.hangs is False else 1
    with pytest.raises(lab.RankError, match=f"(?s){fault.says}") as info:
        world.run(with_a_child, name, guilty, by_gloo, timeout_s=limit_s, show=None)
    took_s, error = time.monotonic() - start, info.value
    assert error.rank == guilty, str(error)
    assert sorted([*error.others, error.rank]) == [0, 1, 2, 3]
    if fault.hangs:
        assert re.search(f"{HANGS}.*inference", str(error))
        waiting = [it for it in error.others.values() if it.startswith("waited in")]
        assert len(waiting) >= 2
        assert "Stack of rank" in error.traceback
        assert "in commit" in error.traceback
    assert took_s < WANTED_S + (0 if fault.hangs is False else limit_s)
    assert world.run(dist.get_rank) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", FAULTS)
def test_fault(world, name):
    check_fault(world, name, SEEDED.choice(GUILTY))


@pytest.mark.parametrize("name", ANYWHERE)
def test_fault_without_shared_memory(world, name):
    check_fault(world, name, SEEDED.choice(GUILTY), by_gloo=True)


@pytest.mark.soak
@pytest.mark.parametrize("guilty", GUILTY)
@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("repeat", range(4))
def test_fault_repeated(world, name, guilty, repeat):
    check_fault(world, name, guilty, by_gloo=repeat % 2 == 1 and name in ANYWHERE)


@pytest.mark.parametrize("name", [name for name in FAULTS if FAULTS[name].hangs])
def test_a_hang_is_interrupted(world, name):
    assert interrupt(world, name) < WANTED_S
    assert world.run(dist.get_rank) == [0, 1, 2, 3]


def check_interrupt_at(world, name, delay_s):
    """Interrupt at some moment; twice, since people do."""
    press = signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]
    timers = [threading.Timer(delay_s + more, *press) for more in (0, 0.02)]
    for timer in timers:
        timer.start()
    with contextlib.suppress(KeyboardInterrupt, lab.RankError):
        world.run(with_a_child, name, 1, timeout_s=0.5, show=None)
    for _ in timers:  # one may come only now
        with contextlib.suppress(KeyboardInterrupt):
            for timer in timers:
                timer.join()
    assert world.run(dist.get_rank) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", SEEDED.sample(list(FAULTS), 8))
def test_an_interrupt_at_any_moment_leaves_nothing(world, name):
    check_interrupt_at(world, name, SEEDED.uniform(0, 0.3))


@pytest.mark.soak
@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("repeat", range(10))
def test_an_interrupt_at_any_moment_repeated(world, name, repeat):
    check_interrupt_at(world, name, random.Random(f"{name} {repeat}").uniform(0, 0.7))


def test_a_rank_ends_at_once_without_its_process_id(world, monkeypatch):
    # An interrupt may come before the ids of all ranks: the pipes must do it alone.
    monkeypatch.setattr(run, "kill_group", lambda pid: None)
    start = time.monotonic()
    assert world.run(dist.get_rank) == [0, 1, 2, 3]
    assert time.monotonic() - start < run._END_S


def test_our_question_kills_no_rank_that_has_hardly_begun(world):
    server = psutil.Process(ForkServer.get().pid)
    server.send_signal(signal.SIGUSR1)  # a rank inherits what becomes of it
    assert world.run(dist.get_rank) == [0, 1, 2, 3]
    assert server.is_running()


class SlowPath:
    """Takes a rank half a second while it starts."""

    def __reduce__(self):
        return eval, (f"__import__('time').sleep(0.5) or {sys.path!r}",)


def test_the_time_limit_counts_from_the_moment_of_joining(world, monkeypatch):
    make_job = world._job

    def slow_job(port):
        return dataclasses.replace(make_job(port), path=SlowPath())

    monkeypatch.setattr(world, "_job", slow_job)
    assert world.run(dist.get_rank, timeout_s=0.4) == [0, 1, 2, 3]
    monkeypatch.setattr(run, "_JOIN_S", 0.2)
    with pytest.raises(lab.RankError, match=r"did not end within 0\.2 s"):
        world.run(dist.get_rank, timeout_s=0.1)
    monkeypatch.undo()
    with pytest.raises(lab.RankError, match=r"did not end within 0\.1 s"):
        world.run(lambda path: path, SlowPath(), timeout_s=0.1)  # the call counts


def test_the_first_failure_is_named_and_the_others_are_listed(world4):
    def all_fail():
        time.sleep(0.1 * (3 - dist.get_rank()))
        raise KeyError(dist.get_rank())

    with pytest.raises(lab.RankError, match="rank 3: KeyError: 3") as info:
        world4.run(all_fail)
    assert info.value.others[2] == "failed too: KeyError: 2"
    assert "all_fail" in info.value.traceback
    assert "processes/rank.py" not in info.value.traceback


def test_a_wrapped_connection_error_is_a_victim(world4):
    def wrapped():
        try:
            if dist.get_rank() == 2:
                os._exit(5)
            dist.all_reduce(torch.ones(1))
        except RuntimeError as error:
            raise ValueError("the step failed") from error

    with pytest.raises(lab.RankError, match=r"rank 2: .*exit code 5") as info:
        world4.run(wrapped)
    assert "lost a connection" in str(info.value.others)


def test_a_signal_without_a_name(world2):
    def die():
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGRTMIN + 6)
        dist.barrier()

    with pytest.raises(lab.RankError, match=r"rank 1: killed by signal \d+"):
        world2.run(die)


def test_check_explains_a_mismatch(world2):
    def sizes():
        dist.all_reduce(torch.ones(2 + dist.get_rank()))
        dist.barrier()

    def other_collective():
        if dist.get_rank() == 1:
            dist.broadcast(torch.ones(2), src=1)
        else:
            dist.all_reduce(torch.ones(2))

    with lab.World(2, check=True) as world:
        with pytest.raises(lab.RankError, match=r"mismatch between coll.*shapes: \d"):
            world.run(sizes)
        with pytest.raises(lab.RankError, match="BROADCAST"):
            world.run(other_collective)
        assert world.run(dist.get_rank) == [0, 1]


def test_a_mismatch_that_does_not_abort_is_suspected(world4):
    def near():  # gloo splits so small a tensor in ways that happen to fit
        dist.all_reduce(torch.ones(2 + (dist.get_rank() == 1)))

    with pytest.raises(lab.RankError, match=f"rank 1: .*{HANGS}.*not match: all"):
        world4.run(near, timeout_s=1)


def test_a_held_interpreter_lock_still_gives_a_stack(world2):
    def hold():
        import ctypes

        if dist.get_rank() == 1:
            ctypes.PyDLL(None).sleep(1000)

    start = time.monotonic()
    with pytest.raises(lab.RankError, match="rank 1") as info:
        world2.run(hold, timeout_s=0.5)
    assert "in hold" in info.value.traceback
    assert time.monotonic() - start < 2.5


def test_the_fork_server_is_replaced(world2, monkeypatch, tmp_path):
    world2.run(dist.get_rank)
    old = ForkServer.get()
    os.kill(old.pid, signal.SIGKILL)
    assert gone([old.pid], 1) == []
    # A module of ours that cannot be imported is an error, not a slower start.
    shutil.copytree(Path(lab.__file__).parent, tmp_path / "labpkg")
    (tmp_path / "labpkg/planning/broken.py").write_text("import does_not_exist")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="No module named 'does_not_exist'"):
        world2.run(dist.get_rank)
    monkeypatch.undo()
    assert world2.run(dist.get_rank) == [0, 1]
    assert ForkServer.get() is not old
