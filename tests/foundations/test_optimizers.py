import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from labpkg.foundations.optimizers import SGD, AdamW

PAIRS: list[tuple[type, type, dict[str, Any]]] = [
    (SGD, torch.optim.SGD, {"lr": 0.1}),
    (SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.03}),
    (SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    (SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    (AdamW, torch.optim.AdamW, {"lr": 1e-2}),
    (AdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.0}),
    (AdamW, torch.optim.AdamW, {"lr": 1e-2, "betas": (0.0, 0.95), "eps": 1e-3}),
]


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 2)).double()


def train(model: nn.Module, optimizer: Any, steps: int, *, first: int = 0) -> None:
    for step in range(first, first + steps):
        random = torch.Generator().manual_seed(step)
        x = torch.randn(8, 4, generator=random, dtype=torch.float64)
        (model(x) - x[:, :2].sin()).square().mean().backward()
        if step % 4 == 1:  # now and then a parameter has no gradient
            next(model.parameters()).grad = None
        optimizer.step()
        optimizer.zero_grad()


def assert_equal(a: nn.Module, b: nn.Module, tolerance: float = 1e-12) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_equals_torch_for_100_steps(ours, theirs, options):
    model, reference, start = make_model(), make_model(), make_model()
    train(model, ours(model.parameters(), **options), 100)
    train(reference, theirs(reference.parameters(), **options), 100)
    assert_equal(model, reference)
    assert all(
        (p - q).abs().max() > 1e-3
        for p, q in zip(model.parameters(), start.parameters(), strict=True)
    )


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_state_dict_resumes_exactly(ours, theirs, options, tmp_path):
    straight, halved = make_model(), make_model()
    train(straight, ours(straight.parameters(), **options), 20)
    first = ours(halved.parameters(), **options)
    train(halved, first, 10)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = ours(halved.parameters(), **{**options, "lr": 123.0})
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    train(halved, second, 10, first=10)
    assert_equal(straight, halved, tolerance=0.0)


def test_state_of_ours_loads_into_torch():
    model, reference = make_model(), make_model()
    ours = AdamW(model.parameters(), lr=1e-2)
    train(model, ours, 5)
    state = copy.deepcopy(ours.state_dict())
    for moments in state["state"].values():
        moments["step"] = torch.tensor(float(moments["step"]))
    reference.load_state_dict(model.state_dict())
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    state["param_groups"] = theirs.state_dict()["param_groups"]
    theirs.load_state_dict(state)
    train(model, ours, 5, first=5)
    train(reference, theirs, 5, first=5)
    assert_equal(model, reference)


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_state_of_torch_loads_into_ours(ours, theirs, options):
    model, reference = make_model(), make_model()
    first = theirs(reference.parameters(), **options)
    train(reference, first, 5)
    model.load_state_dict(reference.state_dict())
    second = ours(model.parameters(), **{**options, "lr": 123.0})
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(reference, first, 5, first=5)
    train(model, second, 5, first=5)
    assert_equal(model, reference)


@pytest.mark.parametrize(
    ("ours", "theirs"), [pair[:2] for pair in (PAIRS[0], PAIRS[4])]
)
def test_groups_and_schedulers_work_as_in_torch(ours, theirs):
    models = make_model(), make_model()
    for model, cls in zip(models, (ours, theirs), strict=True):
        weights = [p for p in model.parameters() if p.dim() > 1]
        biases = [p for p in model.parameters() if p.dim() == 1]
        optimizer = cls(
            [{"params": weights}, {"params": biases, "lr": 0.3, "weight_decay": 0.0}],
            lr=0.01,
            weight_decay=0.1,
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        for step in range(12):
            train(model, optimizer, 1, first=step)
            scheduler.step()
    assert_equal(*models)


@pytest.mark.parametrize("optimizer_class", [SGD, AdamW])
def test_a_parameter_without_gradient_is_left_alone(optimizer_class):
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = optimizer_class([used, unused], lr=0.1, weight_decay=0.5)
    used.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(unused, torch.ones(3))
    assert not torch.equal(used, torch.ones(3))
    assert unused not in optimizer.state
    optimizer.zero_grad()
    optimizer.step()  # no gradient at all


@pytest.mark.parametrize("optimizer_class", [SGD, AdamW])
def test_an_empty_parameter_is_fine(optimizer_class):
    empty = nn.Parameter(torch.empty(0))
    optimizer = optimizer_class([empty], lr=0.1)
    empty.grad = torch.empty(0)
    optimizer.step()
    assert empty.shape == (0,)


class Moved(TorchDispatchMode):
    """Count the elements that operations on float32 tensors read and write."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        arguments = zip(func._schema.arguments, args, strict=False)
        written = [a for s, a in arguments if s.alias_info and s.alias_info.is_write]
        for tensor in tree_leaves([args, written or result]):
            if isinstance(tensor, torch.Tensor) and tensor.dim():
                self.elements += tensor.numel()
        return result


def moved_per_parameter(optimizer_class, **options):
    params = [nn.Parameter(torch.ones(40)), nn.Parameter(torch.ones(60))]
    optimizer = optimizer_class(params, lr=0.1, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()  # makes the state
    with Moved() as moved:
        optimizer.step()
    return moved.elements / 100


def test_adamw_moves_less_than_torchs_loop_and_lists():
    assert moved_per_parameter(AdamW) == 18 + 1  # addcmul is handed g twice
    assert moved_per_parameter(torch.optim.AdamW, foreach=True) == 20 + 1
    assert moved_per_parameter(torch.optim.AdamW, foreach=False) == 20 + 1
    # the schema of the fused kernel marks g as written, for a scaler of gradients
    assert moved_per_parameter(torch.optim.AdamW, fused=True) == 7 + 1


def test_step_calls_the_closure_with_gradients_on():
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = SGD([p], lr=0.25)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert p.item() == 1.0


@pytest.mark.parametrize(
    ("optimizer_class", "options", "message"),
    [
        (SGD, {"lr": -1.0}, r"lr=-1\.0 must be a finite"),
        (SGD, {"lr": float("nan")}, "lr=nan"),
        (SGD, {"lr": 0.1, "weight_decay": -0.1}, "weight_decay=-0.1"),
        (SGD, {"lr": 0.1, "momentum": 1.0}, r"momentum has the value 1\.0"),
        (SGD, {"lr": 0.1, "nesterov": True}, "has no effect; choose momentum"),
        (AdamW, {"lr": float("inf")}, "lr=inf"),
        (AdamW, {"lr": 0.1, "betas": (0.9,) * 3}, "must be two numbers"),
        (AdamW, {"lr": 0.1, "betas": (0.9, 1.0)}, r"betas has the value 1\.0"),
        (AdamW, {"lr": 0.1, "eps": -1e-8}, "eps=-1e-08"),
    ],
)
def test_bad_hyperparameters_raise(optimizer_class, options, message):
    with pytest.raises(ValueError, match=message):
        optimizer_class([nn.Parameter(torch.ones(1))], **options)


def test_bad_hyperparameters_of_a_group_raise():
    group = {"params": [nn.Parameter(torch.ones(1))], "lr": -0.5}
    with pytest.raises(ValueError, match=r"lr=-0\.5"):
        AdamW([group], lr=0.1)
