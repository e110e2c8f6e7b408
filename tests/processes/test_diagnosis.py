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
    error = blame(where={0: behind, 1: behind})
    assert error.rank == 0
    assert "equally far" in str(error)
    assert "fewest" not in str(error)
    assert "check=True" not in str(error)
    assert "Stack of rank 0 (waited in barrier" in error.traceback


def at(call, number=1, group="0", **where):
    """A rank that waits in a collective of torch, which its record shows."""
    call = f"{call} (number {number} in x)"
    where = {"stack": "", "num_issued": number, "collective": call} | where
    return Where(record={(group, number): call}, **where)


def test_after_a_hang_the_rank_whose_call_differs_is_suspected():
    where = {0: at("all_reduce [2]"), 1: at("all_reduce [3]"), 2: at("all_reduce [2]")}
    error = blame(where=where)
    assert error.rank == 1
    assert "because it called all_reduce [3] (number 1 in x); the calls" in str(error)
    assert "all_reduce [2] (number 1 in x) on rank 0, all_reduce [3]" in str(error)
    # also when gloo let some ranks through, or when the odd one has gone on
    assert blame(returned=[0, 2], where=where).rank == 1
    assert blame(where=where | {1: at("all_reduce [3]", collective="")}).rank == 1
    # a stopped process needs no inference
    stopped = Where(stack="", is_stopped=True)
    assert blame(where=where | {3: stopped}).rank == 3


def test_two_calls_that_differ_are_told_without_a_majority():
    error = blame(where={0: at("all_reduce [2]"), 1: at("broadcast [2]", num_issued=0)})
    assert error.rank == 1
    assert "fewest collectives (0)" in str(error)
    assert "do not match: all_reduce [2] (number 1 in x) on rank 0" in str(error)


def test_what_the_library_was_asked_for_comes_before_what_torch_was():
    where = {
        rank: Where(
            stack="",
            collective="broadcast" if rank == 2 else "all_reduce",
            calls={("0", 7): "barrier", ("0", 8): "usual" if rank != 2 else "odd"},
            record={("0", 1): "all_gather" if rank else "broadcast"},
        )
        for rank in range(4)
    }
    error = blame(where=where)
    assert error.rank == 2
    assert "called odd; the calls do not match: usual on rank 0, usual" in str(error)
    del where[2].calls["0", 8]  # it is a call behind
    assert blame(where=where).rank == 0  # which torch knows to differ


def test_calls_of_other_groups_or_numbers_are_not_compared():
    same = {r: at("all_reduce [2]") for r in range(3)}
    assert "match" not in str(blame(where=same))
    assert "match" not in str(
        blame(where=same | {3: at("barrier", group="1", num_issued=2)})
    )
    assert "match" not in str(blame(where=same | {3: at("barrier", number=2)}))


@pytest.mark.parametrize(
    ("waits", "guilty"),
    [
        (["all_gather", "all_reduce [2] (number 1 in x)", "all_gather"], 1),
        (["barrier; pending: all_reduce [1]", "all_reduce [2]", "all_reduce [2]"], 0),
        (["all_gather", "all_reduce"], 0),  # nobody knows
        (["recv", "send", "send"], 0),  # messages do differ
        (["recv", "a transfer", "a transfer"], 0),
    ],
)
def test_ranks_that_wait_in_different_collectives(waits, guilty):
    where = {
        rank: Where(stack="", collective=wait, num_issued=4)
        for rank, wait in enumerate(waits)
    }
    error = blame(where=where)
    assert error.rank == guilty
    assert ("match" in str(error)) is ("recv" not in waits)
    where[2] = Where(stack="", collective="all_reduce", num_issued=5)
    assert "match" not in str(blame(where=where))  # one is ahead: no wonder


def test_an_abort_is_the_fault_of_the_rank_whose_call_differs():
    where = {1: at("all_reduce [2]"), 2: at("all_reduce [9]"), 3: at("all_reduce [2]")}
    died = Failure(time_s=1.0, summary="killed", traceback="gloo", has_aborted=True)
    lost = Failure(time_s=0.5, summary="closed", is_victim=True)
    error = blame(failures={0: died, 3: lost}, where=where)
    assert (error.rank, error.traceback) == (2, "gloo")
    assert "all_reduce [9] (number 1 in x) on rank 2" in str(error)
    assert "rank 0 aborted on it" in str(error)
    assert error.others[0] == "failed too: killed"
    # an exception of Python says itself what is wrong
    other = Failure(time_s=1.0, summary="ValueError")
    assert blame(failures={0: other}, where=where).rank == 0


def test_an_error_that_says_what_each_called_blames_the_minority():
    def failures(*calls):
        return {
            rank: Failure(time_s=float(rank), summary=f"I called {call}", call=call)
            for rank, call in enumerate(calls)
        }

    assert blame(failures=failures("sum", "sum", "max", "sum")).rank == 2
    assert blame(failures=failures("sum", "max")).rank == 0  # the first one
    assert blame(failures=failures("a", "b", "a", "b")).rank == 0
    assert blame(failures=failures("a", "b", "c", "b")).rank == 0
    assert "I called max" in str(blame(failures=failures("sum", "sum", "max")))


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
