"""Joining a job changes nothing that it does not restore."""

import json

import pytest
import torch
import torch.distributed as dist

import labpkg as lab
from labpkg.runs.joining import call_in_file, joined


def test_alone_it_is_a_job_of_one_rank():
    with joined("cpu") as device:
        assert device == torch.device("cpu")
        assert dist.get_world_size() == 1
        assert lab.all_reduce(torch.ones(2)).tolist() == [1.0, 1.0]
    assert not dist.is_initialized()


def test_an_error_leaves_no_group_of_one_rank_behind():
    def fail():
        with joined("cpu"):
            lab.DataParallel(lab.MLP(2, 2), lab.make_mesh()["dp"])
            raise KeyError("planted")

    for _ in range(2):
        with pytest.raises(KeyError, match="planted"):
            fail()
        assert not dist.is_initialized()


def _inside_a_world():
    with joined() as device:
        size = dist.get_world_size()
    refused = ""
    try:
        with joined("cuda"):
            pass
    except ValueError as error:
        refused = str(error)
    return str(device), size, dist.is_initialized(), refused


def test_inside_a_world_it_uses_the_group_and_leaves_it(world2):
    device, size, is_still_there, refused = world2.run(_inside_a_world)[0]
    if world2.device == "cpu":
        assert device == "cpu"
        assert refused == ("device='cuda', but this job runs on cpu; start it on cuda")
    assert (size, is_still_there) == (2, True)


def test_a_function_of_a_file_finds_its_neighbours(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)  # restores what call_in_file adds
    (tmp_path / "neighbour_of_job.py").write_text("VALUE = {1, 2}\n")
    job = tmp_path / "job_with_neighbour.py"
    job.write_text(
        "import neighbour_of_job\n\n"
        "def main():\n    return [neighbour_of_job.VALUE, 3]\n"
    )
    assert json.loads(call_in_file(str(job), "main", "cpu")) == ["{1, 2}", 3]
