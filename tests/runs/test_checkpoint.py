"""A checkpoint is complete and verified, or it is refused in one line."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import labpkg as lab
from labpkg.runs import checkpoint_files
from labpkg.runs.checkpoint import (
    clean_up,
    newest_checkpoint,
    verify_checkpoint,
)
from labpkg.runs.random_states import random_state, set_random_state

_GPT = lab.GPTConfig(num_layers=1, width=8, num_heads=2, sequence_length=4)
# Where replacing a step can be broken off: at the first rename, at the second, at the
# removal of what was replaced.
_REPLACING = [(Path, "rename", 1), (Path, "rename", 2), (shutil, "rmtree", 1)]


def _trained(seed=0, steps=2):
    torch.manual_seed(seed)
    model = lab.GPT(_GPT)
    optimizer = lab.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        _step(model, optimizer)
    return model, optimizer


def _step(model, optimizer):
    tokens = torch.randint(256, (2, 4))
    lab.cross_entropy(model(tokens), tokens).backward()
    optimizer.step()
    optimizer.zero_grad()


def _save(folder, step=7, **trained):
    model, optimizer = _trained(**trained)
    path = lab.save_checkpoint(
        folder, step=step, model=model, optimizer=optimizer, identity={"lr": 0.01}
    )
    return path, model, optimizer


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_loaded_run_goes_on_bit_by_bit(tmp_path):
    path, model, optimizer = _save(tmp_path)
    assert path == tmp_path / "step_000007"
    _step(model, optimizer)
    other, other_optimizer = _trained(seed=1, steps=1)
    manifest = lab.load_checkpoint(path, model=other, optimizer=other_optimizer)
    assert (manifest.step, manifest.identity) == (7, {"lr": 0.01})
    _step(other, other_optimizer)  # the same random tokens: the generator came along
    assert _equal(model.parameters(), other.parameters())


def test_weights_are_plain_safetensors_with_tied_parameters_once(tmp_path):
    path, model, _ = _save(tmp_path)
    weights = safetensors.torch.load_file(path / "model-00000-0.safetensors")
    assert "head.output.weight" not in weights
    fresh = lab.GPT(_GPT)
    safetensors.torch.load_model(fresh, path / "model-00000-0.safetensors")
    assert _equal(model.parameters(), fresh.parameters())


def test_a_transposed_parameter_is_saved(tmp_path):
    model = nn.Linear(3, 4)
    model.weight = nn.Parameter(torch.randn(3, 4).t())
    optimizer = lab.SGD(model.parameters(), lr=0.1)
    path = lab.save_checkpoint(tmp_path, step=1, model=model, optimizer=optimizer)
    fresh = nn.Linear(3, 4)
    lab.load_checkpoint(path, model=fresh)
    assert _equal(model.parameters(), fresh.parameters())


def test_a_gpu_that_the_run_does_not_use_is_left_alone(tmp_path, monkeypatch):
    touched = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: touched.append("get"))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda _: touched.append("set"))
    state = random_state()
    assert "cuda" not in state
    set_random_state({**state, "cuda": state["cpu"]})  # saved by a run on a GPU
    assert touched == []


def test_loading_weights_alone_leaves_the_generator(tmp_path):
    path, model, _ = _save(tmp_path)
    fresh = lab.GPT(_GPT)
    before = torch.get_rng_state()
    lab.load_checkpoint(path, model=fresh)
    assert torch.equal(before, torch.get_rng_state())
    assert _equal(model.parameters(), fresh.parameters())


def test_another_model_or_optimizer_is_refused_and_nothing_changes(tmp_path):
    path, _, _ = _save(tmp_path)
    wide = lab.GPT(
        lab.GPTConfig(num_layers=1, width=12, num_heads=2, sequence_length=4)
    )
    with pytest.raises(
        ValueError, match=r"another model: embedding.tokens.weight is \("
    ):
        lab.load_checkpoint(path, model=wide)
    with pytest.raises(ValueError, match=r"0.weight is missing there and \(3, 2\)"):
        lab.load_checkpoint(path, model=nn.Sequential(nn.Linear(2, 3)))
    model, _ = _trained(seed=5)
    before = [p.detach().clone() for p in model.parameters()]
    sgd = lab.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the state of AdamW, which SGD cannot use"):
        lab.load_checkpoint(path, model=model, optimizer=sgd)
    assert _equal(before, model.parameters())


def _truncate(path, name):
    os.truncate(path / name, os.path.getsize(path / name) // 2)


def _flip_a_bit(path, name):
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 4
    (path / name).write_bytes(content)


_FILES = (
    "model-00000-0.safetensors",
    "training-00000-0.safetensors",
    "manifest.json",
)


@pytest.mark.parametrize("name", _FILES)
@pytest.mark.parametrize(
    "damage",
    [_truncate, _flip_a_bit, lambda path, name: (path / name).unlink()],
    ids=["truncated", "bit-flipped", "missing"],
)
def test_damage_is_found_in_every_file(tmp_path, name, damage):
    path, model, optimizer = _save(tmp_path)
    damage(path, name)
    with pytest.raises(ValueError, match="is not a usable checkpoint: ") as caught:
        lab.load_checkpoint(path, model=model, optimizer=optimizer)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_bit_of_the_manifest_counts(tmp_path):
    path = lab.save_checkpoint(tmp_path, step=7, model=lab.MLP(2, 2))
    original = (path / "manifest.json").read_bytes()
    for position in range(0, len(original), 7):
        content = bytearray(original)
        content[position] ^= 1
        if json_equal(content, original):
            continue  # white space: the same manifest
        (path / "manifest.json").write_bytes(content)
        with pytest.raises(ValueError, match="not a usable checkpoint"):
            verify_checkpoint(path)


def json_equal(a, b):
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, 2]", "damaged or foreign"),
        (b"3", "damaged or foreign"),
        (b'{"format": "pickle"}', "its format is 'pickle'"),
        (b'{"format": "labpkg-checkpoint", "version": 99}', "it has version 99"),
        (b'{"format": "labpkg-checkpoint", "version": 2}', "its checksum differs"),
    ],
)
def test_foreign_folders_are_refused(tmp_path, content, message):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        verify_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/dev/zero", "a/b"])
def test_a_manifest_leads_nowhere_else(tmp_path, name):
    path = lab.save_checkpoint(tmp_path, step=1, model=nn.Linear(1, 1))
    manifest = checkpoint_files.read_manifest(path)
    checkpoint_files.write_manifest(path, replace(manifest, files={name: {}}))
    with pytest.raises(ValueError, match=f"names '{name}', which is not a file"):
        verify_checkpoint(path)


def test_a_manifest_lacks_nothing(tmp_path):
    fields = {"format": checkpoint_files.FORMAT, "version": checkpoint_files.VERSION}
    fields["sha256"] = checkpoint_files._sha256(fields)
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"manifest\.json lacks 'step'"):
        verify_checkpoint(tmp_path)


@pytest.mark.parametrize("step", [-1, 2.5, "3"])
def test_a_step_is_a_number_of_steps(tmp_path, step):
    with pytest.raises(ValueError, match=f"step={step!r} is no number of steps"):
        lab.save_checkpoint(tmp_path, step=step, model=nn.Linear(1, 1))
    assert os.listdir(tmp_path) == []


def test_the_newest_valid_checkpoint_is_found_and_the_others_explained(tmp_path):
    assert newest_checkpoint(tmp_path / "none") == (None, [])
    for step in (9, 1_000_000, 10):
        _save(tmp_path, step=step)
    assert newest_checkpoint(tmp_path) == (tmp_path / "step_1000000", [])
    _flip_a_bit(tmp_path / "step_1000000", "training-00000-0.safetensors")
    found, skipped = newest_checkpoint(tmp_path)
    assert found == tmp_path / "step_000010"
    assert len(skipped) == 1
    assert "step_1000000 is not a usable checkpoint: training-0" in skipped[0]


def test_saving_a_step_again_replaces_it(tmp_path):
    _save(tmp_path, seed=1)
    path, model, _ = _save(tmp_path, seed=2)
    fresh = lab.GPT(_GPT)
    lab.load_checkpoint(path, model=fresh)
    assert _equal(model.parameters(), fresh.parameters())
    assert os.listdir(tmp_path) == ["step_000007"]


class _Killed(BaseException):
    """Ends the process as a signal would: nothing catches it."""


def _nth_call(n, function, error):
    """Return `function`, but its n-th call raises."""
    calls = []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) == n:
            raise error
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize(("owner", "name", "n"), _REPLACING)
def test_a_kill_while_a_step_is_replaced_leaves_a_checkpoint_to_find(
    tmp_path, monkeypatch, owner, name, n
):
    _save(tmp_path, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _nth_call(n, getattr(owner, name), _Killed()))
        with pytest.raises(_Killed):
            _save(tmp_path, seed=2)
    found, skipped = newest_checkpoint(tmp_path)
    assert found is not None
    assert skipped == []
    fresh = lab.GPT(_GPT)
    assert lab.load_checkpoint(found, model=fresh).step == 7
    clean_up(tmp_path)
    # The lock is still there, too, as after a kill: this process goes on to hold it.
    assert sorted(os.listdir(tmp_path)) == [".lock", "step_000007"]
    again = lab.GPT(_GPT)
    lab.load_checkpoint(tmp_path / "step_000007", model=again)
    assert _equal(fresh.parameters(), again.parameters())


_CALLS = [
    (os, name)
    for name in ("open", "write", "fsync", "close", "mkdir", "rename", "replace")
    + ("posix_fallocate",) * hasattr(os, "posix_fallocate")
]


class _Calls:
    """Counts what is asked of the file system, and ends the process at one of them."""

    def __init__(self, patch, last=None):
        self.count, self.last = 0, last
        for owner, name in _CALLS:
            patch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, function):
        def call(*args, **kwargs):
            self.count += 1
            if self.count == self.last:
                raise _Killed
            return function(*args, **kwargs)

        return call


def test_a_kill_at_any_moment_leaves_a_checkpoint_and_room_for_the_next(
    tmp_path, monkeypatch
):
    """Before each call to the file system, of a save that also replaces and removes."""
    models = [lab.MLP(2, 3) for _ in range(3)]

    def save(folder, number, step=7, keep=None):
        return lab.save_checkpoint(folder, step=step, model=models[number], keep=keep)

    def saved(folder):
        save(folder, 0, step=6)
        save(folder, 1)
        return folder

    with monkeypatch.context() as patch:
        folder, calls = saved(tmp_path / "all"), _Calls(patch)
        save(folder, 2, keep=1)
        assert os.listdir(folder) == ["step_000007"]
    assert calls.count > 15
    kept = []
    for last in range(1, calls.count + 1):
        folder = saved(tmp_path / str(last))
        with monkeypatch.context() as patch:
            _Calls(patch, last)
            with pytest.raises(_Killed):
                save(folder, 2, keep=1)
        found, skipped = newest_checkpoint(folder)
        assert found is not None
        assert skipped == []
        fresh = lab.MLP(2, 3)
        lab.load_checkpoint(found, model=fresh)
        kept += [
            n for n in (1, 2) if _equal(fresh.parameters(), models[n].parameters())
        ]
        save(folder, 0, keep=1)
        assert {p.name for p in folder.iterdir()} - {".lock"} == {"step_000007"}
    assert len(kept) == calls.count
    assert kept == sorted(kept)  # the older one up to some moment, then the new one
    assert {*kept} == {1, 2}


@pytest.mark.parametrize("n", [1, 2])
def test_a_step_that_cannot_be_replaced_stays(tmp_path, monkeypatch, n):
    path, model, _ = _save(tmp_path, seed=1)
    refused = OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(Path, "rename", _nth_call(n, Path.rename, refused))
    with pytest.raises(OSError, match="the older checkpoints are intact"):
        _save(tmp_path, seed=2)
    assert os.listdir(tmp_path) == ["step_000007"]
    fresh = lab.GPT(_GPT)
    lab.load_checkpoint(path, model=fresh)
    assert _equal(model.parameters(), fresh.parameters())


def _full_disk(fd, content):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_older_checkpoints_and_nothing_half_written(
    tmp_path, monkeypatch
):
    _save(tmp_path, step=1)
    monkeypatch.setattr(checkpoint_files.os, "write", _full_disk)
    with pytest.raises(OSError, match=r"cannot save .*step_000002: No space left") as e:
        _save(tmp_path, step=2)
    assert e.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["step_000001"]
    verify_checkpoint(tmp_path / "step_000001")


def test_what_a_killed_save_left_behind_is_ignored_and_removed(tmp_path):
    _save(tmp_path, step=1)
    partial = tmp_path / ".partial-step_000009"
    partial.mkdir()
    (partial / "manifest.json").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) == (tmp_path / "step_000001", [])
    _save(tmp_path, step=2)
    assert not partial.exists()
