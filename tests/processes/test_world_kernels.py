"""`World` in other kernels: killed, interrupted, plain scripts.

Each kernel is a script that imports torch and starts its own fork server.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from labpkg.bench.faults import FAULTS
from tests.processes.survivors import gone

BUSY = """
import itertools, os, signal, sys, time, torch, torch.distributed as dist, labpkg as lab
def busy(ways):
    way = ways[dist.get_rank()]
    print("in", flush=True)
    if way == "collective": dist.all_reduce(torch.ones(1))
    while way == "spin": pass
    if way == "stop": os.kill(os.getpid(), signal.SIGSTOP)
    if way == "child": os.system("sleep 1000")
    if way == "C": any(itertools.repeat(0))  # which holds the interpreter
    time.sleep(1000)
world = lab.World(6, timeout_s=None)
"""
ALL_WAYS = ["sleep", "collective", "spin", "stop", "child", "C"]


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
        assert len(others) >= 8  # the server, six ranks, a child
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


FAULT = """
import random, sys, torch, labpkg as lab
from labpkg.bench.faults import FAULTS, MAX_RESULT_BYTES, commit
world = lab.World(4, timeout_s=None, max_result_bytes=MAX_RESULT_BYTES)
world.run(int)
print("warm", flush=True)
while True:
    try: world.run(commit, sys.argv[1], show=None)
    except lab.RankError: pass
"""


def check_kernel_killed_in(tmp_path, name, delay_s):
    """Kill the kernel at some moment of a run that fails, of many in a row."""
    with kernel(tmp_path, FAULT, name) as process:
        process.stdout.readline()
        read_line(process, "warm")
        time.sleep(delay_s)
        others = family(process)
        process.kill()
        assert others
        assert gone([*others, *family_of(others)], 2) == []


def family_of(pids):
    """Ranks that the fork server has started since we looked."""
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            yield from (it.pid for it in psutil.Process(pid).children(recursive=True))


@pytest.mark.parametrize("name", random.Random(2).sample(list(FAULTS), 3))
def test_kernel_killed_in_a_fault(tmp_path, name):
    check_kernel_killed_in(tmp_path, name, 0.4)


@pytest.mark.soak
@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("repeat", range(2))
def test_kernel_killed_in_a_fault_repeated(tmp_path, name, repeat):
    delay_s = random.Random(f"{name} {repeat}").uniform(0, 1)
    check_kernel_killed_in(tmp_path, name, delay_s)


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
        "for way in ['collective', 'spin', 'stop', 'C']:\n"
        "    try: world.run(busy, ['sleep', way, way, way, way, way])\n"
        "    except KeyboardInterrupt: print('interrupted', flush=True)\n"
        "print(world.run(dist.get_rank))\n"
    )
    with kernel(tmp_path, text) as process:
        time.sleep(2.0)  # the server still imports: nobody has run anything
        process.stdout.readline()
        for number in range(4):
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
    assert output == ("[0, 1, 2, 3, 4, 5]\n", "")


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
