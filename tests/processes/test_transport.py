"""What the transport asks of a group: its backend for a device, and torch's checks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import labpkg as lab
from labpkg.planning.cost import wire_bytes
from labpkg.processes import transport

N = 4


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "checked"])
def world(request):
    with lab.World(N, device="cpu", check=request.param) as world:
        yield world


@pytest.mark.parametrize("backend", [None, "gloo", "cpu:gloo"])
def test_a_group_that_the_user_started_is_asked_for_each_device(
    world, backend, tmp_path
):
    def start(path):
        rank = dist.get_rank()
        dist.barrier()
        dist.destroy_process_group()
        store = dist.FileStore(path, N)
        dist.init_process_group(backend, store=store, rank=rank, world_size=N)
        x = torch.full((N,), float(rank), device="cpu")
        with lab.count_comms() as log:
            lab.broadcast(x)
        mean = lab.reduce_scatter(x, op="mean").item()
        lab.barrier()
        objects = lab.all_gather_object(rank)
        gloo = transport.uses_gloo(dist.group.WORLD, x.device)
        return gloo, log["world"].wire_bytes / x.nbytes, mean, objects

    every = world.run(start, str(tmp_path / "store"))
    # gloo sends along a binomial tree: rank 0 to 1, then 0 to 2 and 1 to 3.
    assert every == [(True, sent, 1.5, [0, 1, 2, 3]) for sent in (2, 1, 0, 0)]


REDUCED = {"sum": sum, "max": max, "min": min}
REDUCED |= {"mean": lambda v: sum(v) / N, "product": math.prod}


@pytest.mark.parametrize("by_messages", [False, True], ids=["", "messages"])
@pytest.mark.parametrize("op", transport.REDUCTIONS)
def test_every_transport_has_the_same_values_and_counts_its_own_bytes(
    world, op, by_messages
):
    def move():
        if by_messages:
            transport.use_messages(dist.group.WORLD)
        x = torch.arange(1.0, N + 1, device="cpu") + dist.get_rank()
        with lab.count_comms() as log:
            part, whole = lab.reduce_scatter(x, op=op), lab.all_gather(x)
        is_checked = dist.get_debug_level() == dist.DebugLevel.DETAIL
        return part.item(), whole.tolist(), is_checked, log

    rows = [[float(1 + i + rank) for i in range(N)] for rank in range(N)]
    for rank, (part, whole, is_checked, log) in enumerate(world.run(move)):
        assert part == REDUCED[op]([row[rank] for row in rows])
        assert whole == [x for row in rows for x in row]
        # gloo's own reduce-scatter is an all-reduce.
        sent = wire_bytes("all_reduce" if is_checked else "reduce_scatter", 4 * N, N)
        assert log["world", "reduce_scatter"].wire_bytes == sent
        gathered = wire_bytes("all_gather", 4 * N * N, N)
        assert log["world", "all_gather"].wire_bytes == gathered


def test_a_group_can_be_kept_from_shared_memory(world2):
    def apart():
        mesh = DeviceMesh.from_group(dist.new_group(), "cpu")
        transport.use_messages(mesh.get_group())
        x = torch.arange(1000.0, device="cpu")
        total, part = lab.all_reduce(x, mesh), lab.reduce_scatter(x, mesh)
        assert torch.equal(lab.all_gather(part, mesh), total)
        used = [channel is not None for channel in transport._channels.values()]
        lab.all_reduce(x)  # of all ranks: another group
        return total[1].item(), used, len(transport._channels)

    assert world2.run(apart) == [(2.0, [False], 2)] * 2
