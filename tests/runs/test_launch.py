"""Jobs of the launcher, in a process of its own: it starts a fork server.

A busy machine needs long to start that; the jobs themselves take seconds.
"""

import signal
import socket

import pytest

from labpkg.runs import launch as launch_module

pytestmark = pytest.mark.timeout(300)
_LIMIT_S = 280

_JOBS = """
import multiprocessing, os, signal, sys, threading, time
import torch
from labpkg.runs.joining import joined
from labpkg.runs.launch import JobFailed, launch
import labpkg as lab

def rank():
    return int(os.environ["RANK"])

def total(n):
    with joined("cpu"):
        lab.make_mesh(dp=2)
        sum = lab.all_reduce(torch.tensor([rank() + n])).item()
        return sum, torch.get_num_threads()

def raises():
    with joined("cpu"):
        if rank() == 1:
            raise RuntimeError("rank 1 is broken")
        lab.all_reduce(torch.ones(1))

def refuses():
    with joined("cpu"):
        raise ValueError("steps=0 is too small; choose 1")

def dies():
    with joined("cpu"):
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        lab.all_reduce(torch.ones(1))

def loses():
    raise ConnectionResetError("Connection reset by peer")

def leaves():
    sys.exit(7)

def dies_once():
    if rank() == 0 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return total(0)[0], os.environ["TORCHELASTIC_RESTART_COUNT"]

def refuses_and_counts():
    with open(f"attempt{os.environ['TORCHELASTIC_RESTART_COUNT']}", "w"):
        refuses()

def notifies(number, answers):
    got = []
    if answers:
        signal.signal(number, lambda number, frame: got.append(int(number)))
    with joined("cpu"):
        lab.barrier()  # all handle it by now
        if rank() == 0:
            os.kill(multiprocessing.parent_process().pid, number)
        while not got:
            time.sleep(0.01)
    return got, os.environ["TORCHELASTIC_RESTART_COUNT"]

def notice(number, answers):
    try:
        return launch(notifies, number, answers, num_ranks=2, max_restarts=1)
    except SystemExit as e:
        return e.code

def failure(function, **options):
    start = time.monotonic()
    try:
        return launch(function, num_ranks=2, **options)
    except JobFailed as e:
        return str(e), e.refusal, e.details.strip().splitlines()[-1:]
    finally:
        print(f"{function.__name__}: {time.monotonic() - start:.1f} s", file=sys.stderr)

def main():
    own = lambda number, frame: None
    signal.signal(signal.SIGHUP, own)
    environment = dict(os.environ)
    answers = {
        "total": launch(total, 10, num_ranks=2),
        "handlers": [signal.getsignal(signal.SIGHUP) is own,
                     signal.getsignal(signal.SIGINT) is signal.default_int_handler,
                     signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
                     signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL],
        "environment": environment == dict(os.environ),
        "raises": failure(raises),
        "refuses": failure(refuses),
        "refuses_again": failure(refuses_and_counts, max_restarts=2),
        "attempts": [n for n in os.listdir() if n.startswith("attempt")],
        "answered": [notice(signal.SIGUSR1, True), notice(signal.SIGTERM, True)],
        "unanswered": [notice(signal.SIGUSR1, False), notice(signal.SIGTERM, False)],
        "dies": failure(dies),
        "loses": failure(loses),
        "leaves": failure(leaves),
        "dies_once": launch(dies_once, num_ranks=2, max_restarts=1),
    }
    return answers
"""


@pytest.fixture(scope="module")
def jobs(launcher):
    answers, stderr = launcher.call("jobs", _JOBS, limit_s=_LIMIT_S)
    # torch makes a cache folder for its compiler, the fork server one for its socket.
    own = ("torchinductor_", "pymp-")
    names = [path.name for path in launcher.temporary.iterdir()]
    left = [name for name in names if not name.startswith(own)]
    return answers | {"left": left, "stderr": stderr}


def test_ranks_form_a_group_and_values_come_in_rank_order(jobs):
    assert jobs["total"] == [[21, 1], [21, 1]]


def test_handlers_and_environment_are_restored(jobs):
    assert jobs["handlers"] == [True, True, True, True]
    assert jobs["environment"]


def test_the_rank_that_failed_is_named_not_the_one_that_lost_it(jobs):
    assert jobs["raises"] == [
        "rank 1 of 2: RuntimeError: rank 1 is broken",
        "",
        ["RuntimeError: rank 1 is broken"],
    ]


def test_a_refused_value_arrives_as_its_message(jobs):
    message, refusal, details = jobs["refuses"]
    assert message.endswith(" of 2: ValueError: steps=0 is too small; choose 1")
    assert refusal == "steps=0 is too small; choose 1"
    assert details == ["ValueError: steps=0 is too small; choose 1"]


def test_a_refusal_is_not_tried_again(jobs):
    message, refusal, details = jobs["refuses_again"]
    assert message.endswith(" of 2: ValueError: steps=0 is too small; choose 1")
    assert refusal == "steps=0 is too small; choose 1"
    assert details == ["ValueError: steps=0 is too small; choose 1"]
    assert jobs["attempts"] == ["attempt0"]


def test_ranks_that_answer_a_notice_return_and_the_job_ends_well(jobs):
    SIGUSR1, SIGTERM = signal.SIGUSR1, signal.SIGTERM
    answers = [[[[int(s)], "0"]] * 2 for s in (SIGUSR1, SIGTERM)]
    assert jobs["answered"] == answers


def test_ranks_that_do_not_answer_a_notice_die_and_are_not_started_again(jobs):
    assert jobs["unanswered"] == [128 + signal.SIGUSR1, 128 + signal.SIGTERM]


def test_a_lost_connection_is_a_failure_and_no_refusal(jobs):
    message, refusal, details = jobs["loses"]
    assert message.endswith("ConnectionResetError: Connection reset by peer")
    assert refusal == ""
    assert details == ["ConnectionResetError: Connection reset by peer"]


def test_a_killed_rank_is_named_with_its_signal(jobs):
    assert jobs["dies"] == ["rank 1 of 2: killed by SIGKILL", "", []]


def test_a_rank_that_leaves_is_named_with_its_exit_code(jobs):
    message, refusal, _ = jobs["leaves"]
    assert message.endswith("of 2: ended with exit code 7")
    assert refusal == ""


def test_a_restart_starts_all_ranks_again(jobs):
    assert jobs["dies_once"] == [[1, "1"], [1, "1"]]


def test_nothing_is_left_and_the_engine_is_silent(jobs):
    assert jobs["left"] == []
    assert "torch/distributed" not in jobs["stderr"]
    assert "Traceback" not in jobs["stderr"]


def test_a_port_in_use_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(launch_module, "start_fork_server", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ValueError, match=rf"MASTER_PORT={port} \(Address already"):
            launch_module.launch(print, num_ranks=2)
    monkeypatch.setenv("MASTER_PORT", "many")
    with pytest.raises(ValueError, match=r"MASTER_PORT=many \(not a port number\)"):
        launch_module.launch(print, num_ranks=2)


@pytest.mark.parametrize(("num_ranks", "max_restarts"), [(0, 0), (2, -1)])
def test_impossible_numbers(num_ranks, max_restarts):
    with pytest.raises(ValueError, match="must be at least"):
        launch_module.launch(print, num_ranks=num_ranks, max_restarts=max_restarts)
