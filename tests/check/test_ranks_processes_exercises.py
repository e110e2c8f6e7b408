"""The exercise that watches processes accepts what is right and explains the rest."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest

from labpkg import check
from tests.check.laws import ExerciseLaws

EXERCISES: dict[str, Any] = {"supervise": check.supervise}


def supervise(ranks, limit_s, clock):
    end = clock.monotonic() + limit_s
    try:
        while True:
            for rank, it in enumerate(ranks):
                if it.poll():
                    kind = "exit" if it.returncode > 0 else "signal"
                    return rank, f"{kind} {abs(it.returncode)}"
            running = [rank for rank, it in enumerate(ranks) if it.poll() is None]
            if not running:
                return None, ""
            if clock.monotonic() > end:
                return running[0], "time"
            clock.sleep(0.05)
    finally:
        for it in ranks:
            it.kill()
            it.wait()


def one_after_the_other(ranks, limit_s, clock):
    for rank, it in enumerate(ranks):
        code = it.wait()
        if code:
            return rank, f"exit {code}" if code > 0 else f"signal {-code}"
    return None, ""


def with_numbers_of_exit(ranks, limit_s, clock):
    rank, reason = supervise(ranks, limit_s, clock)
    return rank, reason.replace("signal ", "exit -")


def without_killing(ranks, limit_s, clock):
    for it in ranks:
        it.kill = it.wait = lambda: None
    return supervise(ranks, limit_s, clock)


def too_seldom(ranks, limit_s, clock):
    sleep = clock.sleep
    clock.sleep = lambda seconds: sleep(0.7)
    return supervise(ranks, limit_s, clock)


def test_a_right_answer_passes():
    result = check.supervise(supervise)
    assert result, result.message


@pytest.mark.parametrize(
    ("programs", "limit_s", "answer"),
    [
        (["pass", "pass"], 60, (None, "")),
        (["import time; time.sleep(1000)", "exit(3)"], 60, (1, "exit 3")),
        (["import os; os.abort()"], 60, (0, "signal 6")),
        (["import time; time.sleep(1000)"], 0.1, (0, "time")),
    ],
)
def test_a_right_answer_works_on_real_processes(programs, limit_s, answer):
    ranks = [subprocess.Popen([sys.executable, "-c", text]) for text in programs]
    assert supervise(ranks, limit_s, time) == answer
    assert all(rank.poll() is not None for rank in ranks)


def test_polling_without_sleeping_ends():
    def busy(ranks, limit_s, clock):
        while any(rank.poll() is None for rank in ranks):
            pass

    result = check.supervise(busy)
    assert "call clock.sleep between the polls" in result.message


WRONG = [
    ("supervise", lambda ranks, limit_s, clock: ranks, "returns its argument"),
    ("supervise", one_after_the_other, "while the others run"),
    ("supervise", with_numbers_of_exit, "negative returncode"),
    ("supervise", without_killing, "kill the processes"),
    ("supervise", too_seldom, "sleep a little"),
    ("supervise", lambda ranks, limit_s, clock: (0, "time"), "poll() every rank"),
]


class TestLaws(ExerciseLaws):
    exercises = EXERCISES
    wrong = WRONG
