"""Meshes: axes, refusals, and the groups that `make_mesh` opens and closes."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import labpkg as lab
from labpkg.processes import mesh as mesh_module
from labpkg.processes.mesh import choose_placement


def test_axes_are_outer_to_inner(world4):
    def axes():
        mesh = lab.make_mesh(tp=2, pp=2)
        return mesh.mesh_dim_names, [mesh[a].get_local_rank() for a in ("pp", "tp")]

    got = world4.run(axes)
    assert {names for names, _ in got} == {("pp", "dp", "cp", "tp")}
    assert [place for _, place in got] == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_product_must_be_the_world_size(world2):
    def build():
        with pytest.raises(ValueError, match=r"dp=3 \* cp=1 \* tp=1 = 3.* 2 ranks"):
            lab.make_mesh(dp=3)
        with pytest.raises(ValueError, match="tp=0 is not a positive int"):
            lab.make_mesh(tp=0)
        return True

    assert world2.run(build) == [True, True]


def test_one_process_needs_no_launcher(tmp_path):
    code = (
        "import labpkg as lab, torch.distributed as dist\n"
        "mesh = lab.make_mesh()\n"
        "print(mesh['dp'].size(), dist.get_world_size())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 1\n", "")


def test_under_torchrun_groups_have_a_limit_and_close_quietly(tmp_path):
    """The engine is alive at exit: the order of destruction must not hang."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch, torch.distributed as dist, labpkg as lab\n"
        "mesh = lab.make_mesh(dp=2)\n"
        "groups = [dist.group.WORLD] + [mesh[a].get_group() for a in ('dp', 'tp')]\n"
        "limits = [g._get_backend(torch.device('cpu')).options._timeout\n"
        "          for g in groups]\n"
        "model = lab.DataParallel(torch.nn.Linear(4, 2), mesh['dp'])\n"
        "model(torch.ones(1, 4)).sum().backward()\n"
        "found = [model.module.weight.grad.sum().item()]\n"
        "found += [t.total_seconds() for t in limits]\n"
        # one write: two ranks share the pipe
        "sys.stdout.write(' '.join(map(str, found)) + '\\n')\n"
    )
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(script)],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["8.0 60.0 60.0 60.0"] * 2


@pytest.mark.parametrize(
    ("world_size", "kwargs", "part"),
    [
        (0, {}, "below 1"),
        (2.0, {}, "not an int"),
        (True, {}, "not an int"),
        (2, {"device": "tpu"}, "choose cpu or cuda"),
        (2, {"backend": "mpi"}, "choose gloo or nccl"),
        (2, {"backend": "nccl", "device": "cpu"}, "one GPU per rank|without NCCL"),
        (10_000, {"backend": "nccl"}, "choose backend='gloo'"),
    ],
)
def test_impossible_placements_are_refused(world_size, kwargs, part):
    with pytest.raises(ValueError, match=part):
        choose_placement(world_size, **kwargs)


def test_placement_without_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    place = choose_placement(4)
    assert (place.device, place.backend) == ("cpu", "gloo")
    assert place.reason == "torch sees no GPU"
    with pytest.raises(ValueError, match="choose device='cpu'"):
        choose_placement(1, device="cuda")


def test_placement_with_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    assert choose_placement(2).backend == "nccl"
    assert choose_placement(2).reason == "one of 2 GPUs per rank"
    assert choose_placement(4).device == "cpu"
    assert choose_placement(4).reason == "2 GPUs are too few for one per rank"
    shared = choose_placement(4, device="cuda")
    assert (shared.device, shared.backend) == ("cuda", "gloo")
    assert shared.reason == "4 ranks share 2 GPUs"
    assert choose_placement(2, backend="gloo").device == "cpu"
    assert choose_placement(4, device="cpu").reason == "as asked for"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_placement(2).reason == "1 GPU is too few for one per rank"
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(ValueError, match="built without NCCL"):
        choose_placement(1, backend="nccl")


def test_windows_is_sent_to_wsl(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(RuntimeError, match="WSL"):
        choose_placement(2)


@pytest.mark.parametrize(
    ("environment", "num_local"),
    [
        ({"LOCAL_WORLD_SIZE": "4"}, 4),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, 3),
        ({"SLURM_NTASKS_PER_NODE": "8"}, 8),
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_PER_TASK": "1"}, 1),
        ({}, None),
    ],
)
def test_ranks_per_machine_come_from_the_launcher(monkeypatch, environment, num_local):
    for name in ("SLURM_GPUS_PER_TASK", *mesh_module._LOCAL_SIZES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "16")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    if num_local is None:
        assert mesh_module._local_world_size("cpu") == 16
        with pytest.raises(ValueError, match="set LOCAL_WORLD_SIZE"):
            mesh_module._local_world_size(None)
    else:
        assert mesh_module._local_world_size(None) == num_local
