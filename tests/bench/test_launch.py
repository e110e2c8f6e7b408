"""The form of the answer; how fast something is says `labpkg bench launch` itself."""

import subprocess
import sys

import pytest

from labpkg.bench import launch
from labpkg.processes.fork_server import ForkServer

_BURN = "import time\nwhile time.process_time() < 0.2: pass"
BURN = [sys.executable, "-c", _BURN]


def test_quick_rows_of_launch(monkeypatch):
    # torch would take 8 s to start, and a fork server 3 s.
    monkeypatch.setattr(launch, "_spawn", lambda: subprocess.run(BURN, check=True))
    monkeypatch.setattr(ForkServer, "close", lambda self: None)
    rows = launch.rows(quick=True)
    names = [launch.BASE, "labpkg:first", "labpkg", "labpkg:p95"]
    assert [row["variant"] for row in rows] == names
    assert len({(row["config"], row["unit"]) for row in rows}) == 1
    assert rows[0]["wall_ratio"] == 1.0
    assert rows[-1]["samples"] == 3
    ratio = rows[-1]["value"] / rows[0]["value"]
    assert rows[-1]["wall_ratio"] == pytest.approx(ratio)


def test_the_clock_sees_what_was_started_and_has_ended():
    before_s = launch._family_s()
    subprocess.run(BURN, check=True)
    assert launch._family_s() - before_s >= 0.19
