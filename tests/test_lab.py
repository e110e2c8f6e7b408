"""The first hour of a new reader: `make lab` in a fresh folder, a kill, a resume."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
LABPKG = [sys.executable, "-m", "labpkg"]
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def fresh_copy(tmp_path):
    """Copy what a clone would hold; time stamps stay, so that nothing is installed."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    return tmp_path


def test_make_lab_trains_and_builds_the_book(fresh_copy):
    ready = f"{sys.prefix}/.ready"
    result = subprocess.run(
        ["make", "lab", "STEPS=20", f"VENV={sys.prefix}", "-o", ready],
        cwd=fresh_copy,
        env=os.environ | {"PYTHONPATH": str(fresh_copy)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    out = result.stdout
    loss = re.search(r"Validation loss (\d\.\d+)", out)
    assert loss is not None
    assert float(loss.group(1)) < 4.0  # ln 256 = 5.5 at the start
    for step in ("Train", "Build"):
        assert re.search(rf"^==> {step}.*?[:.] \d+ s$", out, re.M), out
    assert out.index("==> Train") < out.index("==> Build")
    assert (fresh_copy / "_build" / "html" / "book" / "index.html").exists()
    assert list((fresh_copy / "runs_out/train/checkpoints").glob("step_000020"))


def test_a_killed_run_resumes_where_it_was(tmp_path):
    train = [*LABPKG, "train", "--steps", "20", "--checkpoint-every", "4", "--json"]
    train += ["--out", str(tmp_path / "run"), "--device", "cpu"]
    kill_after_checkpoint(train, tmp_path / "run" / "checkpoints")

    again = [*train, "--resume", "newest"]
    result = subprocess.run(again, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)
    first_step, _ = report["history"][0]
    assert report["resumed_from"] is not None
    assert first_step > 4
    assert report["history"][-1][0] == 20
    assert report["validation_loss"] < 4.0


def kill_after_checkpoint(command: list[str], checkpoints: Path) -> None:
    """Start a run, kill it once it has saved, and see that no process stays."""
    log = (checkpoints.parent.parent / "log").open("w+")
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step_*/manifest.json")):
        assert run.poll() is None, Path(log.name).read_text()[-2000:]
        assert time.monotonic() < deadline, "no checkpoint after 120 s"
        time.sleep(0.02)
    family = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    log.close()
