"""Shared memory between ranks: exact, ordered, told apart, and gone afterwards."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import labpkg as lab
from labpkg.processes import shared_memory, transport

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="shared memory is for Linux hosts"
)
SIZES = (0, 1, 3, 517, 1000, 1001, 1_200_003)  # the last ones travel in parts
REDUCED = {
    "sum": torch.add,
    "mean": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
}


def channels():
    return [c for c in transport._channels.values() if c is not None]


def versions(numel, dtype, size):
    """Return what each rank contributes."""
    generators = [torch.Generator("cpu").manual_seed(rank) for rank in range(size)]
    return [
        (3 * torch.randn(numel, generator=g, device="cpu")).to(dtype)
        for g in generators
    ]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int16]
)
@pytest.mark.parametrize("size", [2, 4])
def test_every_result_is_bitwise_that_of_a_sequential_reduction(request, size, dtype):
    world = request.getfixturevalue(f"world{size}")

    def compare():
        rank = dist.get_rank()
        for numel in SIZES:
            every = versions(numel, dtype, size)
            even = numel // size * size
            for op, combine in REDUCED.items():
                if op == "mean" and not dtype.is_floating_point:
                    continue
                expected = every[0]
                for version in every[1:]:
                    expected = combine(expected, version)
                if op == "mean":
                    expected = expected / size
                assert torch.equal(lab.all_reduce(every[rank], op=op), expected)
                own = lab.reduce_scatter(every[rank][:even], op=op)
                assert torch.equal(own, expected[:even].tensor_split(size)[rank])
            assert torch.equal(lab.all_gather(every[rank]), torch.cat(every))
        assert len(channels()) == 1

    world.run(compare)


def test_transfers_in_flight_end_in_the_order_of_their_calls(world2):
    def overlap():
        from labpkg.processes.in_place import all_reduce_

        xs = [torch.full((n,), float(n), device="cpu") for n in (300_000, 400, 70_000)]
        for work in reversed([all_reduce_(x) for x in xs]):
            work.wait()
        return [bool((x == 2 * len(x)).all()) for x in xs]

    assert world2.run(overlap) == [[True] * 3] * 2


def test_tensors_of_inference_mode_can_be_reduced(world2):
    def infer():
        with torch.inference_mode():
            return lab.all_reduce(torch.ones(1000, device="cpu")).sum().item()

    assert world2.run(infer) == [2000.0] * 2


def test_a_single_rank_needs_no_channel(world2):
    def reduce():
        mesh = lab.make_mesh(dp=1, tp=2)
        lab.all_reduce(torch.ones(5000, device="cpu"), mesh["dp"])
        alone = len(transport._channels)
        lab.all_reduce(torch.ones(1, device="cpu"), mesh["tp"])
        return alone, len(transport._channels), len(channels())

    assert world2.run(reduce) == [(0, 1, 1)] * 2


WHOLE = (torch.uint8, torch.int8, torch.int32, torch.int64)
REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SERVED = dict.fromkeys(
    (torch.bool, *WHOLE), tuple(op for op in REDUCED if op != "mean")
)
SERVED |= dict.fromkeys(REAL, tuple(REDUCED))
SERVED |= dict.fromkeys((torch.complex64, torch.complex128), ("sum", "mean"))


@pytest.mark.parametrize("size", [2, 4])
def test_every_dtype_is_reduced_as_by_gloo(request, size):
    world = request.getfixturevalue(f"world{size}")

    def compare():
        group = dist.new_group()
        transport.use_messages(group)
        apart = DeviceMesh.from_group(group, "cpu")
        generator = torch.Generator("cpu").manual_seed(dist.get_rank())
        for dtype, ops in SERVED.items():
            top = 100 if dtype in WHOLE else 4  # sums overflow; floats stay exact
            for shape in ((size,), (2 * size, 50)):
                x = torch.randint(top, shape, generator=generator, device="cpu")
                x = (x % 2 == 1) if dtype is torch.bool else x.to(dtype)
                for op in ops:
                    for collective in (lab.all_reduce, lab.reduce_scatter):
                        ours, theirs = collective(x, op=op), collective(x, apart, op=op)
                        assert ours.dtype == theirs.dtype == dtype
                        assert ours.tolist() == theirs.tolist(), (dtype, op)
                assert torch.equal(lab.all_gather(x), lab.all_gather(x, apart))
        return [channel is None for channel in transport._channels.values()]

    assert world.run(compare) == [[True, False]] * size


def test_what_torch_cannot_add_is_refused_before_anything_is_sent(world2):
    def refuse():
        x = torch.ones(3, dtype=torch.float8_e4m3fn, device="cpu")
        for collective in (lab.all_reduce, lab.reduce_scatter):
            with pytest.raises(ValueError, match="float8_e4m3fn is not offered"):
                collective(x[:2])
        whole = lab.all_gather(x)  # nothing is broken
        return whole.dtype, lab.all_gather_object(dist.get_rank())

    assert world2.run(refuse) == [(torch.float8_e4m3fn, [0, 1])] * 2


@pytest.mark.parametrize("why", ["another host", "no memory"])
def test_without_shared_memory_all_ranks_take_messages(world4, why):
    def elsewhere():
        rank, make = dist.get_rank(), shared_memory._Offer.make

        def changed(*args):
            offer = make(*args)
            if rank != 2:
                return offer
            if why == "no memory":
                offer.withdraw()
                return None
            offer.host = "another"
            return offer

        shared_memory._Offer.make = changed
        num_files = len(os.listdir("/proc/self/fd"))
        lab.all_reduce(torch.ones(1000, device="cpu"))
        assert len(os.listdir("/proc/self/fd")) == num_files  # nothing stays open
        x = torch.arange(1000.0, device="cpu") * (rank + 1)
        total, part = lab.all_reduce(x), lab.reduce_scatter(x)
        assert torch.equal(lab.all_gather(part), total)
        return len(transport._channels), len(channels()), total[1].item()

    assert world4.run(elsewhere) == [(1, 0, 10.0)] * 4


def test_different_collectives_are_named_on_the_spot(world2):
    def differ():
        x = torch.ones(5000, device="cpu")
        return lab.all_gather(x) if dist.get_rank() else lab.all_reduce(x)

    world2.run(dist.get_rank)  # the limit below holds for a warm fork server
    start = time.monotonic()
    with pytest.raises(lab.RankError, match="called different collectives: all_") as it:
        world2.run(differ)
    assert time.monotonic() - start < 2
    assert "all_reduce sum of 5000 torch.float32 on rank 0" in str(it.value)
    assert "all_gather of 10000 torch.float32 on rank 1" in str(it.value)


@pytest.mark.parametrize("small", [0, 1, 255])
def test_a_small_call_that_meets_a_large_one_is_named_on_the_spot(world4, small):
    def differ():
        numel = small if dist.get_rank() == 2 else 5000
        lab.all_reduce(torch.ones(numel, device="cpu"))

    world4.run(dist.get_rank)  # the limit below holds for a warm fork server
    start = time.monotonic()
    with pytest.raises(lab.RankError, match=r"rank 2: .*different collectives") as it:
        world4.run(differ)
    assert time.monotonic() - start < 2
    assert it.value.rank == 2
    assert f"all_reduce sum of {small} torch.float32 on rank 2" in str(it.value)
    assert "all_reduce sum of 5000 torch.float32 on rank 3" in str(it.value)


@pytest.mark.parametrize("by_messages", [False, True], ids=["", "messages"])
def test_empty_tensors_are_collected_and_carry_empty_gradients(world4, by_messages):
    def collect():
        if by_messages:
            transport.use_messages(dist.group.WORLD)
        shapes = set()
        for dtype in (torch.float32, torch.int64, torch.bool):
            x = torch.empty(0, 3, dtype=dtype, device="cpu")
            for ordered in (False, True):
                shapes.add(lab.all_reduce(x, deterministic=ordered).shape)
                shapes.add(lab.reduce_scatter(x, deterministic=ordered).shape)
            shapes.add(lab.reduce_scatter(x, op="max").shape)
            shapes.add(lab.all_gather(x).shape)
        x = torch.empty(0, 3, device="cpu", requires_grad=True)
        (lab.all_gather(x).sum() + lab.reduce_scatter(x).sum()).backward()
        lab.barrier()
        return shapes, x.grad.shape, len(channels())

    empty = torch.Size([0, 3])
    assert world4.run(collect) == [({empty}, empty, int(not by_messages))] * 4


def test_a_killed_peer_is_noticed_at_once_and_blamed(world2):
    def die():
        x = torch.ones(5000, device="cpu")
        lab.all_reduce(x)
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        lab.all_reduce(x)

    start = time.monotonic()
    with pytest.raises(lab.RankError, match="rank 1: killed by SIGKILL"):
        world2.run(die)
    assert time.monotonic() - start < 2


def test_a_peer_that_left_with_unread_words_is_still_heard():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    buffers = [torch.zeros(2**22, dtype=torch.uint8, device="cpu") for _ in range(2)]
    channel = shared_memory.Channel(0, {1: ours}, buffers)
    theirs.send(b"all_gather of 7 torch.bool")
    ours.send(b"never read")
    theirs.close()  # hence sending to it is an error, "Connection reset by peer"
    with pytest.raises(shared_memory.MismatchError, match="all_gather of 7"):
        channel.all_reduce(torch.ones(5000, device="cpu"), "sum").wait()
    channel.tasks.put(None)
    channel._thread.join(5)


def test_a_child_of_a_rank_does_not_keep_its_peers_waiting(world2):
    def leave():
        x = torch.ones(5000, device="cpu")
        lab.all_reduce(x)
        if dist.get_rank() == 0:
            start = time.monotonic()
            with pytest.raises(RuntimeError, match="rank 1 has left"):
                lab.all_reduce(x)
            assert time.monotonic() - start < 4
            dist.barrier()
        else:
            child = os.fork()  # as a worker of a DataLoader
            if child == 0:
                time.sleep(8)
                os._exit(0)
            channels()[0].tasks.put(None)
            dist.barrier()
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    world2.run(leave)


class Pids(torch.utils.data.Dataset):
    """Read by workers, which are forks of a rank: what do they hear from a barrier?"""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        with pytest.raises(RuntimeError, match="no rank itself; call it in the rank"):
            lab.barrier()
        return os.getpid()


def test_control_traffic_goes_on_beside_the_workers_of_a_loader(world4):
    def load():
        mesh, rank = lab.make_mesh(dp=2, tp=2), dist.get_rank()
        lab.barrier()
        options = {"num_workers": 2, "multiprocessing_context": "fork"}
        pids, pairs = set(), []
        for pid in torch.utils.data.DataLoader(Pids(), batch_size=1, **options):
            pids.add(int(pid))
            lab.barrier(mesh["dp"])
            pairs.append(lab.all_gather_object(rank, mesh["tp"]))
            weight = lab.mean_weight(1 + rank % 2, mesh["tp"])
            assert weight == (1 + rank % 2) * 2 / 3
        lab.barrier()
        assert len(pids - {os.getpid()}) == 2
        assert len(channels()) == 3
        return pairs

    pairs = world4.run(load)
    assert pairs == [[[0, 1]] * 4, [[0, 1]] * 4, [[2, 3]] * 4, [[2, 3]] * 4]


def test_a_broken_channel_refuses_what_comes_later(world2):
    def go_on():
        rank, x = dist.get_rank(), torch.ones(5000 + dist.get_rank(), device="cpu")
        errors = []
        for _ in range(2):
            try:
                lab.all_reduce(x)
            except RuntimeError as error:
                errors.append(str(error))
        return rank, errors

    for _, (first, second) in world2.run(go_on):
        assert "different collectives" in first
        assert second == first  # the reason, not that there is one


def test_a_peer_that_does_not_come_ends_the_wait(world2):
    def wait():
        lab.all_reduce(torch.ones(5000, device="cpu"))
        for peer in channels()[0]._peers.values():
            peer.settimeout(0.2)
        if dist.get_rank() == 0:
            with pytest.raises(RuntimeError, match=r"rank 1 did not join .* 0\.2 s"):
                lab.all_reduce(torch.ones(5000, device="cpu"))
        else:
            time.sleep(0.5)

    world2.run(wait)


def test_a_forgotten_group_takes_its_thread_and_memory_along(world2):
    def forget():
        import threading

        def held():
            files = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
            names = [os.readlink(file) for file in files if os.path.exists(file)]
            threads = [t for t in threading.enumerate() if "_work" in t.name]
            return sum("labpkg-shared" in n for n in names), len(threads)

        group = dist.new_group()
        transport.all_reduce(torch.ones(5000, device="cpu"), group, "sum").work.wait()
        thread = channels()[0]._thread
        before = held()
        dist.destroy_process_group(group)
        del group
        gc.collect()
        thread.join(5)
        return before, held()

    assert world2.run(forget) == [((2, 1), (0, 0))] * 2
