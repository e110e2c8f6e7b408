"""Each thing that can be wrong is planted; the doctor must name it and its remedy."""

import json
import os
import platform
import shutil
import sys
import sysconfig
from collections import namedtuple
from importlib.util import find_spec
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist

from labpkg import doctor
from labpkg.processes import world as world_module

GIB = 2**30
DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in doctor._EFFECTS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def without_ranks(monkeypatch):
    checks = tuple(c for c in doctor._CHECKS if c is not doctor._world)
    monkeypatch.setattr(doctor, "_CHECKS", checks)


def found(check, name):
    (finding,) = [finding for finding in check() if finding.name == name]
    return finding


def old_torch(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "2.10.1+cpu")


def no_torch(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)


def missing(*names):
    def plant(monkeypatch):
        monkeypatch.setattr(
            doctor, "_version", lambda name: None if name in names else "3.0"
        )

    return plant


def attribute(target, name, value):
    return lambda monkeypatch: monkeypatch.setattr(target, name, value)


def variable(name, value):
    return lambda monkeypatch: monkeypatch.setenv(name, value)


def memory(available):
    answer = SimpleNamespace(available=available, total=8 * GIB)
    return attribute(psutil, "virtual_memory", lambda: answer)


def disk(total, free):
    return attribute(shutil, "disk_usage", lambda _: DiskUsage(total, 0, free))


def busy(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 9.0, 9.0))


ONE_CORE = attribute(os, "sched_getaffinity", lambda _: {0})
READ_ONLY = attribute(os, "access", lambda path, mode: False)
NO_BACKEND = attribute(dist, "is_available", lambda: False)
NO_SOURCE = attribute(sysconfig, "get_path", lambda _: "/nowhere")
SMI_SEES_TWO = attribute(
    doctor, "_nvidia_smi", lambda *_: ["GPU 0: NVIDIA (UUID: x)", "GPU 1: NVIDIA"]
)
PLANTED = {
    "windows": (
        attribute(platform, "system", lambda: "Windows"),
        (doctor._system, "system", "fail", "WSL"),
    ),
    "old python": (
        attribute(sys, "version_info", (3, 10, 4)),
        (doctor._python, "python", "fail", "3.11"),
    ),
    "old torch": (old_torch, (doctor._torch, "torch", "fail", "2.11")),
    "no torch": (no_torch, (doctor._torch, "torch", "fail", "pip install")),
    "no tyro": (missing("tyro"), (doctor._packages, "packages", "fail", "tyro")),
    "no tqdm": (missing("tqdm"), (doctor._packages, "packages", "fail", "tqdm")),
    "no book": (
        missing("matplotlib"),
        (doctor._packages, "packages", "warn", "matplotlib"),
    ),
    "one core": (ONE_CORE, (doctor._cores, "cores", "warn", "one core")),
    "busy": (busy, (doctor._cores, "cores", "warn", "idle")),
    "memory": (memory(GIB), (doctor._memory, "memory", "warn", "fewer ranks")),
    "shm": (
        disk(64 * 2**20, 64 * 2**20),
        (doctor._shared_memory, "shared memory", "warn", "--shm-size"),
    ),
    "disk full": (
        disk(GIB, 2**20),
        (doctor._folder, "current folder", "warn", "--out"),
    ),
    "read-only": (READ_ONLY, (doctor._folder, "current folder", "fail", "another")),
    "no source": (NO_SOURCE, (doctor._text, "training text", "fail", "--data")),
    "rank": (variable("RANK", "3"), (doctor._environment, "RANK", "fail", "unset")),
    "world size": (
        variable("WORLD_SIZE", "8"),
        (doctor._environment, "WORLD_SIZE", "warn", "unset"),
    ),
    "hidden gpus": (
        variable("CUDA_VISIBLE_DEVICES", ""),
        (doctor._environment, "CUDA_VISIBLE_DEVICES", "warn", "hidden"),
    ),
    "python path": (
        variable("PYTHONPATH", "/home/ada/src"),
        (doctor._environment, "PYTHONPATH", "warn", "unset"),
    ),
    "blocking": (
        variable("CUDA_LAUNCH_BLOCKING", "1"),
        (doctor._environment, "CUDA_LAUNCH_BLOCKING", "warn", "unset"),
    ),
    "no backend": (NO_BACKEND, (doctor._backends, "backends", "fail", "build")),
}


@pytest.mark.parametrize("case", PLANTED)
def test_planted_problem_is_named_with_its_remedy(monkeypatch, tmp_path, case):
    plant, (check, name, status, advice) = PLANTED[case]
    monkeypatch.setattr(doctor, "_SHARED_MEMORY", tmp_path)
    with monkeypatch.context() as planted:
        plant(planted)
        finding = found(check, name)
    assert finding.status == status
    assert advice in finding.advice


@pytest.mark.parametrize(
    ("plant", "check", "name"),
    [
        (memory(8 * GIB), doctor._memory, "memory"),
        (disk(GIB, 8 * GIB), doctor._folder, "current folder"),
        (disk(GIB, 8 * GIB), doctor._shared_memory, "shared memory"),
        (variable("OMP_NUM_THREADS", "4"), doctor._environment, "OMP_NUM_THREADS"),
        (variable("MASTER_PORT", "29500"), doctor._environment, "MASTER_PORT"),
        (variable("CUDA_VISIBLE_DEVICES", "0"), doctor._environment, None),
    ],
)
def test_nothing_wrong_is_ok_without_advice(monkeypatch, tmp_path, plant, check, name):
    monkeypatch.setattr(doctor, "_SHARED_MEMORY", tmp_path)
    plant(monkeypatch)
    finding = found(check, name or "CUDA_VISIBLE_DEVICES")
    assert (finding.status, finding.advice) == ("ok", "")


@pytest.mark.parametrize(
    ("cuda", "hide", "advice"),
    [
        (None, False, "built for CUDA"),
        ("13.0", True, "CUDA_VISIBLE_DEVICES"),
        ("13.0", False, "update the driver"),
    ],
)
def test_gpus_that_torch_does_not_see(monkeypatch, cuda, hide, advice):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    SMI_SEES_TWO(monkeypatch)
    if hide:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    finding = found(doctor._gpus, "gpus")
    assert finding.status == "warn"
    assert "lists 2" in finding.detail
    assert advice in finding.advice


def test_no_gpu_is_no_problem(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda *_: [])
    assert found(doctor._gpus, "gpus").status == "ok"


TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-31
GPU1\tNV18\t X \tSYS\tNODE\t0-31
GPU2\tSYS\tSYS\t X \tSYS\t32-63
NIC0\tPIX\tNODE\tSYS\t X

Legend:
  X    = Self
""".splitlines()


@pytest.mark.parametrize("reach", [True, False])
def test_links_between_gpus(monkeypatch, reach):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    reaches = lambda a, b: reach or 2 not in (a, b)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", reaches)
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda *_: TOPOLOGY)
    finding = found(doctor._gpu_links, "gpu links")
    assert finding.detail.startswith("NV18, SYS; ")
    assert finding.status == ("ok" if reach else "warn")
    assert ("0-2, 1-2" in finding.detail) == (not reach)


def test_one_gpu_has_no_links(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert list(doctor._gpu_links()) == []


def test_two_ranks_really_talk(world2):
    chosen, talk = doctor._world()
    assert (chosen.name, chosen.status) == ("World()", "ok")
    place = world2.placement
    assert f"{place.device} ({place.backend}): {place.reason}" in chosen.detail
    assert (talk.name, talk.status) == ("all_reduce", "ok")
    assert "sum 0 + 1 to 1.0;" in talk.detail


def test_a_wrong_sum_is_a_failure():
    class Silent:
        device, backend = "cpu", "gloo"

        def run(self, fn):
            return [({0.0}, 0.1), ({1.0}, 0.1)]

    finding = doctor._talk(Silent())
    assert finding.status == "fail"
    assert "0.0, 1.0" in finding.detail


@pytest.mark.parametrize("error", [RuntimeError, OSError, ValueError])
def test_a_world_that_does_not_start_is_a_failure(monkeypatch, error):
    def refuse(*args):
        raise error("no more processes\nand a traceback")

    monkeypatch.setattr(world_module, "World", refuse)
    finding = found(doctor._world, "ranks")
    assert finding.status == "fail"
    assert finding.detail == f"{error.__name__}: no more processes"


def test_healthy_machine_exits_with_0_and_parses(capsys, monkeypatch):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: version(name) or "3.0")
    assert doctor.main(json=True) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["can_run"] is True
    assert set(answer["findings"][0]) == {"name", "status", "detail", "advice"}
    names = [finding["name"] for finding in answer["findings"]]
    assert {"torch", "cores", "memory", "backends", "World()", "all_reduce"} < {*names}


@pytest.mark.usefixtures("without_ranks")
@pytest.mark.parametrize("case", [c for c, (_, e) in PLANTED.items() if e[2] == "fail"])
def test_a_failure_exits_with_1(monkeypatch, capsys, case):
    with monkeypatch.context() as planted:
        PLANTED[case][0](planted)
        code = doctor.main()
    out = capsys.readouterr().out
    assert code == 1
    assert PLANTED[case][1][3] in out
    assert out.endswith("The main job cannot run.\n")


@pytest.mark.usefixtures("without_ranks")
@pytest.mark.skipif(
    find_spec("tyro") is None,
    reason="tyro is not installed: the doctor says rightly that the main job fails",
)
def test_a_warning_exits_with_0(monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", "/home/ada/src")
    assert doctor.main() == 0
    assert "warn  PYTHONPATH" in capsys.readouterr().out


def test_nothing_else_is_checked_where_torch_is_missing(monkeypatch):
    no_torch(monkeypatch)
    names = [finding.name for finding in doctor.examine()]
    assert names == ["system", "python", "torch"]


def test_the_answer_is_anonymous(monkeypatch):
    def refuse(*args):
        raise OSError("no /home/ada/.cache/x on ada-laptop.example")

    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("PYTHONPATH", "/home/ada/src")
    monkeypatch.setenv("MASTER_ADDR", "ada-laptop.example")
    monkeypatch.setattr(platform, "node", lambda: "ada-laptop.example")
    monkeypatch.setattr(world_module, "World", refuse)
    text = str(doctor.examine())
    assert "no ~/.cache/x on <host>" in text
    assert "ada" not in text
