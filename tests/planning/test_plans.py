"""A plan explains itself with the numbers of its estimate, and names its engines."""

import json
import re
from dataclasses import replace

import pytest

from labpkg.planning.configuration import Configuration
from labpkg.planning.constants import constant_ranges
from labpkg.planning.estimates import estimate
from labpkg.planning.hardware import find_hardware
from labpkg.planning.neighbours import neighbours
from labpkg.planning.plans import Plan, describe, format_plans
from labpkg.planning.shapes import ModelShape
from labpkg.planning.simulator import simulate

H100 = find_hardware("h100")
LLAMA = ModelShape(
    num_layers=32,
    width=4096,
    num_heads=32,
    num_kv_heads=8,
    ffn_width=14336,
    vocab_size=128256,
    sequence_length=4096,
    tied=False,
    gated_mlp=True,
    learned_positions=False,
)
JOB = Configuration(model=LLAMA, nodes=2, dp=4, tp=2, pp=2, zero=1, grad_accum_steps=16)


def _plan(**changes):
    return Plan(estimate=estimate(replace(JOB, **changes), H100))


def test_an_explanation_holds_every_number():
    plan = _plan()
    text, own = plan.explain(), plan.estimate
    for term in (*own.time_terms, *own.memory_terms):
        if term.value:
            assert term.name in text
            assert term.formula in text
            assert term.source in text
    assert f"{own.step_s:.4g} s" in text
    assert (
        f"{own.memory_bytes / 2**30:.1f} GiB of {own.usable_bytes / 2**30:.1f}" in text
    )
    assert str(plan.layout()) in text
    assert all(source in text for source in H100.sources.values())
    assert all(name in text for name in constant_ranges())
    assert "power_limited True" in text


def test_the_largest_terms_come_first():
    own = _plan().estimate
    text = _plan().explain()
    for terms in (own.time_terms, own.memory_terms):
        names = [t.name for t in sorted(terms, key=lambda t: -t.value) if t.value]
        places = [text.index(f"\n  {name} ") for name in names]
        assert places == sorted(places)


def test_neighbours_differ_in_one_choice():
    own = _plan().estimate
    others = neighbours(own)
    assert len(others) > 12
    for other in others:
        job = other.configuration
        axes = [
            a for a in ("dp", "tp", "pp", "cp") if getattr(job, a) != getattr(JOB, a)
        ]
        assert job != JOB
        assert job.tokens_per_step == JOB.tokens_per_step
        assert (len(axes), job.zero == JOB.zero) in {(0, True), (0, False), (2, True)}
    assert [o.fits for o in others] == sorted((o.fits for o in others), reverse=True)


def test_an_explanation_says_why_each_neighbour_lost():
    plan = _plan()
    lines = plan.explain().split("Neighbours")[1].split("\n\n")[0].splitlines()[1:]
    others = neighbours(plan.estimate)
    assert len(lines) == len(others)
    for line, other in zip(lines, others, strict=True):
        percent = abs(other.step_s / plan.estimate.step_s - 1)
        says = f"{percent:.1%}" if other.fits else "does not fit"
        assert says in line


def test_a_faster_neighbour_that_is_tight_is_called_so():
    plan = _plan(zero=2)
    tight = [o for o in neighbours(plan.estimate) if o.step_s < plan.estimate.step_s]
    needed = max(tight, key=lambda o: o.memory_bytes).memory_bytes
    share = plan.estimate.usable_bytes / H100.memory_bytes
    small = replace(H100, memory_bytes=1.05 * needed / share)
    text = Plan(estimate=estimate(plan.configuration, small)).explain()
    assert f"but tight: {needed / 2**30:.1f} GiB of {1.05 * needed / 2**30:.1f}" in text
    assert "but tight" not in plan.explain()


def test_a_new_pipeline_names_its_schedule():
    assert "pp 2 for 1, schedule 1f1b: " in _plan(pp=1, dp=8).explain()


def test_one_pass_is_no_passes():
    assert describe(replace(JOB, pp=1, dp=8, grad_accum_steps=1)).endswith(
        "1 pass of size 1"
    )
    assert describe(JOB).endswith("16 micro-batches of size 1")


def test_a_neighbour_on_one_stage_has_no_schedule():
    jobs = [own.configuration for own in neighbours(_plan(pp=2).estimate)]
    assert {(j.schedule, j.num_virtual_stages) for j in jobs if j.pp == 1} == {
        ("1f1b", 1)
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"schedule": "1f1b", "num_micro_batches": 16, "zero": 1}),
        ({"dp": 8, "pp": 1}, {"schedule": None, "grad_accum_steps": 16}),
        ({"recompute": "full"}, {"recompute": True}),
        ({"recompute": "selective"}, {"recompute": False}),
        ({"sequence_parallel": False}, {"sequence_parallel": False}),
        ({"dp": 1, "tp": 8, "zero": 2}, {"zero": 0, "sequence_parallel": True}),
    ],
)
def test_a_plan_names_its_layout(changes, expected):
    layout = _plan(**changes).layout()
    assert {name: getattr(layout, name) for name in expected} == expected
    assert layout.world_size == JOB.world_size


def test_divided_gradients_need_room_for_whole_ones_here():
    assert _plan(zero=2).layout().zero == 2


def test_the_layout_has_the_schedule_that_was_estimated():
    plan = _plan(schedule="interleaved", num_virtual_stages=4)
    schedule = plan.layout().make_schedule()
    assert (schedule.num_stages, schedule.num_micro_batches) == (8, 16)
    assert simulate(schedule).bubble_fraction == pytest.approx(1 / (4 * 16 + 1))


@pytest.mark.parametrize(
    ("model", "changes", "says"),
    [
        ({}, {"dp": 2, "cp": 2}, "cp=2 divides sequences, which no engine"),
        ({"tied": True}, {"zero": 3}, "zero=3 slices parameters"),
        ({"num_layers": 120}, {"zero": 2}, "zero=2 divides gradients 16 times"),
        ({"num_kv_heads": 1}, {}, "num_kv_heads=1 is not divisible by tp=2"),
        ({"vocab_size": 50257}, {}, "vocab_size=50257 is not divisible by tp=2"),
        ({"sequence_length": 4095}, {}, "sequence_parallel=False"),
    ],
)
def test_what_no_engine_runs_is_said(model, changes, says):
    plan = _plan(model=replace(LLAMA, **model), **changes)
    with pytest.raises(ValueError, match=re.escape(says)):
        plan.layout()
    assert re.search(f"cannot run it: .*{re.escape(says)}", plan.explain())
    assert says in plan.as_dict()["obstacle"]


def test_a_plan_is_json():
    plan = _plan()
    values = json.loads(json.dumps(plan.as_dict()))
    assert values["configuration"]["model"]["num_layers"] == 32
    assert values["step_s"] == pytest.approx(
        sum(term["value"] for term in values["time_terms"])
    )
    assert values["command"] == plan.command()


def test_a_table_has_a_row_for_each_plan():
    plans = [_plan(), _plan(dp=8, pp=1, zero=3)]
    head, *rows = format_plans(plans).splitlines()
    assert len(rows) == 2
    assert all(len(row) == len(head) for row in rows)
    assert str(plans[0]).startswith(describe(JOB))
