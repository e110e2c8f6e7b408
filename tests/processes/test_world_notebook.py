"""`World` in a Jupyter kernel: cells as functions, tracebacks, interrupts."""

from __future__ import annotations

import os
import re
import signal
import textwrap
import threading
import time

import psutil
import pytest

from tests.processes.survivors import gone

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
jupyter_client = pytest.importorskip(
    "jupyter_client", reason="jupyter_client is not installed"
)

CELLS = {
    "setup": """
        import os, signal, threading, time
        import torch, torch.distributed as dist, labpkg as lab
        world = lab.World(4, timeout_s=20)
    """,
    "function": """
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = torch.nn.Linear(4, 2)
        def step():
            net = Net()
            net.linear(torch.ones(2, 4)).sum().backward()
            print("loss", dist.get_rank())
            return net, lab.all_reduce(net.linear.weight.grad)
    """,
    "run": """
        nets = world.run(step)
        assert all(type(net) is Net and grad[0, 0] == 8 for net, grad in nets)
    """,
    "show": "_ = world.run(step, show='all')",
    "error": """
        def bad():
            if dist.get_rank() == 2:
                raise ValueError("here is the bad line")
            dist.barrier()
        try:
            world.run(bad)
        except lab.RankError as error:
            print(error)
    """,
    "hang": """
        def hang():
            if dist.get_rank() == 1:
                time.sleep(100)
            dist.all_reduce(torch.ones(3))
        try:
            world.run(hang, timeout_s=1)
        except lab.RankError as error:
            print(error)
    """,
    "interrupt": """
        def interrupt():
            time.sleep(1)
            os.killpg(os.getpgid(0), signal.SIGINT)
        threading.Thread(target=interrupt).start()
        start = time.monotonic()
        try:
            world.run(lambda: dist.recv(torch.ones(1), src=1 - dist.get_rank() % 2))
        except KeyboardInterrupt:
            print("interrupted", time.monotonic() - start < 3)
    """,
    "again": "world.run(dist.get_rank)",
    "server": """
        from labpkg.processes.fork_server import ForkServer
        print(ForkServer.get().pid)
    """,
}


@pytest.fixture(scope="module")
def output():
    cells = [
        nbformat.v4.new_code_cell(textwrap.dedent(t).strip()) for t in CELLS.values()
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=60).execute()
    return {
        name: "".join(it.get("text") or it["data"]["text/plain"] for it in cell.outputs)
        for name, cell in zip(CELLS, notebook.cells, strict=True)
    }


def test_functions_and_classes_of_cells_travel(output):
    assert output["setup"].startswith("World: 4 ranks on ")
    assert output["run"] == "[0] loss 0\n"
    assert sorted(output["show"].splitlines()) == [f"[{r}] loss {r}" for r in range(4)]


def test_a_traceback_points_into_the_cell(output):
    assert output["error"].startswith("rank 2: ValueError: here is the bad line\n")
    line = 'cell, line 3, in bad\n    raise ValueError("here is the bad line")'
    assert line in output["error"]


def test_a_hang_points_into_the_cell(output):
    assert re.match(r"rank 1: the run did not end within 1 s.*\n", output["hang"])
    assert "(rank 0: waited in all_reduce [3] (number 1" in output["hang"]
    assert "cell, line 3, in hang\n    time.sleep(100)" in output["hang"]
    assert "cell, line 4, in hang\n    dist.all_reduce" in output["hang"]


def test_an_interrupt_ends_the_run_but_not_the_world(output):
    assert output["interrupt"] == "interrupted True\n"
    assert output["again"] == "[0, 1, 2, 3]"


def test_the_end_of_the_kernel_leaves_nothing(output):
    deadline = time.monotonic() + 2
    while psutil.pid_exists(int(output["server"])):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    mine = psutil.Process(os.getpid()).children(recursive=True)
    assert not [it for it in mine if "ipykernel" in " ".join(it.cmdline())]


# ---- kernels as editors start them -------------------------------------------------

VS_CODE = {
    "VSCODE_PID": "1",
    "VSCODE_CWD": "/",
    "PYTHONUNBUFFERED": "1",
    "PYTHONIOENCODING": "utf-8",
    "PYDEVD_IPYTHON_COMPATIBLE_DEBUGGING": "1",
    "FORCE_COLOR": "1",
    "TERM": "xterm-color",
}
JUPYTERLAB = {"JPY_SESSION_NAME": "a/notebook.ipynb", "MPLBACKEND": "inline"}
EDITOR_CELLS = {
    "import os, threading, time, torch.distributed as dist, labpkg as lab\n"
    "world = lab.World(2, timeout_s=None)": "World: 2 ranks",
    "print(world.run(dist.get_rank))": "[0, 1]",
    # a cell that awaits has a running event loop around it
    "import asyncio\nawait asyncio.sleep(0)\nprint(world.run(dist.get_rank))": "[0, 1]",
    "print(await asyncio.to_thread(world.run, dist.get_rank))": "[0, 1]",
    "%%capture captured\n_ = world.run(print, 'hello', show=1)": "",
    "print(captured.stdout)": "[1] hello",
    "print(world.run(lambda: world.world_size if 0 else os.getppid())[0] > 1)": "True",
}


@pytest.fixture(params=["JupyterLab", "VS Code"])
def kernel(request):
    """A kernel, and how the editor interrupts it: the group, or the process alone."""
    manager = jupyter_client.KernelManager(kernel_name="python3")
    environment = JUPYTERLAB if request.param == "JupyterLab" else VS_CODE
    manager.start_kernel(env=os.environ | environment)
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    pid = manager.provisioner.process.pid

    def interrupt():
        alone = request.param == "VS Code"
        (os.kill if alone else os.killpg)(pid, signal.SIGINT)

    yield manager, client, pid, interrupt
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def execute(client, code, timeout=60):
    texts = []

    def collect(message):
        content = message["content"]
        if message["msg_type"] == "error":
            texts.append(f"{content['ename']}: {content['evalue']}")
        texts.append(content.get("text", ""))

    client.execute_interactive(code, timeout=timeout, output_hook=collect)
    return "".join(texts)


def test_the_kernel_of_an_editor(kernel):
    manager, client, pid, interrupt = kernel
    for code, expected in EDITOR_CELLS.items():
        assert expected in execute(client, code), code
    setup = "import itertools, torch\ndef loop(): any(itertools.repeat(0))\n"
    wait = "lambda: dist.recv(torch.ones(1), src=1 - dist.get_rank())"
    for before, way in (("", wait), ("", "loop"), ("await asyncio.sleep(0)\n", "loop")):
        timer = threading.Timer(1.0, interrupt)
        timer.start()
        start = time.monotonic()
        assert "KeyboardInterrupt" in execute(
            client, f"{setup}{before}world.run({way})"
        )
        assert time.monotonic() - start < 3.5
        assert "[0, 1]" in execute(client, "print(world.run(dist.get_rank))")
    # `Restart kernel` while ranks run: Jupyter kills it
    client.execute(f"{setup}world.run(loop)")
    family = psutil.Process(pid)
    while len(family.children(recursive=True)) < 3:
        time.sleep(0.05)
    ranks = [it.pid for it in family.children(recursive=True)]
    manager.shutdown_kernel(now=True)
    assert gone(ranks, 2) == []
