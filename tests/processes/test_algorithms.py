"""All-reduce from messages: equal, counted, differentiable, for any number of ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import labpkg as lab
from labpkg.processes import collectives

ALGORITHMS = {
    "ring": lab.ring_all_reduce,
    "tree": lab.tree_all_reduce,
    "recursive doubling": lab.recursive_doubling_all_reduce,
}


@pytest.fixture(scope="module")
def world5():
    with lab.World(5, device="cpu") as world:
        yield world


def ranks(request, size):
    return request.getfixturevalue(f"world{size}")


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("size", [2, 4, 5])
def test_the_sum_is_that_of_the_library(request, size, name):
    reduce = ALGORITHMS[name]

    def compare():
        rank = dist.get_rank()
        for shape in [(12,), (1,), (3, 7), ()]:
            g = torch.Generator("cpu").manual_seed(rank)
            x = torch.randn(shape, dtype=torch.float64, generator=g, device="cpu")
            before = x.clone()
            y = reduce(x)
            torch.testing.assert_close(y, lab.all_reduce(x), rtol=1e-13, atol=1e-13)
            assert torch.equal(x, before)
            every = lab.all_gather(y.reshape(1, -1))
            assert all(torch.equal(row, every[0]) for row in every)
        with collectives.off():
            assert size == 1 or not torch.allclose(reduce(x), lab.all_reduce(x) + y)

    ranks(request, size).run(compare)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_gradient_is_the_sum_of_all_gradients(world4, name):
    reduce = ALGORITHMS[name]

    def differentiate():
        weight = dist.get_rank() + 1.0
        x = torch.ones(3, dtype=torch.float64, device="cpu", requires_grad=True)
        (weight * reduce(x)).sum().backward()
        return x.grad.tolist()

    assert world4.run(differentiate) == [[10.0] * 3] * 4


def test_the_bytes_are_those_of_the_formulas(world4):
    def count():
        x = torch.zeros(1000, dtype=torch.float64, device="cpu")  # S = 8000
        found = {}
        for name, reduce in ALGORITHMS.items():
            with lab.count_comms() as log:
                reduce(x)
            found[name] = log["world"].wire_bytes / x.nbytes
        return found

    n = 4
    for rank, found in enumerate(world4.run(count)):
        assert found["ring"] == 2 * (n - 1) / n
        assert found["recursive doubling"] == 2  # log2 n
        assert found["tree"] == [2, 1, 2, 1][rank]  # up once, down to each child


def test_a_mesh_axis_is_a_ring_of_its_own(world4):
    def along():
        mesh = lab.make_mesh(dp=2, tp=2)
        x = torch.tensor([float(dist.get_rank())], device="cpu")
        return [reduce(x, mesh["dp"]).item() for reduce in ALGORITHMS.values()]

    assert world4.run(along) == [[2.0] * 3, [4.0] * 3, [2.0] * 3, [4.0] * 3]


def test_one_rank_has_nothing_to_send(world2):
    def alone():
        mesh = lab.make_mesh(tp=2)["dp"]
        x = torch.ones(5, device="cpu")
        with lab.count_comms() as log:
            same = [torch.equal(reduce(x, mesh), x) for reduce in ALGORITHMS.values()]
        return same, log["dp"].calls

    assert world2.run(alone) == [([True] * 3, 0)] * 2


def test_a_swap_does_not_deadlock_and_checks_its_ends(world2):
    def swap():
        rank = dist.get_rank()
        x = torch.full((70_000,), float(rank), device="cpu")
        other = lab.sendrecv(x, x, dst=1 - rank, src=1 - rank)
        with pytest.raises(ValueError, match="is this rank itself"):
            lab.sendrecv(x, x, dst=rank, src=1 - rank)
        with pytest.raises(ValueError, match=r"pass x\.detach"):
            lab.sendrecv(x.requires_grad_(), x, dst=1 - rank, src=1 - rank)
        return other.mean().item()

    assert world2.run(swap) == [1.0, 0.0]
