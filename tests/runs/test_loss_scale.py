"""The loss scale follows torch's GradScaler, step for step."""

from itertools import pairwise

import pytest
import torch

from labpkg.runs.loss_scale import LossScale


def test_it_follows_torch():
    options = {"growth_interval": 3}
    ours = LossScale(2.0**4, **options)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**4, **options)
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    generator = torch.Generator().manual_seed(0)
    scales = []
    for _ in range(60):
        overflows = torch.rand((), generator=generator) < 0.1
        optimizer.zero_grad()
        theirs.scale(weight * (torch.inf if overflows else 1.0)).backward()
        theirs.step(optimizer)
        theirs.update()
        ours.update(overflowed=bool(overflows))
        scales.append(ours.value)
        assert ours.value == theirs.get_scale()
    assert any(b < a for a, b in pairwise(scales))
    assert any(b > a for a, b in pairwise(scales))


def test_it_stays_what_float32_can_hold():
    ours = LossScale(2.0**127, growth_interval=1)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1)
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    theirs.scale(weight * 1e-30).backward()
    theirs.step(optimizer)
    theirs.update()
    ours.update(overflowed=False)
    assert ours.value == theirs.get_scale() == 2.0**127


def test_its_state_continues():
    first, second = (LossScale(8.0, growth_interval=2) for _ in range(2))
    first.update(overflowed=True)
    first.update(overflowed=False)
    second.load_state_dict(first.state_dict())
    for scale in (first, second):
        scale.update(overflowed=False)
    assert (
        first.state_dict()
        == second.state_dict()
        == {
            "value": 8.0,
            "num_good_steps": 0,
        }
    )
    with pytest.raises(ValueError, match=r"value, num_good_steps.*not value"):
        second.load_state_dict({"value": 1.0})


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"initial": 0.0}, r"initial=0\.0"),
        ({"initial": float("nan")}, "initial=nan"),
        ({"growth": 1.0}, r"growth=1\.0"),
        ({"backoff": 1.0}, r"backoff=1\.0"),
        ({"growth_interval": 0}, "growth_interval=0"),
    ],
)
def test_what_cannot_scale_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        LossScale(**wrong)
