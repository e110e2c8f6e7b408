"""Schedules as values: they print, parse and compare, and a wrong one is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labpkg.planning.actions import Action, Schedule, parse
from labpkg.planning.schedules import gpipe, one_f_one_b

sizes = st.integers(1, 8)
FEW = settings(max_examples=40, derandomize=True, deadline=None, database=None)


@FEW
@given(P=sizes, M=st.integers(1, 20))
def test_gpipe_and_one_f_one_b(P, M):
    for make, peak in ((gpipe, lambda s: M), (one_f_one_b, lambda s: min(P - s, M))):
        schedule = make(P, M)
        assert schedule.bubble_fraction == (P - 1) / (M + P - 1)
        assert schedule.peak_in_flight == [peak(s) for s in range(P)]
        assert parse(str(schedule)) == schedule
        assert hash(parse(str(schedule))) == hash(schedule)


def test_the_grid_shows_idle_steps():
    assert str(gpipe(2, 2)) == (
        "rank 0 | 0F0 0F1 .   .   0B0 0B1\nrank 1 | .   1F0 1F1 1B0 1B1 ."
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0F0 0B0 0F1 0B1\n1F1 1F0 1B0 1B1", "Cycle of ranks: 0 -> 1 -> 0"),
        ("1F0 0F0 0B0 1B0", "Cycle of ranks: 0 -> 0"),
        ("0F0 0B0\n1F0", "stage 1 does F for micro-batch 0"),
        ("0F0 0B0 0F1 0B1\n1F0 1B0", "stage 1 does nothing for micro-batch 1"),
        ("0B0 0F0", "0F0 at step 1, 0B0 at step 0"),
        ("0F0 0W0 0I0", "0I0 at step 2, 0W0 at step 1"),
        ("0F0 0F0 0B0", "0F0 comes twice"),
        ("0F0 0B0\n2F0 2B0", "no rank has stage 1"),
        ("0F0 0B0\n0F1 0B1", "stage 0 has actions on rank 0 and, 0F1, on rank 1"),
        ("0F0 x", "'x' is not an action"),
        ("rank 1 | 0F0 0B0", "a line says rank 1"),
        ("0F0 0B0\nrank 1 | .", "rank 1 of 2 has no action"),
        ("", "has no action"),
    ],
)
def test_a_wrong_schedule_is_refused(text, problem):
    with pytest.raises(ValueError) as raised:
        parse(text)
    assert problem in str(raised.value)


def test_a_schedule_takes_actions_only():
    with pytest.raises(ValueError, match="is not an action"):
        Schedule([["0F0", "0B0"]])  # pyright: ignore[reportArgumentType]
    assert Action.parse("12F3") == Action(12, "F", 3)
