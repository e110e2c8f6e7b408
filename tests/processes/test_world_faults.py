"""Planted faults: who is blamed, how soon, and that no process is left."""

from __future__ import annotations

import contextlib
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
from labpkg.processes.fork_server import ForkServer

HANGS = "did not end within 1 s"
FAULTS = {
    "raise": "ValueError: rank one is broken",
    "late raise": "ValueError: rank one is broken",
    "sys.exit": "SystemExit: 3",
    "os._exit": "exit code 7",
    "SIGKILL": "killed by SIGKILL",
    "SIGSEGV": "killed by SIGSEGV",
    "unpicklable exception": "Weird",
    "unpicklable result": "cannot be pickled",
    "poison result": "OSError: poison",
    "mismatch": "SIGABRT",
    "SIGSTOP": f"{HANGS}.*was stopped",
    "sleep": f"{HANGS}.*inference.*ran outside collectives",
    "spin": f"{HANGS}.*inference.*ran outside collectives",
    "recv": f"{HANGS}.*fewest collectives.*waited in recv",
    "early return": HANGS,
}
GUILTY = (0, 1, 3)
SEEDED = random.Random(0)


class Weird(Exception):
    def __init__(self, a, b):
        super().__init__(a)
        self.lock = threading.Lock()

    def __str__(self):
        raise RuntimeError("no text")


class Poison:
    def __reduce__(self):
        return _poison, ()


def _poison():
    if "RANK" not in os.environ:
        raise OSError("poison")


def end_process(kind):
    if kind == "sys.exit":
        sys.exit(3)
    if kind == "os._exit":
        os._exit(7)
    os.kill(os.getpid(), getattr(signal, kind))


def fault(kind, guilty):
    x = torch.ones(4)
    dist.all_reduce(x)
    subprocess.Popen(["sleep", "1000"])  # a child must not outlive the run
    if dist.get_rank() == guilty:
        if kind in ("raise", "late raise"):
            time.sleep(0.5 if kind == "late raise" else 0)
            raise ValueError("rank one is broken")
        if kind in ("sys.exit", "os._exit", "SIGKILL", "SIGSEGV", "SIGSTOP"):
            end_process(kind)
        if kind == "sleep":
            time.sleep(1000)
        while kind == "spin":
            pass
        if kind == "unpicklable exception":
            raise Weird(1, 2)
        if kind == "unpicklable result":
            return threading.Lock()
        if kind == "poison result":
            return Poison()
        if kind == "mismatch":
            x = torch.ones(1000)
        if kind == "recv":
            dist.recv(x, src=(guilty + 1) % 4)
        if kind == "early return":
            return "returned early"
    if kind not in ("unpicklable result", "poison result"):
        dist.all_reduce(x)
    return None


@pytest.fixture(autouse=True)
def leave_no_process(world4, monkeypatch):
    """Whatever inherits this variable must be gone at the end of the test."""
    world4.run(dist.get_rank)  # the limits below hold for a warm fork server
    token = f"LABPKG_TEST_{os.getpid()}"
    servers = {ForkServer.get().pid}
    monkeypatch.setenv(token, "1")
    yield
    servers |= {ForkServer.get().pid}
    deadline = time.monotonic() + 2
    while left := [pid for pid in started_with(token) if pid not in servers]:
        assert time.monotonic() < deadline, [psutil.Process(p).cmdline() for p in left]
        time.sleep(0.05)
    server = psutil.Process(ForkServer.get().pid)
    assert server.children(recursive=True) == []


def started_with(variable):
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.pid != os.getpid() and variable in process.environ():
                yield process.pid


def gone(pids, limit_s):
    deadline = time.monotonic() + limit_s
    while left := [pid for pid in pids if is_running(pid)]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.02)
    return []


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check_fault(world, kind, guilty):
    start = time.monotonic()
    with pytest.raises(lab.RankError, match=FAULTS[kind]) as info:
        world.run(fault, kind, guilty, timeout_s=1 if HANGS in FAULTS[kind] else 30)
    took_s, error = time.monotonic() - start, info.value
    assert sorted([*error.others, error.rank]) == [0, 1, 2, 3]
    if kind == "early return":
        assert "it had returned while others wait" in str(error)
    if kind != "mismatch":  # whoever gets the larger message dies
        assert error.rank == guilty, str(error)
    if HANGS in FAULTS[kind]:
        waiting = [it for it in error.others.values() if it.startswith("waited in")]
        assert len(waiting) >= 2
        assert "all_reduce [4] (number 2 in default_pg)" in str(waiting)
        assert "Stack of rank" in error.traceback
        assert "in fault" in error.traceback
    assert took_s < (3.0 if HANGS in FAULTS[kind] else 2.0)


@pytest.mark.parametrize("kind", FAULTS)
def test_fault(world4, kind):
    check_fault(world4, kind, SEEDED.choice(GUILTY))
    assert world4.run(dist.get_rank) == [0, 1, 2, 3]


@pytest.mark.soak
@pytest.mark.parametrize("guilty", GUILTY)
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("repeat", range(10))
def test_fault_repeated(world4, kind, guilty, repeat):
    check_fault(world4, kind, guilty)


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


# Other kernels: each is a script that imports torch and starts its own fork server.

BUSY = """
import os, signal, sys, time, torch, torch.distributed as dist, labpkg as lab
def busy(ways):
    way = ways[dist.get_rank()]
    print("in", flush=True)
    if way == "collective": dist.all_reduce(torch.ones(1))
    while way == "spin": pass
    if way == "stop": os.kill(os.getpid(), signal.SIGSTOP)
    if way == "child": os.system("sleep 1000")
    time.sleep(1000)
world = lab.World(5, timeout_s=None)
"""
ALL_WAYS = ["sleep", "collective", "spin", "stop", "child"]


@contextlib.contextmanager
def kernel(tmp_path, text, *args):
    """Run a script in a session of its own, as a terminal does."""
    path = tmp_path / "script.py"
    path.write_text(text)
    process = subprocess.Popen(
        [sys.executable, str(path), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_line(process, line):
    assert process.stdout.readline() == line + "\n", process.stderr.read()


def family(process):
    return [it.pid for it in psutil.Process(process.pid).children(recursive=True)]


def check_kernel_killed(tmp_path, first):
    with kernel(tmp_path, BUSY + f"world.run(busy, {ALL_WAYS})") as process:
        process.stdout.readline()
        read_line(process, "[0] in")
        time.sleep(0.3)
        others = family(process)
        assert len(others) >= 7  # the server, five ranks, a child
        if first == "fork server":
            os.kill(others[0], signal.SIGKILL)
        process.kill()
        assert gone(others, 2) == []


@pytest.mark.parametrize("first", ["kernel", "fork server"])
def test_kernel_killed(tmp_path, first):
    check_kernel_killed(tmp_path, first)


@pytest.mark.soak
@pytest.mark.parametrize("first", ["kernel", "fork server"])
@pytest.mark.parametrize("repeat", range(25))
def test_kernel_killed_repeated(tmp_path, first, repeat):
    check_kernel_killed(tmp_path, first)


def test_kernel_killed_while_its_server_imports(tmp_path):
    text = "import labpkg as lab, time; lab.World(2); time.sleep(1000)"
    with kernel(tmp_path, text) as process:
        while not (others := family(process)):
            time.sleep(0.05)
        process.kill()
        # 2 s, and what a busy machine needs to load one library: that cannot be broken
        assert gone(others, 5) == []


def test_interrupt(tmp_path):
    text = BUSY + (
        "for way in ['collective', 'spin', 'stop']:\n"
        "    try: world.run(busy, ['sleep', way, way, way, way])\n"
        "    except KeyboardInterrupt: print('interrupted', flush=True)\n"
        "print(world.run(dist.get_rank))\n"
    )
    with kernel(tmp_path, text) as process:
        time.sleep(2.0)  # the server still imports: nobody has run anything
        process.stdout.readline()
        for number in range(3):
            read_line(process, "[0] in")
            time.sleep(0.2)
            others = family(process)[1:]
            start = time.monotonic()
            # Ctrl-C and Jupyter signal the whole process group.
            (os.killpg if number else os.kill)(process.pid, signal.SIGINT)
            read_line(process, "interrupted")
            assert time.monotonic() - start < 2
            assert gone(others, 0.5) == []
        output = process.communicate(timeout=30)
    assert output == ("[0, 1, 2, 3, 4]\n", "")


def test_interrupt_while_the_server_imports(tmp_path):
    text = (
        "import labpkg as lab, time\n"
        "world = lab.World(2); print('made', flush=True)\n"
        "try: world.run(time.sleep, 1000)\n"
        "except KeyboardInterrupt: print('interrupted', flush=True)\n"
        "print(world.run(int))\n"
    )
    with kernel(tmp_path, text) as process:
        process.stdout.readline()
        read_line(process, "made")
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=60)
    assert output == ("interrupted\n[0, 0]\n", "")


def test_script_without_main_guard_ends_quietly(tmp_path):
    text = (
        "import labpkg as lab, psutil\n"
        "class Thing: pass\n"
        "world = lab.World(2)\n"
        "assert all(type(it) is Thing for it in world.run(lambda: Thing()))\n"
        "print(psutil.Process().children()[0].pid)\n"
        "world.run(lambda: {}['key'])\n"
    )
    with kernel(tmp_path, text) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines()[-1] == "KeyError: 'key'"
    assert err.count("Traceback") == 2  # the kernel's, and in its text the rank's
    assert re.search(r"^labpkg\S+RankError: rank \d: KeyError: 'key'$", err, re.M)
    assert gone([int(out.splitlines()[1])], 0.5) == []


def test_script_that_runs_nothing_ends_quietly(tmp_path):
    text = "import labpkg as lab, time; world = lab.World(2); del world; print(1)"
    start = time.monotonic()
    with kernel(tmp_path, text) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out.splitlines()[1:], err) == (0, ["1"], "")
    assert time.monotonic() - start < 20


def test_under_xdist(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import labpkg as lab, torch.distributed as dist\n"
        "def test_it():\n"
        "    assert lab.World(2).run(dist.get_world_size) == [2, 2]\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
