"""Collectives in place: the values of the functional ones, in the caller's memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import labpkg as lab
from labpkg.processes import collectives, transport
from labpkg.processes.in_place import (
    all_gather_,
    all_reduce_,
    broadcast_,
    exchange_,
    irecv,
    isend,
    reduce_scatter_,
    slice_bounds,
)
from labpkg.processes.traffic import always_on


def slices(num_elements: int, messages: bool, deterministic: bool) -> dict:
    mesh = lab.make_mesh(dp=torch.distributed.get_world_size())["dp"]
    if messages:
        transport.use_messages(mesh.get_group())
    n, rank = mesh.size(), mesh.get_local_rank()
    x = torch.randn(num_elements, generator=torch.Generator().manual_seed(rank))
    want = lab.all_reduce(x, mesh, op="mean")
    own = slice(*slice_bounds(num_elements, n, rank))
    aliased, separate = x.clone(), torch.empty(own.stop - own.start)
    kwargs = {"op": "mean", "deterministic": deterministic}
    with lab.count_comms() as log:
        works = [
            reduce_scatter_(separate, x, mesh, **kwargs),
            reduce_scatter_(aliased[own], aliased, mesh, **kwargs),
        ]
        for work in works:
            work.wait()
    assert log["dp", "reduce_scatter"].payload_bytes == 2 * x.nbytes
    whole = torch.empty(num_elements)
    with lab.count_comms() as log:
        works = [
            all_gather_(whole, separate, mesh),
            all_gather_(aliased, aliased[own], mesh),
        ]
        for work in works:
            work.wait()
    assert log["dp", "all_gather"].payload_bytes == 2 * x.nbytes
    return {"want": want, "part": separate, "whole": whole, "aliased": aliased}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("messages", [False, True])
@pytest.mark.parametrize("num_elements", [0, 3, 4, 12_000, 12_003])
def test_slices_equal_the_functional_ones(
    world4, num_elements, messages, deterministic
):
    ranks = world4.run(slices, num_elements, messages, deterministic)
    whole = torch.cat([r["part"] for r in ranks])
    for r in ranks:
        assert torch.allclose(whole, r["want"], atol=1e-6)
        assert torch.equal(r["whole"], whole)
        assert torch.equal(r["aliased"], whole)


def in_torchs_own(num_elements: int) -> tuple:
    rank, n = torch.distributed.get_rank(), torch.distributed.get_world_size()
    every = [torch.arange(num_elements) + float(q) for q in range(n)]
    own = slice(*slice_bounds(num_elements, n, rank))
    x, kept = every[rank], every[rank].clone()
    reduce_scatter_(x[own], x, op="max").wait()
    all_gather_(kept, x[own]).wait()
    return kept, every[-1]


@pytest.mark.parametrize("num_elements", [2, 1003])
def test_collectives_of_torch_take_slices_that_are_padded(num_elements):
    with lab.World(3, device="cpu", check=True) as world:
        for found, want in world.run(in_torchs_own, num_elements):
            assert torch.equal(found, want)


def bytes_in_flight(messages: bool) -> int:
    mesh = lab.make_mesh(dp=4)["dp"]
    if messages:
        transport.use_messages(mesh.get_group())
    first = torch.ones(1)  # kept: gloo's thread lets go of it at any moment
    all_reduce_(first, mesh).wait()  # opens the channel
    whole = torch.ones(10_003)
    own = whole[slice(*slice_bounds(len(whole), 4, mesh.get_local_rank()))]
    before = lab.live_tensor_bytes()
    work = all_gather_(whole, own, mesh)
    taken = lab.live_tensor_bytes() - before
    work.wait()
    return taken


@pytest.mark.parametrize("messages", [False, True])
def test_slices_on_the_cpu_need_no_other_memory(world4, messages):
    assert world4.run(bytes_in_flight, messages) == [0] * 4


def switched_off():
    mesh = lab.make_mesh(dp=2)["dp"]
    rank = mesh.get_local_rank()
    x, part, whole = torch.arange(4.0) + rank, torch.empty(2), torch.empty(4)
    odd = torch.arange(3.0) + rank
    with collectives.off():
        reduce_scatter_(part, x, mesh).wait()
        all_gather_(whole, part, mesh).wait()
        all_gather_(x, x[:2], mesh).wait()
        broadcast_(part, mesh).wait()
        all_gather_(odd, odd[:2] if rank == 0 else odd[2:], mesh).wait()
    return part, whole, x, odd


def test_switched_off_they_answer_from_local_data(world2):
    for rank, (part, whole, x, odd) in enumerate(world2.run(switched_off)):
        assert part.tolist() == [3.0 * rank, 3.0 * rank + 1]
        assert whole.tolist() == [*part.tolist()] * 2
        assert x.tolist() == [rank, rank + 1.0] * 2
        assert odd.tolist() == [[0.0, 1.0, 0.0], [3.0, 0.0, 3.0]][rank]


@given(st.integers(0, 50), st.integers(1, 9))
def test_slices_are_those_of_tensor_split(num_elements, n):
    cuts = torch.arange(num_elements).tensor_split(n)
    for rank, part in enumerate(cuts):
        assert [*range(*slice_bounds(num_elements, n, rank))] == part.tolist()


def messages() -> dict:
    """Send a number to the next rank and a tag to the one before, in three ways."""
    mesh = lab.make_mesh(dp=4)["dp"]
    rank = mesh.get_local_rank()
    after, before = (rank + 1) % 4, (rank - 1) % 4
    found = {}

    def buffers() -> list[torch.Tensor]:
        return [torch.full((3,), -1.0), torch.full((2,), -1.0)]

    own, tag = torch.full((3,), float(rank)), torch.full((2,), 10.0 * rank)
    outs = buffers()
    with lab.count_comms() as log:
        works = [
            irecv(outs[0], before, mesh, tag=1),
            irecv(outs[1], after, mesh, tag=2),
            isend(tag, before, mesh, tag=2),
            isend(own, after, mesh, tag=1),
        ]
        for work in works:
            work.wait()
    found["one by one"] = outs, log["dp", "send"]
    outs = buffers()
    outgoing = [(own, after, 1), (tag, before, 2)]
    with lab.count_comms() as log:
        exchange_(outgoing, [(outs[0], before, 1), (outs[1], after, 2)], mesh).wait()
    found["exchange"] = outs, log["dp", "send"]
    outs = buffers()
    with collectives.off():
        irecv(outs[0], before, mesh).wait()
        exchange_(outgoing, [(outs[1], after, 2)], mesh).wait()
        with always_on():
            found["always on"] = lab.all_reduce(torch.ones(1), mesh).item()
        assert lab.all_reduce(torch.ones(1), mesh).item() == 1
    found["off"] = outs
    with pytest.raises(ValueError, match="not contiguous"):
        isend(torch.ones(3, 2).t(), after, mesh)
    return found


def test_messages(world4):
    for rank, found in enumerate(world4.run(messages)):
        before, after = float((rank - 1) % 4), float((rank + 1) % 4)
        for way, num_calls in (("one by one", 2), ("exchange", 1)):
            (first, second), count = found[way]
            assert first.tolist() == [before] * 3
            assert second.tolist() == [10 * after] * 2
            assert (count.calls, count.payload_bytes) == (num_calls, 20)
            assert count.wire_bytes == 20
        assert not any(out.any() for out in found["off"])
        assert found["always on"] == 4
