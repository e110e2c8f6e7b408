"""Backward in two halves gives what backward gives, in two halves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from labpkg.processes.halves import DeferWeights, enter, finish_weights


class Net(nn.Module):
    """Linear layers of every kind, and others."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.no_bias = nn.Linear(6, 6, bias=False)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.frozen_bias = nn.Linear(6, 6)
        self.frozen_bias.bias.requires_grad_(False)
        self.norm = nn.LayerNorm(6)
        self.scaled = nn.Linear(6, 6)

    def forward(self, x):
        x = torch.tanh(self.no_bias(self.first(x)))
        x = self.norm(self.frozen_bias(self.frozen(x)))
        x = F.linear(x, self.scaled.weight * 2, bias=self.scaled.bias)  # no leaf
        return F.linear(bias=None, weight=self.no_bias.weight, input=x)  # once more


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


LATE = {"first.weight", "first.bias", "no_bias.weight", "frozen_bias.weight"}


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_halves_are_the_whole(shape):
    torch.manual_seed(0)
    model = Net().double()
    whole, x = copy.deepcopy(model), torch.randn(shape, dtype=torch.float64)
    fired = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            hook = lambda p, name=name: fired.append((name, p.grad is not None))
            p.register_post_accumulate_grad_hook(hook)
    for _ in range(2):
        inputs = x.clone().requires_grad_()
        (whole(inputs) ** 2).sum().backward()
        products, dx = [], []
        with DeferWeights(products) as defer:
            y = model(enter(x, dx, torch.zeros((), requires_grad=True)))
        fired.clear()
        (y**2).sum().backward()
        early = {name for name, _ in fired}
        assert torch.allclose(dx[0], inputs.grad, rtol=1e-12)
        assert defer.num_layers == len(products) == 4
        finish_weights(products)
        assert not products
        assert sorted(fired) == sorted((name, True) for name in gradients(whole))
        assert {name for name, _ in fired} - early == LATE
    for name, gradient in gradients(whole).items():
        assert torch.allclose(gradients(model)[name], gradient, rtol=1e-12), name


def test_a_raw_input_and_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    whole, x, products = copy.deepcopy(model), torch.randn(3, 4), []
    with torch.autocast("cpu", torch.bfloat16):
        with DeferWeights(products):
            y = model(x)
        z = whole(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, z)
    y.float().sum().backward()
    assert not gradients(model)
    finish_weights(products)
    z.float().sum().backward()
    for name, gradient in gradients(whole).items():
        assert gradients(model)[name].dtype == torch.float32
        assert torch.allclose(gradients(model)[name], gradient, atol=1e-2), name


def test_nothing_is_put_off_without_gradients():
    products, model = [], nn.Linear(4, 4)
    with DeferWeights(products) as defer, torch.no_grad():
        model(torch.ones(4))
    assert defer.num_layers == 0
    finish_weights(products)
    assert model.weight.grad is None


def test_what_enters_may_be_changed_in_place():
    dx, x = [], torch.tensor([-1.0, 2.0])
    y = enter(x, dx, torch.zeros((), requires_grad=True)).relu_()
    y.sum().backward()
    assert dx[0].tolist() == [0, 1]


def test_autocast_leaves_double_precision_as_it_is():
    model, products = nn.Linear(4, 4).double(), []
    with torch.autocast("cpu", torch.bfloat16), DeferWeights(products):
        y = model(torch.ones(2, 4, dtype=torch.float64))
    y.sum().backward()
    assert len(products) == 1
    assert y.dtype == torch.float64


def test_layers_that_run_again_in_backward():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    whole, x, products = copy.deepcopy(model), torch.randn(3, 4).double(), []
    with DeferWeights(products):
        y = checkpoint(model, x, use_reentrant=False)
        assert isinstance(y, torch.Tensor)
        torch.autograd.backward(get_gradient_edge(y), torch.ones(3, 4).double())
    assert not gradients(model)
    finish_weights(products)
    whole(x).sum().backward()
    for name, gradient in gradients(whole).items():
        assert torch.allclose(gradients(model)[name], gradient, rtol=1e-12), name


def test_a_layer_inside_vmap_stays_as_it_is():
    products, model, x = [], nn.Linear(4, 4), torch.randn(3, 4)
    with DeferWeights(products) as defer:
        y = torch.vmap(model)(x)
    y.sum().backward()
    assert defer.num_layers == 0
    assert torch.allclose(model.weight.grad, x.sum(0).expand(4, 4))
