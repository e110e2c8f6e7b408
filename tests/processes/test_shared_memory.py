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

import labpkg as lab
from labpkg.processes import shared_memory, transport

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="shared memory is for Linux hosts"
)
SIZES = (517, 1000, 1001, 2_000_003)  # the last ones travel in parts
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
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
                assert torch.equal(own, expected[:even].view(size, -1)[rank])
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


def test_small_and_single_rank_collectives_need_no_channel(world2):
    def small():
        mesh = lab.make_mesh(dp=1, tp=2)
        lab.all_reduce(torch.ones(8, device="cpu"), mesh["tp"])
        lab.all_reduce(torch.ones(5000, device="cpu"), mesh["dp"])
        return len(transport._channels)

    assert world2.run(small) == [0, 0]


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

    start = time.monotonic()
    with pytest.raises(lab.RankError, match="called different collectives: all_") as it:
        world2.run(differ)
    assert time.monotonic() - start < 2
    assert "all_reduce sum of 5000 torch.float32 on rank 0" in str(it.value)
    assert "all_gather of 10000 torch.float32 on rank 1" in str(it.value)


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
            lab.barrier()
        else:
            child = os.fork()  # as a worker of a DataLoader
            if child == 0:
                time.sleep(8)
                os._exit(0)
            channels()[0].tasks.put(None)
            lab.barrier()
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    world2.run(leave)


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
        assert second == "an earlier collective failed"


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
