"""Pure functions of the step: their values, torch's schedulers as referee, errors."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labpkg.foundations.learning_rates import (
    inverse_sqrt,
    warmup_constant,
    warmup_cosine,
    warmup_linear,
)

FALLING = [warmup_linear, warmup_cosine]


@pytest.mark.parametrize("schedule", FALLING)
def test_rises_linearly_over_a_twentieth_and_falls_to_a_tenth(schedule):
    rates = [schedule(step, peak=2.0, steps=100) for step in range(1, 101)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert rates[-1] == pytest.approx(0.2)
    assert rates[52] == pytest.approx(1.1, abs=0.02)  # half of the way down


def torch_rates(scheduler_class, num_steps, **options):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = scheduler_class(optimizer, **options)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_equal_torchs_schedulers():
    # torch counts from 0 and has the peak there: without warm-up ours is one ahead.
    from torch.optim import lr_scheduler

    theirs = torch_rates(
        lr_scheduler.CosineAnnealingLR, 21, T_max=20, eta_min=0.3 * 0.1
    )
    ours = [warmup_cosine(s, peak=0.3, steps=20, warmup=0) for s in range(1, 21)]
    assert ours == pytest.approx(theirs[1:], rel=1e-12)

    options = {"start_factor": 1.0, "end_factor": 0.25, "total_iters": 20}
    theirs = torch_rates(lr_scheduler.LinearLR, 21, **options)
    ours = [
        warmup_linear(s, peak=0.3, steps=20, warmup=0, floor=0.25) for s in range(1, 21)
    ]
    assert ours == pytest.approx(theirs[1:], rel=1e-12)


def test_inverse_sqrt_is_the_formula_of_the_transformer():
    width, warmup = 512, 4000
    peak = width**-0.5 * warmup**-0.5
    for step in (1, 17, 3999, 4000, 4001, 100_000):
        published = width**-0.5 * min(step**-0.5, step * warmup**-1.5)
        ours = inverse_sqrt(step, peak=peak, warmup=warmup)
        assert ours == pytest.approx(published, rel=1e-12)


def test_constant_with_and_without_warmup():
    assert [warmup_constant(s, peak=0.5) for s in (1, 2, 900)] == [0.5, 0.5, 0.5]
    rates = [warmup_constant(s, peak=0.8, warmup=4) for s in range(1, 7)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


@given(st.data())
def test_a_rate_is_between_its_bounds_and_the_last_step_has_the_floor(data):
    steps = data.draw(st.integers(2, 500))
    warmup = data.draw(st.integers(0, steps - 1))
    floor = data.draw(st.floats(0, 1))
    step = data.draw(st.integers(1, steps))
    for schedule in FALLING:
        options = {"peak": 3.0, "steps": steps, "warmup": warmup, "floor": floor}
        assert 0 <= schedule(step, **options) <= 3.0 * (1 + 1e-12)
        if step >= warmup:
            assert schedule(step, **options) >= 3.0 * floor - 1e-12
        assert schedule(steps, **options) == pytest.approx(3.0 * floor)
        if warmup:
            assert schedule(warmup, **options) == 3.0


@pytest.mark.parametrize("schedule", FALLING)
def test_a_run_that_is_all_warm_up_ends_at_the_peak(schedule):
    assert schedule(1, peak=2.0, steps=1) == 2.0
    assert schedule(7, peak=2.0, steps=7, warmup=7) == 2.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: warmup_constant(0, peak=1.0), "count the first step as 1"),
        (lambda: warmup_constant(1, peak=-1.0), r"peak=-1\.0 must be"),
        (lambda: warmup_constant(1, peak=math.nan), "peak=nan must be"),
        (
            lambda: warmup_constant(1, peak=1.0, warmup=-3),
            "warmup=-3 is a number of steps",
        ),
        (lambda: warmup_cosine(11, peak=1.0, steps=10), "step=11 .* steps=10"),
        (lambda: warmup_linear(1, peak=1.0, steps=5, warmup=6), "warmup=6 .* steps=5"),
        (lambda: warmup_linear(1, peak=1.0, steps=5, floor=1.5), r"floor=1\.5"),
        (lambda: warmup_cosine(0, peak=1.0, steps=5), "step=0 must be 1 or more"),
        (lambda: inverse_sqrt(1, peak=1.0, warmup=0), "warmup=0 must be 1 or more"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_needs_no_torch():
    code = (
        "import labpkg.foundations.learning_rates, sys; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
