"""Modules that run forward more often than the model says leave no trace."""

import torch
from torch import Tensor, nn

from labpkg.processes.trials import random_state, undisturbed

CPU = torch.device("cpu")


class Moving(nn.Module):
    """Changes buffers in all ways, and draws random numbers."""

    in_place: Tensor
    assigned: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("in_place", torch.zeros(2))
        self.register_buffer("assigned", torch.zeros(2))
        self.register_buffer("none", None)

    def forward(self, x):
        self.in_place += 1
        self.assigned = self.assigned + 1
        self.none = x
        return x + torch.rand(2)


def test_buffers_and_random_numbers_come_back():
    model = nn.Sequential(Moving())
    buffers = list(model.buffers())
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    with undisturbed([model], CPU):
        model(torch.ones(2))
    assert torch.equal(torch.rand(2), expected)
    assert [id(b) for b in model.buffers()] == [id(b) for b in buffers]
    assert not any(b.any() for b in buffers)


def test_random_numbers_are_drawn_again_and_then_go_on():
    state = random_state(CPU)
    first, expected = torch.rand(2), torch.rand(2)
    torch.set_rng_state(state.states[0])
    torch.rand(2)
    with state.again():
        assert torch.equal(torch.rand(2), first)
    assert torch.equal(torch.rand(2), expected)
