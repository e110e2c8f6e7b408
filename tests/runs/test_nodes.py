"""Jobs on several nodes: network namespaces, or the loopback where there are none."""

import ast
import json
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import cloudpickle
import psutil
import pytest
import torch

# Not the tests of the book, which pyright finds under this name.
from book.runs.recipes import elastic_job  # pyright: ignore[reportMissingImports]
from book.runs.recipes import job as recipe  # pyright: ignore[reportMissingImports]
from book.runs.recipes.nodes import Nodes  # pyright: ignore[reportMissingImports]
from labpkg.processes import mesh
from labpkg.runs.checkpoint import export_state_dict, newest_checkpoint
from labpkg.runs.config import TrainConfig
from labpkg.runs.trainer import Trainer

RECIPES = Path(__file__).parents[2] / "book" / "runs" / "recipes"
_WAIT_S = 240  # for a busy machine
needs_tyro = pytest.mark.skipif(
    find_spec("tyro") is None,
    reason="tyro is not installed: no options of `labpkg train` to read",
)
# The heartbeats of torchrun, faster than its default of 5 s, and less than 30 s to wait
# for more nodes than must come. A busy machine may be late to open the store.
_RENDEZVOUS = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
_RENDEZVOUS += f",read_timeout={_WAIT_S}"


@pytest.fixture
def two_nodes():
    with Nodes(2) as nodes:
        print("nodes:", nodes.reason or "network namespaces")
        yield nodes


def _environment(**variables):
    own = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return os.environ | own | variables


# ---- nodes -------------------------------------------------------------------------


def _run(nodes, node, *command):
    process = nodes.start(node, [*command], stdout=subprocess.PIPE, text=True)
    return process.communicate(timeout=_WAIT_S)[0].strip()


def test_a_node_has_a_name_and_an_address_and_one_cable(two_nodes):
    if not two_nodes.isolated:
        pytest.skip(f"no network namespaces: {two_nodes.reason}")
    for node in (0, 1):
        assert _run(two_nodes, node, "hostname") == f"node{node}"
        links = json.loads(_run(two_nodes, node, "ip", "-json", "link"))
        assert {link["ifname"] for link in links} == {"lo", "eth0"}
        other = _run(two_nodes, node, "getent", "hosts", f"node{1 - node}").split()
        assert other == [f"10.77.0.{2 - node}", f"node{1 - node}"]
    addresses = [it for own in psutil.net_if_addrs().values() for it in own]
    assert not any(it.address.startswith("10.77.0.") for it in addresses)


def test_what_leaves_a_node_is_counted_and_slowed_down(two_nodes):
    if not two_nodes.isolated:
        pytest.skip(f"no network namespaces: {two_nodes.reason}")
    before = two_nodes.sent_bytes(0)
    two_nodes.limit(0, 1_000_000)
    peer = "socket.create_server(('', 5000)).accept()[0].makefile('rb')"
    take = f"import socket; print(len({peer}.read()))"
    peer = "socket.create_connection(('node1', 5000))"
    give = f"import socket; {peer}.sendall(bytes(500_000))"
    server = two_nodes.start(
        1, [sys.executable, "-c", take], stdout=subprocess.PIPE, text=True
    )
    start = time.monotonic()
    while _run(two_nodes, 0, "sh", "-c", f'{sys.executable} -c "{give}" 2>&1'):
        assert time.monotonic() - start < _WAIT_S  # until the server listens
    assert server.communicate(timeout=_WAIT_S)[0] == "500000\n"
    assert time.monotonic() - start > 0.4  # 0.5 MB at 1 MB/s, less a burst of 32 kB
    assert 500_000 < two_nodes.sent_bytes(0) - before < 550_000


@pytest.mark.parametrize("isolated", [True, False])
def test_an_unplugged_node_is_dead_at_once_and_with_all_its_processes(isolated):
    with Nodes(2, isolated=isolated) as nodes:
        other = nodes.start(0, ["sleep", "600"])
        script = "sleep 600 & echo started; wait"
        victim = nodes.start(1, ["sh", "-c", script], stdout=subprocess.PIPE, text=True)
        assert victim.stdout is not None
        assert victim.stdout.readline() == "started\n"
        tree = psutil.Process(victim.pid).children(recursive=True)
        nodes.unplug(1)
        assert not psutil.wait_procs(tree, timeout=_WAIT_S)[1]
        assert other.poll() is None
    assert other.poll() is not None  # leaving the block ends all


# ---- a job that loses a node -------------------------------------------------------


@pytest.fixture
def slurm(tmp_path):
    """Submit to a Slurm that only writes down what `srun` shall start on each node."""
    record = (
        'printf "%s\\n" "$HOST" "$JOB" "$NODES" > asked; printf "%s\\n" "$@" >> asked'
    )
    for name, script in (
        ("scontrol", 'test "$3" = "node[0-1]" && printf "node0\\nnode1\\n"'),
        ("srun", record),
    ):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    variables = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
    }

    def submit(*arguments):
        subprocess.run(
            ["bash", RECIPES / "slurm.sbatch", *arguments],
            check=True,
            cwd=tmp_path,
            env=_environment(**variables),
        )
        host, job, nodes, no_kill, *command = (
            (tmp_path / "asked").read_text().splitlines()
        )
        assert (host, job, nodes, no_kill) == ("node0", "7", "1:2", "--no-kill")
        return {"JOB": job, "NODES": nodes}, command

    return submit


def _options(out, steps):
    return (
        *("-m", "labpkg", "train", "--data", "digits", "--precision", "fp64"),
        *("--steps", str(steps), "--checkpoint-every", "50", "--device", "cpu"),
        *("--global-batch-size", "16", "--resume", "auto", "--json", "--out", str(out)),
    )


class Job:
    """A run on two nodes: an agent on each that `start` has started."""

    def __init__(self, nodes, folder, slurm, *command):
        self.nodes, self.folder, self.out = nodes, folder, folder / "run"
        self.variables, self.command = slurm(*command)
        self.variables |= {"HOST": nodes.hosts[0]}
        self.agents = {}

    def start(self, node):
        """Start the agent of a node; node 0 has the store, also on the loopback."""
        rendezvous = f"{_RENDEZVOUS},is_host={node == 0}"
        self.agents[node] = self.nodes.start(
            node,
            self.command,
            cwd=RECIPES,
            env=_environment(**self.variables, RENDEZVOUS=rendezvous, NODE=str(node)),
            stdout=subprocess.PIPE,
            stderr=(self.folder / f"errors{node}").open("w"),
            text=True,
        )

    @property
    def errors(self):
        """What node 0 has written."""
        return (self.folder / "errors0").read_text()

    def wait_for_checkpoint(self):
        end = time.monotonic() + _WAIT_S
        while newest_checkpoint(self.out / "checkpoints")[0] is None:
            assert time.monotonic() < end, self.errors
            assert all(agent.poll() is None for agent in self.agents.values()), (
                self.errors
            )
            time.sleep(0.01)

    def finish(self):
        """Return what the run on node 0 says."""
        first, second = (self.agents[node] for node in (0, 1))
        answer = first.communicate(timeout=_WAIT_S)[0]
        assert first.returncode == 0, self.errors
        answer = answer or second.communicate(timeout=_WAIT_S)[0]
        return json.loads(answer.splitlines()[-1])  # one line for each attempt


def _weights(out):
    path, skipped = newest_checkpoint(out / "checkpoints")
    assert path is not None
    assert not skipped
    assert path.name == "step_000040"
    return export_state_dict(path)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "isolated", [True, pytest.param(False, marks=pytest.mark.soak)]
)
def test_a_job_goes_on_when_a_node_dies(tmp_path, slurm, isolated):
    out = tmp_path / "run"
    with Nodes(2, isolated=isolated) as nodes:
        job = Job(nodes, tmp_path, slurm, "elastic_job.py", str(out))
        job.start(0)
        job.start(1)
        job.wait_for_checkpoint()
        nodes.unplug(1)
        result = job.finish()
    assert result["ranks"] == 2  # of four
    assert Path(result["from"]).name == "step_000005"
    elastic_job.train(tmp_path / "whole")  # in this process, on one rank
    # The same samples, summed in another order.
    torch.testing.assert_close(
        _weights(out), _weights(tmp_path / "whole"), rtol=0, atol=1e-13
    )


@needs_tyro
@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_job_grows_when_a_node_joins(tmp_path, two_nodes, slurm):
    out, steps = tmp_path / "run", 3_000  # lasts until the node is there
    job = Job(two_nodes, tmp_path, slurm, *_options(out, steps))
    job.start(0)
    job.wait_for_checkpoint()
    job.start(1)
    result = job.finish()
    assert result["num_ranks"] == 4
    assert int(result["resumed_from"].rpartition("_")[2]) >= 50
    options = {"data": "digits", "precision": "fp64", "device": "cpu"}
    options |= {"steps": steps, "global_batch_size": 16, "out": tmp_path / "whole"}
    whole = Trainer(TrainConfig(**options)).run()
    assert result["validation_loss"] == pytest.approx(whole.validation_loss, rel=1e-6)


@pytest.mark.parametrize(
    ("count", "is_shared", "hinted"),
    [("1", "True", True), ("0", "True", False), ("2", "False", False)],
)
def test_a_restart_into_an_old_store_says_how_to_get_a_new_one(
    monkeypatch, count, is_shared, hinted
):
    def refuse(*_, **__):
        raise RuntimeError("Connection refused")

    monkeypatch.setattr(mesh.dist, "init_process_group", refuse)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", is_shared)
    with pytest.raises(RuntimeError, match="Connection refused") as raised:
        mesh._join("gloo")
    notes = " ".join(getattr(raised.value, "__notes__", []))
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in notes) == hinted


# ---- recipes -----------------------------------------------------------------------

_LAUNCHERS = {
    "mpi": ("mpi4py", ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]),
    "submitit": ("submitit", []),
    "dask": ("distributed", []),
    "ray": ("ray", []),
}
_REMEDIES = {"submitit": "-r requirements.txt", "ray": '"ray[train]"'}


@pytest.fixture(scope="module")
def expected(world2):
    cloudpickle.register_pickle_by_value(recipe)
    return world2.run(recipe.train)[0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", _LAUNCHERS)
def test_every_launcher_runs_the_same_job(name, tmp_path, expected):
    package, launcher = _LAUNCHERS[name]
    if find_spec(package) is None:
        remedy = _REMEDIES.get(package, "labpkg[launchers]")
        pytest.skip(f"{package} is not installed: pip install {remedy}")
    options = ["local", str(tmp_path)] if name == "submitit" else []  # for its logs
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*launcher, sys.executable, f"with_{name}.py", *options],
        cwd=RECIPES,  # processes elsewhere find the job by it
        env=_environment(PATH=programs),
        capture_output=True,
        text=True,
        timeout=_WAIT_S,
    )
    assert done.returncode == 0, done.stderr
    result = ast.literal_eval(re.findall(r"{'ranks.*?}", done.stdout)[-1])
    assert result["ranks"] == 2
    assert result["weights"] == pytest.approx(expected["weights"], rel=1e-12)
