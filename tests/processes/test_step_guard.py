"""Optimizers of slices: which are refused, when, and what the others pay."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import labpkg as lab
from labpkg.processes.flat import mark_shard
from labpkg.processes.step_guard import guard_steps


def make_slices(*lengths):
    guard_steps()
    slices = [nn.Parameter(torch.ones(length)) for length in lengths]
    for p in slices:
        p.grad = torch.full_like(p, 3.0)
        mark_shard(p, SimpleNamespace(local=p))
    return slices


class Scaled(lab.SGD):
    """Divides each gradient by its norm, as LARS does, where its group says so."""

    def __init__(self, params, by_norm=False, **options):
        super().__init__(params, **options)
        self.defaults["by_norm"] = by_norm
        for group in self.param_groups:
            group.setdefault("by_norm", by_norm)

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad /= p.grad.norm() if group["by_norm"] else 1
        return super().step(closure)


class Wrapper(torch.optim.Optimizer):
    """Steps another optimizer, which it needs to be made."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step()


def warming_up(slices):
    optimizer = torch.optim.Adafactor(slices, lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 * step)
    assert optimizer.param_groups[0]["lr"] == 0  # this step would change nothing
    return optimizer


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (torch.optim.Adafactor, "Adafactor cannot .* one element depends on others"),
        (torch.optim.LBFGS, "LBFGS cannot update slices"),
        (warming_up, "Adafactor cannot"),
        (lambda s: Scaled(s, lr=0.1, by_norm=True), "choose an elementwise optimizer"),
        (
            lambda s: Scaled(
                [{"params": s[:1]}, {"params": s[1:], "by_norm": True}], lr=0.1
            ),
            "Scaled cannot",
        ),
        (lambda s: Wrapper(torch.optim.Adafactor(s)), "Adafactor cannot"),
    ],
)
def test_optimizers_of_whole_parameters_are_refused(make, match):
    slices = make_slices(5, 0, 3)
    optimizer = make(slices)
    for _ in range(2):
        with pytest.raises(ValueError, match=match):
            optimizer.step(lambda: 0.0)
    assert all((p == 1).all() for p in slices)


def test_a_later_group_is_tried_too():
    slices = make_slices(5, 3)
    optimizer = Scaled(slices[:1], lr=0.1)
    optimizer.step()
    optimizer.add_param_group({"params": slices[1:], "by_norm": True})
    with pytest.raises(ValueError, match="Scaled cannot"):
        optimizer.step()


@pytest.mark.parametrize("base", [torch.optim.AdamW, lab.AdamW, lab.SGD, Scaled])
def test_others_are_tried_once(base):
    made = []

    class Counted(base):
        def __init__(self, params, **options):
            made.append(self)
            super().__init__(params, **options)

    slices = make_slices(5, 0, 3)
    optimizer = Counted([{"params": [p]} for p in slices], lr=0.1)
    state = torch.random.get_rng_state()
    for _ in range(3):
        optimizer.step()
    # Itself, one to see whether it can be made, and two that are compared.
    assert len(made) == 4
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (slices[0] < 1).all()


def test_what_is_no_slice_is_no_concern():
    guard_steps()
    hooks = len(_global_optimizer_pre_hooks)
    guard_steps()
    assert len(_global_optimizer_pre_hooks) == hooks
    free, cut = (nn.Parameter(torch.ones(5)) for _ in range(2))
    mark_shard(cut, SimpleNamespace(local=free))  # as ZeroOptimizer does
    for p in (free, cut):
        p.grad = torch.ones(5)
        torch.optim.Adafactor([p]).step()
        assert (p < 1).all()
