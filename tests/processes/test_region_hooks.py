"""Hooks at the border of a region, each on a module of its own."""

import pytest
import torch
from torch import nn

import labpkg as lab
from labpkg.processes.region_hooks import Region, SumGradients
from labpkg.processes.regions import f, f_sequence


class Caller(nn.Module):
    """Calls what it is given."""

    def forward(self, call):
        return call()


def test_a_region_shares_an_entry_for_one_forward(world2):
    def run():
        mesh = lab.make_mesh(tp=2)["tp"]
        region, module = Region(mesh), Caller()
        region.around(module)
        x = torch.ones(1, 2, 3)

        def share():
            first = region.entered(x, f)
            assert first is not None
            assert region.entered(x, f) is first
            assert region.entered(x, f_sequence) is not first
            with torch.no_grad():
                assert region.entered(x, f) is not first
            assert region.entered(x.clone(), f) is not first
            for number in range(100):  # tensors that live no longer than a call
                entered = region.entered(torch.tensor([number]), f)
                assert entered is not None
                assert entered.item() == number
            return first

        first, second = module(share), module(share)
        assert first is not second
        assert region.entered(x, f) is None
        with pytest.raises(ZeroDivisionError):
            module(lambda: 1 / 0)
        assert region.entered(x, f) is None

        def nest():
            outer = region.entered(x, f)
            assert module(share) is not outer
            assert region.entered(x, f) is outer

        module(nest)

    world2.run(run)


class Add(nn.Module):
    """Its parameter and its input get one gradient, in one tensor."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2, 3))

    def forward(self, x):
        return self.shift + x


def test_only_the_gradient_of_the_parameter_is_summed(world2):
    def run():
        mesh = lab.make_mesh(tp=2)["tp"]
        module, own = Add(), torch.full((2, 3), 1.0 + mesh.get_local_rank())
        SumGradients(mesh, ["shift"]).around(module)
        x = torch.zeros(2, 3, requires_grad=True)
        for number in (1, 2):  # accumulated
            (module(x) * own).sum().backward()
            assert x.grad is not None
            assert module.shift.grad is not None
            assert torch.equal(x.grad, number * own)
            assert torch.equal(module.shift.grad, torch.full((2, 3), 3.0 * number))

    world2.run(run)
