"""The command line, as a user meets it: in processes of its own."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest
import torch

from labpkg import __main__ as command_line
from labpkg.runs import launch, preload
from labpkg.runs.callbacks import Callback
from labpkg.runs.checkpoint import export_state_dict, newest_checkpoint
from labpkg.runs.config import TrainConfig
from labpkg.runs.trainer import Trainer

_WAIT_S = 100  # limits of waiting, for a busy machine; nothing here takes so long
needs_tyro = pytest.mark.skipif(
    find_spec("tyro") is None,
    reason="tyro is not installed: no options of `labpkg train` to read",
)


@pytest.fixture
def labpkg():
    """Start the command line; whatever a failed test leaves of it is killed."""
    started = []

    def start(*arguments, **options):
        process = subprocess.Popen(
            [sys.executable, "-m", "labpkg", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a terminal sends Ctrl-C to the whole group
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _finish(process):
    out, error = process.communicate(timeout=_WAIT_S)
    return process.returncode, out, error


def _digits(out, steps, *more):
    return (
        *("train", "--data", "digits", "--out", out, "--steps", steps),
        *("--device", "cpu", "--dp", 2, "--global-batch-size", 16, *more),
    )


def _wait_for(condition):
    end = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def _wait_for_checkpoint(process, out):
    folder = Path(out) / "checkpoints"
    _wait_for(lambda: process.poll() is not None or newest_checkpoint(folder)[0])
    assert process.poll() is None, process.communicate()[1]


def _ranks(process):
    """The processes that the fork server of a launcher has forked."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if child.ppid() != process.pid]


def _group_is_empty(process):
    """Whether no process of the launcher's session is left; zombies do not count."""
    left = []
    for other in psutil.process_iter():
        try:
            alive = other.status() != psutil.STATUS_ZOMBIE
            if alive and os.getsid(other.pid) == process.pid:
                left.append(other)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return not left


def _run_whole(config):
    return Trainer(config).run()


def _weights(folder, step):
    return export_state_dict(f"{folder}/checkpoints/step_{step:06d}")


def _main(*arguments):
    """Run a command in this process, whose fork server starts the ranks."""
    return command_line.main([str(argument) for argument in arguments])


@needs_tyro
def test_train_prints_json_and_leaves_checkpoint_and_scalars(tmp_path, capsys):
    options = _digits(tmp_path, 30, "--json", "--checkpoint-every", 20)
    assert _main(*options) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_ranks"], result["backend"]) == (2, "gloo")
    assert (result["steps"], result["device"], result["precision"]) == (
        30,
        "CPU",
        "fp32",
    )
    assert result["history"][-1][1] < result["history"][0][1]
    assert result["units_per_s"] > 0
    assert 0 < result["first_step_s"] < _WAIT_S
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [
        "step_000020",
        "step_000030",
    ]
    assert os.listdir(tmp_path / "tensorboard")
    # Once more: no step is left.
    assert _main(*options, "--resume") == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["history"], again["first_step_s"]) == ([], None)
    assert again["validation_loss"] == result["validation_loss"]


@needs_tyro
def test_a_killed_rank_restarts_the_job_and_changes_nothing(tmp_path, world2, labpkg):
    steps, every = 400, 100
    process = labpkg(
        *_digits(tmp_path / "killed", steps, "--checkpoint-every", every),
        *("--max-restarts", 1),
    )
    _wait_for_checkpoint(process, tmp_path / "killed")
    _ranks(process)[1].kill()
    code, out, error = _finish(process)
    assert code == 0, error
    assert "Resumed from" in error
    assert "400/400" in error  # the progress bar
    assert "loss=" in error
    assert "samples/s=" in error
    assert "Validation loss" in out
    assert "Ran mlp (2,410 parameters) on 2 ranks" in out
    whole = TrainConfig(
        data="digits",
        out=tmp_path / "whole",
        steps=steps,
        global_batch_size=16,
        checkpoint_every=0,
    )
    world2.run(_run_whole, whole, timeout_s=_WAIT_S)
    a, b = _weights(tmp_path / "killed", steps), _weights(tmp_path / "whole", steps)
    assert all(torch.equal(a[name], b[name]) for name in b)
    _wait_for(lambda: _group_is_empty(process))


@needs_tyro
def test_a_restart_before_the_first_checkpoint_keeps_the_earlier_run(tmp_path, labpkg):
    """The launcher is killed, too, then: no rank outlives it."""
    Trainer(TrainConfig(data="digits", out=tmp_path, steps=3)).run()
    earlier = _weights(tmp_path, 3)
    process = labpkg(
        *_digits(tmp_path, 10**6, "--checkpoint-every", 0, "--max-restarts", 1)
    )
    _wait_for((tmp_path / "previous" / "tensorboard").exists)
    scalars = tmp_path / "tensorboard"  # each attempt writes a file when it starts
    _wait_for(lambda: len(list(scalars.glob("*"))) == 1)
    _ranks(process)[1].kill()
    _wait_for(lambda: len(list(scalars.glob("*"))) == 2)
    process.kill()
    code, _, error = _finish(process)
    assert code == -signal.SIGKILL
    assert f"Moved the earlier run of {tmp_path} to {tmp_path}/previous." in error
    kept = _weights(tmp_path / "previous", 3)
    assert all(torch.equal(kept[name], earlier[name]) for name in earlier)
    _wait_for(lambda: _group_is_empty(process))
    # Started by hand once more: what was killed has left nothing to keep.
    Trainer(TrainConfig(data="digits", out=tmp_path, steps=2)).run()
    assert _weights(tmp_path / "previous", 3).keys() == earlier.keys()
    assert os.listdir(tmp_path / "checkpoints") == ["step_000002"]


@needs_tyro
def test_ctrl_c_ends_all_in_one_line_and_only_the_loopback_was_used(tmp_path, labpkg):
    process = labpkg(*_digits(tmp_path, 10**6, "--checkpoint-every", 100))
    _wait_for_checkpoint(process, tmp_path)
    listening = [
        connection.laddr.ip
        for member in [psutil.Process(process.pid), *_ranks(process)]
        for connection in member.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 2  # the store, and gloo in the ranks
    assert set(listening) == {"127.0.0.1"}
    os.killpg(process.pid, signal.SIGINT)
    start = time.monotonic()
    code, out, error = _finish(process)
    assert time.monotonic() - start < 10
    assert (code, out) == (130, "")
    last = error.splitlines()[-1]
    assert last.startswith("labpkg train: interrupted (newest checkpoint ")
    assert last.endswith("; the same command with --resume goes on)")
    assert "Traceback" not in error
    _wait_for(lambda: _group_is_empty(process))
    assert not list((tmp_path / "checkpoints").glob(".*"))


class _Stop(Callback):
    def after_step(self, run, report):
        run.stop("seen enough")


@needs_tyro
def test_sigterm_saves_under_any_layout_and_resume_auto_goes_on(tmp_path, labpkg):
    options = ("--resume", "auto", "--checkpoint-every", 20)
    process = labpkg(*_digits(tmp_path, 10**6, *options, "--pp", 2, "--dp", 1))
    _wait_for_checkpoint(process, tmp_path)
    process.terminate()
    code, out, error = _finish(process)
    assert code == 75, error
    stopped = re.search(r"Stopped after (\d+) steps: SIGTERM announced the end", out)
    assert stopped is not None, out
    assert "Traceback" not in error
    _wait_for(lambda: _group_is_empty(process))
    newest, skipped = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == f"step_{int(stopped[1]):06d}"
    assert skipped == []
    config = TrainConfig(
        data="digits",
        out=tmp_path,
        steps=10**6,
        global_batch_size=16,
        resume="auto",
    )
    result = Trainer(config, [_Stop()]).run()
    assert result.resumed_from == str(newest)
    assert result.steps == int(stopped[1]) + 1


@needs_tyro
def test_ctrl_c_while_everything_still_imports(tmp_path, labpkg):
    process = labpkg(*_digits(tmp_path, 10))
    _wait_for(lambda: psutil.Process(process.pid).children())  # the fork server
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    code, _, error = _finish(process)
    assert code == 130
    assert error == "labpkg train: interrupted\n"
    _wait_for(lambda: _group_is_empty(process))


@pytest.fixture
def full_disk():
    """Let no rank write a file of more than 10 kB."""
    preload.start_fork_server()
    server = psutil.Process(forkserver._forkserver._forkserver_pid)  # pyright: ignore
    before = server.rlimit(psutil.RLIMIT_FSIZE)
    server.rlimit(psutil.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    server.rlimit(psutil.RLIMIT_FSIZE, before)


@needs_tyro
@pytest.mark.skipif(
    not hasattr(psutil.Process, "rlimit"),
    reason="no limits of another process can be set here",
)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    tmp_path, capsys, full_disk
):
    # Half of the optimizer state of the MLP has more than 10 kB.
    with pytest.raises(SystemExit, match="2"):
        _main(*_digits(tmp_path, 20))
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert last.startswith("labpkg train: cannot save ")
    assert last.endswith("the older checkpoints are intact: make room and resume")
    assert "Traceback" not in error
    assert os.listdir(tmp_path / "checkpoints") == []


@needs_tyro
def test_under_torchrun_it_joins(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ("train", "--data", "digits", "--steps", "5", "--device", "cpu", "--json")
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "labpkg", *options, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=_WAIT_S,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_ranks"] == 2  # rank 0 alone prints


# run -------------------------------------------------------------------------------

_JOB = """
import torch
import labpkg as lab

def total(factor=1):
    mesh = lab.make_mesh(dp=2)["dp"]
    return int(lab.all_reduce(torch.tensor(mesh.get_local_rank() + factor), mesh))

def fails():
    raise ValueError("my own mistake")
"""


def test_run_calls_a_function_of_a_file_on_every_rank(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("job.py").write_text(_JOB)
    options = ("--nproc", 2, "--device", "cpu")
    assert _main("run", "job.py:total", *options) == 0
    assert capsys.readouterr().out == "[0] 3\n[1] 3\n"
    assert _main("run", "job.py:total", *options, "factor=5", "--json") == 0
    assert capsys.readouterr().out == "[11, 11]\n"
    with pytest.raises(SystemExit, match="1"):
        _main("run", "job.py:fails", *options)
    out, error = capsys.readouterr()
    assert out == ""
    assert 'job.py", line 10, in fails' in error  # where, for the author of the file
    last = error.splitlines()[-1]
    assert last.startswith("labpkg run: rank ")
    assert last.endswith(" of 2: ValueError: my own mistake")


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("command", "error", "code", "answer"),
    [
        ("train", ValueError("choose 1"), 2, "labpkg train: choose 1\n"),
        ("train", OSError("full disk"), 2, "labpkg train: full disk\n"),
        ("train", ConnectionResetError("lost"), 1, "ConnectionResetError: lost\n"),
        ("train", RuntimeError("broken"), 1, "RuntimeError: broken\n"),
        ("run", ValueError("mine"), 1, "ValueError: mine\n"),
        ("run", FileNotFoundError("mine"), 1, "FileNotFoundError: mine\n"),
    ],
)
def test_a_rank_of_a_foreign_launcher_tells_refusals_from_failures(
    monkeypatch, capsys, command, error, code, answer
):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    command_line._as_rank(command, _raise, error)
    assert codes == [code]
    said = capsys.readouterr().err
    assert said.endswith(answer)
    assert ("in _raise" in said) == (code == 1)  # the traceback


def test_as_a_rank_a_file_of_yours_fails_with_its_traceback(tmp_path, labpkg):
    (tmp_path / "job.py").write_text(_JOB)
    with launch._listen_on_loopback(0) as free:
        port = free.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    options = ("run", "job.py:fails", "--device", "cpu")
    code, _, error = _finish(labpkg(*options, cwd=tmp_path, env=os.environ | place))
    assert code == 1
    assert 'job.py", line 10, in fails' in error
    assert "ValueError: my own mistake" in error


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("job.py", "'job.py' is not FILE.py:FUNCTION"),
        ("none.py:main", "cannot read 'none.py': No such file or directory"),
        ("job.py:main", "job.py defines no function 'main'; it has: total, fails"),
        ("job.py:total steps=1", "the function takes no 'steps'; it takes: factor"),
        ("broken.py:main", "broken.py, line 1: invalid syntax"),
    ],
)
def test_run_refuses_what_it_cannot_find(
    tmp_path, monkeypatch, capsys, target, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.py").write_text(_JOB)
    (tmp_path / "broken.py").write_text("def def\n")
    assert command_line.main(["run", *target.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"labpkg run: {message}")
    assert error.count("\n") == 1


# Bad input is answered before any rank starts. ------------------------------------


@pytest.fixture
def no_processes(monkeypatch):
    """Let the fork server, which only imports, stay out of the test process."""
    monkeypatch.setattr(preload, "start_fork_server", lambda: None)
    monkeypatch.delenv("MASTER_PORT", raising=False)


@needs_tyro
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "steps=0 is too small; choose 1 or more"),
        (["--model", "gpt-1t"], "model='gpt-1t' is unknown; choose gpt-1m or gpt-10m"),
        (["--data", "mnist"], "data='mnist' is neither digits nor stdlib nor a file"),
        (["--dp", "3", "--global-batch-size", "2"], "global_batch_size=2 leaves some"),
        (["--max-restarts", "-1"], "max_restarts=-1 is below 0; choose 0"),
        (["--zero", "4"], "zero=4 is no stage of ZeRO; choose 0, 1, 2, 3"),
        (["--pp", "2", "--dp", "3"], "global_batch_size=8 is not divisible by dp *"),
        (["--schedule", "2f2b"], "schedule='2f2b' is unknown; choose gpipe, 1f1b"),
        (["--tp", "2", "--device", "cuda"], "pp * dp * tp = "),
        (["--device", "cuda", "--dp", "8"], "dp=8 on device='cuda' needs 8 GPUs"),
        (["--data", "digits", "--resume"], "{out}/checkpoints has no checkpoint"),
        (
            ["--data", "digits", "--resume", "nowhere"],
            "nowhere is not a usable checkpoint: manifest.json cannot be read (No such",
        ),
        (["--data", "{out}/short"], "'{out}/short', train part: 4 bytes are too short"),
        (
            ["--data", "digits", "--out", "{out}/short"],
            "out='{out}/short' cannot be written to (File exists)",
        ),
    ],
)
def test_bad_options(tmp_path, capsys, no_processes, options, message):
    (tmp_path / "short").write_text("short")
    options = [option.format(out=tmp_path) for option in options]
    where = [] if "--out" in options else ["--out", str(tmp_path)]
    assert command_line.main(["train", "--device", "cpu", *where, *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"labpkg train: {message.format(out=tmp_path)}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert os.listdir(tmp_path) == ["short"]


@needs_tyro
def test_an_earlier_run_is_moved_before_a_rank_could_die(
    tmp_path, no_processes, monkeypatch
):
    earlier = TrainConfig(data="digits", out=tmp_path, steps=2, global_batch_size=4)
    Trainer(earlier).run()
    seen = []

    def launch(*args, **how):
        seen.extend(os.listdir(tmp_path))
        raise SystemExit(1)

    monkeypatch.setattr(command_line, "_launch", launch)
    with pytest.raises(SystemExit):
        command_line.main(["train", *map(str, _digits(tmp_path, 3)[1:])])
    assert seen == ["previous"]
    assert os.listdir(tmp_path / "previous" / "checkpoints") == ["step_000002"]


@needs_tyro
def test_a_port_in_use(tmp_path, capsys, no_processes, monkeypatch):
    monkeypatch.setattr(launch, "start_fork_server", lambda: None)
    monkeypatch.setenv("MASTER_PORT", "0")
    with launch._listen_on_loopback(0) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        arguments = ["train", "--data", "digits", "--out", str(tmp_path)]
        assert command_line.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"labpkg train: cannot listen on MASTER_PORT={port} (Addr")
    assert error.count("\n") == 1


@needs_tyro
def test_every_option_is_documented(capsys):
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["train", "--help"])
    text = capsys.readouterr().out
    for option in (
        *("--dp", "--steps", "--global-batch-size", "--model", "--data", "--lr"),
        *("--precision", "--device", "--seed", "--out", "--checkpoint-every"),
        *("--resume", "--max-restarts", "--json", "--pp", "--tp", "--zero"),
        *("--schedule", "--num-micro-batches", "--sequence-parallel", "--grad-accum"),
        *("--recompute", "--clip", "--keep", "--async-save"),
    ):
        assert option in text
    assert "Data-parallel ranks; None takes all GPUs" in text
    assert "Restarts after a rank has failed" in text


def test_without_tyro_it_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert command_line.main(["train", "--steps", "5"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("labpkg train: reading options needs tyro")
    assert error.endswith("-m pip install tyro\n")


@pytest.mark.parametrize(
    ("given", "completed"),
    [
        (["--resume"], ["--resume", "newest"]),
        (["--resume", "--json"], ["--resume", "newest", "--json"]),
        (["--resume", "a/b", "--json"], ["--resume", "a/b", "--json"]),
        (["--json"], ["--json"]),
    ],
)
def test_resume_may_stand_alone(given, completed):
    assert command_line._complete_resume(given) == completed


def test_help_version_and_unknown_commands(capsys):
    assert command_line.main([]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in ("train", "run", "doctor", "bench"))
    assert command_line.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("labpkg 0.")
    assert command_line.main(["fly"]) == 2
    assert "choose one of train, run, doctor, bench" in capsys.readouterr().err


def test_the_console_script_exists():
    script = shutil.which("labpkg", path=os.path.dirname(sys.executable))
    if script is None:
        pytest.skip("labpkg is not installed in this interpreter: no console script")
    done = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("labpkg 0.")
