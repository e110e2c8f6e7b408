"""Operators of a region: each against one process, forward and backward."""

import pytest
import torch

import labpkg as lab
from labpkg.processes import collectives, regions

n = 4


def gradient(operator, x, weight):
    """Return what an operator makes of x, and of the gradient `weight`."""
    x = x.clone().requires_grad_(True)
    y = operator(x)
    y.backward(weight)
    return y.detach(), x.grad


def draw(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def test_every_operator_and_its_conjugate(world4):
    def run(is_off=False):
        mesh = lab.make_mesh(tp=n)["tp"]
        rank = mesh.get_local_rank()
        terms, whole = draw(n, 2, 8, 3), draw(2, 8, 3)  # of all ranks; (B, T, D)
        term, positions = terms[rank], whole.chunk(n, 1)[rank]
        features = draw(2, 3, 8)
        own = features.chunk(n, -1)[rank]
        total = terms.sum(0)
        on = lambda operator: lambda x: operator(x, mesh)
        cases = {
            "f": (on(regions.f), whole, term, whole, total),
            "g": (on(regions.g), term, whole, total, whole),
            "f_sequence": (
                *(on(regions.f_sequence), positions, term),
                *(whole, total.chunk(n, 1)[rank]),
            ),
            "g_sequence": (
                *(on(regions.g_sequence), term, positions),
                *(total.chunk(n, 1)[rank], whole),
            ),
            "join": (on(regions.join), own, features, features, own),
            "split": (on(regions.split), features, own, own, features),
            "join_sequence": (
                *(on(regions.join_sequence), positions, whole),
                *(whole, positions),
            ),
            "split_sequence": (
                *(on(regions.split_sequence), whole, positions),
                *(positions, whole),
            ),
        }
        found = {}
        for name, (operator, x, weight, y, dx) in cases.items():
            if is_off:
                with collectives.off():
                    mine = gradient(operator, x, weight)
            else:
                mine = gradient(operator, x, weight)
            pairs = zip(mine, (y, dx), strict=True)
            found[name] = max((a - b).abs().max().item() for a, b in pairs)
        return found

    for deviations in world4.run(run):
        assert max(deviations.values()) < 1e-12
    for deviations in world4.run(run, is_off=True):
        assert min(deviations.values()) > 1e-3


def test_results_are_free_to_change(world2):
    def run():
        mesh = lab.make_mesh(tp=2)["tp"]
        names = "g f_sequence g_sequence join split join_sequence split_sequence"
        for name in names.split():
            for shape in ((1, 2, 2), (1, 1, 2), (3, 2, 2)):
                if shape[1] == 1 and name in ("g_sequence", "split_sequence"):
                    continue  # one position for two ranks
                x = torch.ones(shape, requires_grad=True)
                y = getattr(regions, name)(x, mesh)
                value = y.detach().clone()
                y.mul_(2).sum().backward()
                assert torch.equal(y, 2 * value), name
                assert torch.equal(x, torch.ones(shape)), name
                assert x.grad is not None

    world2.run(run)


def test_bad_shapes_raise_before_communication(world2):
    def run():
        mesh = lab.make_mesh(tp=2)["tp"]
        calls = {
            "dim -1 of (2, 3) is not divisible by the 2": (regions.split, (2, 3)),
            "T=3 is not divisible by tp=2": (regions.g_sequence, (2, 3, 4)),
            "T=5 is not divisible by tp=2": (regions.split_sequence, (2, 5, 4)),
            "got (2, 4)": (regions.f_sequence, (2, 4)),
            "got (2, 2)": (regions.join_sequence, (2, 2)),
        }
        with lab.count_comms() as log:
            for message, (operator, shape) in calls.items():
                with pytest.raises(ValueError) as error:
                    operator(torch.ones(shape), mesh)
                assert message in str(error.value)
        assert log["tp"].calls == 0

    world2.run(run)
