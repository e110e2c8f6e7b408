"""One rank shows and records; what it recorded can be read back."""

import pytest

from labpkg.runs.tracking import Tracker


def test_only_an_active_tracker_writes(tmp_path, capfd):
    for active in (False, True):
        tracker = Tracker(tmp_path / str(active), active=active, first_step=2, steps=4)
        tracker.say("a note")
        tracker.report(3, {"loss": 1.0}, loss="1.000")
        tracker.report(4, {"loss/validation": 2.0})
        tracker.close()
    assert [path.name for path in tmp_path.iterdir()] == ["True"]
    error = capfd.readouterr().err
    assert error.count("a note") == 1
    assert "4/4" in error
    assert "loss=1.000" in error.splitlines()[-1]


def test_scalars_can_be_read_back(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    tracker = Tracker(tmp_path, active=True, first_step=0, steps=2)
    tracker.report(1, {"loss/train": 3.0})
    tracker.report(2, {"loss/train": 2.5})
    tracker.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/train")] == [
        (1, 3.0),
        (2, 2.5),
    ]
