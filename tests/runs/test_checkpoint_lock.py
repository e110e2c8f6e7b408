"""One writer for each folder: a second is refused, and one that is gone is not one."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import labpkg as lab
from labpkg.runs import checkpoint_lock
from labpkg.runs.checkpoint_lock import claim_folder, give_lock_back, take_lock

HOLDER = """
import sys
from labpkg.runs.checkpoint_lock import take_lock
take_lock(sys.argv[1])
print("holds", flush=True)
sys.stdin.read()
"""


def ended(*_):
    raise KeyboardInterrupt


def change(folder, **fields):
    """Let the lock be that of another process."""
    lock = folder / ".lock"
    lock.write_text(json.dumps(json.loads(lock.read_text()) | fields))


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(ValueError, match=f"by process {holder.pid} on host"):
            take_lock(tmp_path)
        model = lab.MLP(2, 2)
        with pytest.raises(ValueError, match="two writers would remove each other's"):
            lab.save_checkpoint(tmp_path, step=1, model=model)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        holder.kill()
    lab.save_checkpoint(tmp_path, step=1, model=model)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_a_process_claims_once_and_gives_back_once(tmp_path):
    folder = tmp_path / "made when missing"
    with claim_folder(folder):
        with claim_folder(folder):
            assert (folder / ".lock").exists()
        lab.save_checkpoint(folder, step=1, model=lab.MLP(2, 2))
        assert (folder / ".lock").exists()
    assert not (folder / ".lock").exists()


def test_a_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyError), claim_folder(tmp_path):
        raise KeyError
    assert take_lock(tmp_path)


@pytest.mark.parametrize(
    "gone",
    [
        {"started": "1"},  # its number belongs to another process now
        {"pid": 2**30},
        {"boot": "before the machine started again"},
    ],
    ids=lambda gone: next(iter(gone)),
)
def test_a_process_that_is_gone_holds_nothing(tmp_path, gone):
    take_lock(tmp_path)
    change(tmp_path, **gone)
    assert take_lock(tmp_path)


@pytest.mark.parametrize("elsewhere", [{"host": "far"}, {"pids": "pid:[1]"}])
@pytest.mark.parametrize(
    ("job", "own_job", "is_taken_over"),
    [
        ("run-7", "run-7", True),  # the launcher has ended the earlier attempt
        ("run-7", "run-8", False),
        (None, None, False),
        (None, "run-7", False),
        ("none", "none", False),  # torchrun's name for any job
    ],
)
def test_another_host_is_believed_unless_the_job_is_the_same(
    tmp_path, monkeypatch, elsewhere, job, own_job, is_taken_over
):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if job is not None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    take_lock(tmp_path)
    change(tmp_path, **elsewhere)
    if own_job is not None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", own_job)
    if is_taken_over:
        assert take_lock(tmp_path)
    else:
        with pytest.raises(ValueError, match=r"or remove .*\.lock if that process has"):
            take_lock(tmp_path)


def test_a_lock_that_says_nothing_is_no_lock(tmp_path):
    (tmp_path / ".lock").write_text("")
    assert take_lock(tmp_path)


def test_the_lock_of_another_is_not_given_back(tmp_path):
    take_lock(tmp_path)
    change(tmp_path, pid=1)
    give_lock_back(tmp_path)
    assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize("claimed", [False, True])
@pytest.mark.parametrize("attempt", range(5))
def test_of_many_that_find_a_lock_of_one_who_is_gone_one_takes_it(
    tmp_path, monkeypatch, claimed, attempt
):
    take_lock(tmp_path)
    change(tmp_path, pid=2**30)
    if claimed:  # by one that has ended before it could take the lock
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", ended)
            patch.setattr(Path, "unlink", lambda path, missing_ok: None)
            with pytest.raises(KeyboardInterrupt):
                take_lock(tmp_path)
        (claim,) = tmp_path.glob(".lock-????????")
        claim.write_text(json.dumps(json.loads(claim.read_text()) | {"pid": 2**30}))
    # Each thread stands for a process of its own.
    whoami = checkpoint_lock._who_am_i
    mine = lambda: whoami() | {"started": threading.current_thread().name}
    monkeypatch.setattr(checkpoint_lock, "_who_am_i", mine)
    monkeypatch.setattr(checkpoint_lock, "_is_alive", lambda h, me: h["pid"] != 2**30)
    taken, start = [], threading.Barrier(8)

    def compete():
        start.wait()
        try:
            taken.append(take_lock(tmp_path))
        except ValueError:
            taken.append(False)

    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [False] * 7 + [True]
    assert [path.name for path in tmp_path.glob(".lock*")] == [".lock"]
