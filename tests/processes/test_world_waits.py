"""Which call of ours a rank waits in, who is blamed, and what `check` compares."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

import labpkg as lab
from labpkg.processes import transport
from labpkg.processes.in_place import all_reduce_


def test_check_knows_what_messages_are_made_into():
    def differ(calls):
        calls[dist.get_rank()](torch.ones(2 + 2 * dist.get_rank()), torch.ones(4))

    gather = lambda x, same: lab.all_gather(x)
    scatter = lambda x, same: lab.reduce_scatter(x)
    gather_same = lambda x, same: lab.all_gather(same)
    scatter_same = lambda x, same: lab.reduce_scatter(same)
    reduce_same = lambda x, same: lab.all_reduce(same)
    objects = lambda x, same: lab.all_gather_object(len(x))
    with lab.World(2, device="cpu", check=True) as world:
        for calls, name in [
            ((gather, gather), "_ALLGATHER_BASE"),
            ((gather_same, reduce_same), "_ALLGATHER_BASE"),
            ((gather_same, scatter_same), "_ALLGATHER_BASE"),
            ((scatter, scatter), "_REDUCE_SCATTER_BASE"),
            ((scatter_same, reduce_same), "_REDUCE_SCATTER_BASE"),
            ((objects, reduce_same), "_ALLGATHER_BASE"),
        ]:
            with pytest.raises(lab.RankError, match=f"(?s)mismatch.*{name}"):
                world.run(differ, calls, timeout_s=10)


def test_only_an_unchecked_run_is_told_to_check():
    with lab.World(1) as world, lab.World(1, check=True) as checked:
        with pytest.raises(lab.RankError, match=r"SIGABRT; .*check=True"):
            world.run(os.abort)
        with pytest.raises(lab.RankError, match=r"SIGABRT\n") as info:
            checked.run(os.abort)
    assert "check=True" not in str(info.value)


WAITS = {
    "all_gather": lambda x: lab.all_gather(x),
    "reduce_scatter": lambda x: lab.reduce_scatter(x),
    "all_gather_object": lambda x: lab.all_gather_object(3),
    "barrier": lambda x: lab.barrier(),
    "all_reduce_": lambda x: all_reduce_(x).wait(),
    "send": lambda x: lab.send(x, 1),
    "recv": lambda x: lab.recv(x, 1),
    "a transfer": lambda x: transport.recv(x, dist.group.WORLD, 1, 0).work.wait(),
}
DOING = {
    "messages": {
        "barrier": "barrier; pending: all_reduce [1] (number 1 in default_pg)",
        "all_reduce_": "all_reduce [4] (number 1 in default_pg)",
    },
    "shared memory, at first": {"all_reduce_": "all_reduce"},
    "shared memory": {
        "all_gather": "all_gather of 8 torch.float32",
        "reduce_scatter": "reduce_scatter sum of 4 torch.float32",
        "all_gather_object": "all_gather_object; pending: all_gather of 2 torch.int64",
        "barrier": "barrier; pending: all_reduce sum of 1 torch.float32",
        "all_reduce_": "a transfer; pending: all_reduce sum of 4 torch.float32",
    },
}


@pytest.mark.parametrize("transport_name", DOING)
@pytest.mark.parametrize("name", WAITS)
def test_who_waits_in_a_call_of_ours_is_not_suspected(name, transport_name):
    def sleep_in_one(wait):
        if transport_name == "messages":
            transport.use_messages(dist.group.WORLD)
        elif transport_name == "shared memory":
            lab.barrier()  # opens it
        if dist.get_rank() == 1:
            time.sleep(1000)
        wait(torch.ones(4))

    world = lab.World(2, device="cpu")
    with pytest.raises(lab.RankError, match=r"rank 1: .*outside coll") as info:
        world.run(sleep_in_one, WAITS[name], timeout_s=0.6)
    doing = DOING[transport_name].get(name, name)
    assert info.value.others == {0: f"waited in {doing}"}


@pytest.mark.parametrize("by_messages", [False, True], ids=["", "messages"])
def test_who_waits_in_a_backward_pass_is_not_suspected(by_messages):
    def sleep_in_one():
        if by_messages:
            transport.use_messages(dist.group.WORLD)
        x = torch.ones(4, requires_grad=True)
        y = lab.all_gather(x).sum()
        if dist.get_rank() == 1:
            time.sleep(1000)
        y.backward()

    world = lab.World(2, device="cpu")
    with pytest.raises(lab.RankError, match=r"rank 1: .*outside coll") as info:
        world.run(sleep_in_one, timeout_s=0.6)
    what = "" if by_messages else " sum of 8 torch.float32"
    assert info.value.others == {0: f"waited in reduce_scatter{what}"}


@pytest.mark.parametrize("by_messages", [False, True], ids=["", "messages"])
@pytest.mark.parametrize("collective", [lab.all_gather, lab.reduce_scatter])
def test_who_is_a_collective_behind_is_suspected(collective, by_messages):
    def wait():
        if by_messages:
            transport.use_messages(dist.group.WORLD)
        x = torch.ones(4)
        collective(x)
        if dist.get_rank() == 3:
            lab.recv(x, 0, tag=1)
        collective(x)

    world = lab.World(4, device="cpu")
    with pytest.raises(lab.RankError, match=r"rank 3: .*fewest coll.* in recv"):
        world.run(wait, timeout_s=0.6)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("calls", ["all_gather broadcast", "broadcast all_reduce"])
def test_shared_memory_that_meets_gloo_is_a_mismatch_by_name(calls, number):
    usual, odd = calls.split()

    def differ():
        for _ in range(number - 1):
            lab.barrier()
        getattr(lab, odd if dist.get_rank() == 2 else usual)(torch.ones(4))

    world = lab.World(4, device="cpu")
    with pytest.raises(lab.RankError, match=f"rank 2: .*called {odd}") as info:
        world.run(differ, timeout_s=0.6)
    for rank in range(4):
        name = odd if rank == 2 else usual
        assert f"{name} (number {number} on axis world) on rank {rank}" in str(
            info.value
        )
