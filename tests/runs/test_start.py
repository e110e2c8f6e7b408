"""A new run takes the place of an earlier one without losing it."""

import json
import os

import pytest

import labpkg as lab
from labpkg.runs.checkpoint_lock import _started, take_lock
from labpkg.runs.config import TrainConfig
from labpkg.runs.start import clean_up_after, find_start, set_aside

_DATA = "0123abcd"  # a checksum of training data
_FILE = "model-00000-0.safetensors"


def _config(out, **options):
    return TrainConfig(data="digits", out=out, **options).resolved(dp=1, device="cpu")


def _save(config, step, folder="checkpoints"):
    model = lab.MLP(2, 2)
    return lab.save_checkpoint(
        config.out / folder,
        step=step,
        model=model,
        optimizer=lab.SGD(model.parameters(), lr=0.1),
        identity=config.identity(_DATA),
    )


def _tree(folder):
    """The checkpoints and the TensorBoard folders by their paths."""
    found = [*folder.glob("**/step_*"), *folder.glob("**/tensorboard")]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _restart(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")


def test_an_earlier_run_replaces_the_one_before_it(tmp_path):
    config = _config(tmp_path)
    for step in (1, 2, 3):
        notes = set_aside(config)
        _save(config, step)
        (tmp_path / "tensorboard").mkdir()
    assert notes == [f"Moved the earlier run of {tmp_path} to {tmp_path}/previous."]
    assert _tree(tmp_path) == [
        *("checkpoints/step_000003", "previous/checkpoints/step_000002"),
        *("previous/tensorboard", "tensorboard"),
    ]


def test_a_run_without_checkpoint_replaces_nothing(tmp_path):
    config = _config(tmp_path)
    _save(config, 9)
    set_aside(config)
    for leftover in ("checkpoints", "checkpoints/.partial-step_000001", "tensorboard"):
        (tmp_path / leftover).mkdir()
    assert set_aside(config) == []
    assert _tree(tmp_path) == ["previous/checkpoints/step_000009"]


def test_a_restarted_job_moves_nothing(tmp_path, monkeypatch):
    config = _config(tmp_path)
    _save(config, 9)
    _restart(monkeypatch)
    assert set_aside(config) == []
    assert _tree(tmp_path) == ["checkpoints/step_000009"]


def test_a_run_that_resumes_moves_its_own_checkpoints_nowhere(tmp_path, monkeypatch):
    own = _save(_config(tmp_path / "out"), 9)
    monkeypatch.chdir(tmp_path)
    for resume in ("newest", "auto", str(own), "out/checkpoints/step_000009"):
        assert set_aside(_config(tmp_path / "out", resume=resume)) == []
    assert _tree(tmp_path) == ["out/checkpoints/step_000009"]


def test_a_run_that_resumes_from_elsewhere_makes_room(tmp_path):
    start = _save(_config(tmp_path / "there"), 5)
    config = _config(tmp_path / "here", resume=str(start))
    _save(config, 9)
    assert len(set_aside(config)) == 1
    assert _tree(tmp_path / "here") == ["previous/checkpoints/step_000009"]


def test_the_checkpoint_to_resume_from_is_never_removed(tmp_path):
    config = _config(tmp_path)
    _save(config, 5)
    set_aside(config)
    again = _config(tmp_path, resume=str(tmp_path / "previous/checkpoints/step_000005"))
    assert set_aside(again) == []  # no checkpoint is in its way
    _save(config, 9)
    with pytest.raises(ValueError, match=r"would remove .*; choose another out"):
        set_aside(again)
    assert _tree(tmp_path) == [
        *("checkpoints/step_000009", "previous/checkpoints/step_000005"),
    ]


def test_a_fresh_start_and_a_checkpoint_by_name(tmp_path):
    config = _config(tmp_path)
    path = _save(config, 9)
    assert find_start(config, _DATA) == (None, [])
    assert find_start(_config(tmp_path, resume=str(path)), _DATA) == (path, [])


def test_auto_starts_afresh_where_there_is_nothing(tmp_path):
    config = _config(tmp_path, resume="auto")
    assert find_start(config, _DATA) == (None, [])
    path = _save(config, 9)
    assert find_start(config, _DATA) == (path, [])
    os.truncate(path / _FILE, 5)
    found, notes = find_start(config, _DATA)
    assert found is None
    assert notes[0].startswith(f"Skipped: {path} is not a usable checkpoint")


def test_dead_ranks_leave_neither_lock_nor_halves_and_living_ones_keep_theirs(
    tmp_path, monkeypatch
):
    config = _config(tmp_path)
    clean_up_after(config)
    assert not config.out.joinpath("checkpoints").exists()
    path = _save(config, 9)
    half = path.with_name(".partial-step_000010")
    half.mkdir()
    take_lock(path.parent)
    lock = path.with_name(".lock")
    mine = json.loads(lock.read_text())
    alive = mine | {"pid": os.getppid(), "started": _started(os.getppid())}
    lock.write_text(json.dumps(alive))
    clean_up_after(config)
    assert (half.exists(), lock.exists()) == (True, True)
    lock.write_text(json.dumps(alive | {"started": "before"}))
    clean_up_after(config)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("resume", [None, "newest", "auto"])
def test_what_is_passed_over_is_said(tmp_path, monkeypatch, resume):
    config = _config(tmp_path, resume=resume)
    good, bad = _save(config, 8), _save(config, 9)
    (bad / _FILE).write_bytes(b"short")
    if resume is None:
        _restart(monkeypatch)
    found, notes = find_start(config, _DATA)
    assert found == good
    assert len(notes) == 1
    assert notes[0].startswith(f"Skipped: {bad} is not a usable checkpoint")


def test_a_restart_without_checkpoint_starts_as_the_job_did(tmp_path, monkeypatch):
    _restart(monkeypatch)
    assert find_start(_config(tmp_path / "out"), _DATA) == (None, [])
    other = _save(_config(tmp_path / "other"), 5)
    resumed = _config(tmp_path / "out", resume=str(other))
    assert find_start(resumed, _DATA) == (other, [])


def test_a_restart_says_why_it_starts_afresh(tmp_path, monkeypatch):
    config = _config(tmp_path)
    os.truncate(_save(config, 9) / _FILE, 5)
    _restart(monkeypatch)
    found, notes = find_start(config, _DATA)
    assert found is None
    assert notes[0].startswith("Skipped: ")


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = _save(_config(tmp_path), 9)
    for resume in ("newest", "auto", str(path)):
        config = _config(tmp_path, resume=resume, seed=3)
        with pytest.raises(ValueError, match="another run: seed is 0 there and 3 here"):
            find_start(config, _DATA)
