"""A layout is a value that refuses what no job could be."""

import pytest

from labpkg.planning.layout import SCHEDULES, Layout


def test_a_layout_names_its_parts():
    assert str(Layout()) == "one rank"
    assert str(Layout(dp=11)) == "dp11"
    full = Layout(pp=2, dp=2, tp=2, zero=1, schedule="zb-h1", sequence_parallel=True)
    assert str(full) == "pp2 dp2 tp2 zero1 zb-h1 sequence"
    assert full.world_size == 8


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_layout_makes_its_schedule(name):
    schedule = Layout(pp=2, schedule=name, num_micro_batches=6).make_schedule()
    assert (schedule.num_ranks, schedule.num_micro_batches) == (2, 6)


def test_a_pipeline_has_defaults():
    assert Layout(pp=4).make_schedule().num_micro_batches == 8
    assert Layout(pp=1, schedule="gpipe").is_pipeline
    assert not Layout(dp=2).is_pipeline


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"pp": 0}, "pp=0 is too small"),
        ({"grad_accum_steps": 0}, "grad_accum_steps=0"),
        ({"zero": 4}, "choose 0, 1, 2, 3"),
        ({"schedule": "1b1f"}, "choose gpipe, 1f1b"),
        ({"pp": 2, "num_micro_batches": 0}, "num_micro_batches=0"),
        ({"num_micro_batches": 3}, "choose grad_accum_steps=3 instead"),
        ({"dp": 2, "sequence_parallel": True}, "tp=1 cuts none; choose tp=2"),
    ],
)
def test_what_no_job_could_be_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Layout(**wrong)
