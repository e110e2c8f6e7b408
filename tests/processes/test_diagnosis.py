"""Who is blamed, without any process."""

from __future__ import annotations

import linecache

import pytest

from labpkg.processes.diagnosis import Failure, Where, diagnose, with_source


def blame(*, returned=(), failures=None, where=None):
    return diagnose(
        returned=returned, failures=failures or {}, where=where or {}, limit_s=5
    )


def test_the_earliest_failure_that_is_no_lost_connection():
    error = blame(
        returned=[3],
        failures={
            0: Failure(time_s=1.0, summary="closed by peer", is_victim=True),
            1: Failure(time_s=3.0, summary="later"),
            2: Failure(time_s=2.0, summary="first", traceback="Traceback: first"),
        },
        where={4: Where(stack="", collective="barrier")},
    )
    assert (error.rank, error.traceback) == (2, "Traceback: first")
    assert error.others == {
        0: "lost a connection: closed by peer",
        1: "failed too: later",
        3: "had returned",
        4: "waited in barrier",
    }


def test_only_victims_leave_the_earliest_one():
    error = blame(
        failures={
            0: Failure(time_s=2.0, summary="reset", is_victim=True),
            1: Failure(time_s=1.0, summary="reset", is_victim=True),
        }
    )
    assert error.rank == 1


def test_a_hang_suspects_stopped_then_outside_then_fewest():
    behind = Where(stack="f", collective="barrier (number 1 in x)", num_issued=1)
    ahead = Where(stack="f", collective="barrier (number 2 in x)", num_issued=2)
    outside = Where(stack="f", num_issued=9)
    stopped = Where(stack="", is_stopped=True)
    assert blame(where={0: ahead, 1: outside, 2: behind, 3: stopped}).rank == 3
    assert blame(where={0: ahead, 1: outside, 2: behind}).rank == 1
    assert blame(returned=[3], where={0: ahead, 1: outside}).rank == 1
    assert blame(returned=[3], where={0: ahead, 2: behind}).rank == 3
    error = blame(where={0: ahead, 2: behind})
    assert error.rank == 2
    assert "within 5 s" in str(error)
    assert "inference" in str(error)
    assert "fewest collectives (1)" in str(error)
    assert "check=True" not in str(error)
    assert "Stack of rank 0 (waited in barrier" in error.traceback


@pytest.mark.parametrize(
    ("calls", "differ"),
    [
        (["all_reduce [3]", "all_reduce [2]"], True),
        (["barrier; pending: all_reduce [1]", "all_reduce [2]"], True),
        (["barrier; pending: all_reduce [1]", "all_reduce [1]"], False),
    ],
)
def test_different_calls_with_one_number_do_not_match(calls, differ):
    places = {
        rank: Where(stack="", collective=f"{call} (number 1 in x)", num_issued=1)
        for rank, call in enumerate(calls)
    }
    assert ("check=True" in str(blame(where=places))) is differ


def test_cells_are_shown_with_their_source(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("x = 1\n")
    cell = "/tmp/ipykernel_1/2.py"
    linecache.cache[cell] = (10, None, ["a = 1\n", "    b = a / 0\n"], cell)
    text = (
        f'  File "{cell}", line 2, in f\n'
        f'  File "{cell}", line 1 in <module>\n'
        f'  File "{file}", line 1, in g\n    x = 1\n'
        '  File "/x/labpkg/processes/rank.py", line 9 in main\n'
        "Extension modules: numpy (total: 1)\n"
        "ZeroDivisionError"
    )
    try:
        assert with_source(text) == (
            "  cell, line 2, in f\n    b = a / 0\n"
            "  cell, line 1, in <module>\n    a = 1\n"
            f'  File "{file}", line 1, in g\n    x = 1\n'
            "ZeroDivisionError"
        )
    finally:
        del linecache.cache[cell]
