"""Several ranks save and load one checkpoint; what one cannot do, none does."""

import errno
import os
import random
import resource
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

import labpkg as lab
from labpkg.runs import checkpoint_files, checkpoint_save
from labpkg.runs.checkpoint import (
    export_state_dict,
    load_checkpoint,
    newest_checkpoint,
    read_manifest,
    save_checkpoint,
    verify_checkpoint,
)

STATE = {"loss_scale": 2.0**16, "seen": (3, [None, True]), "mean": torch.arange(3.0)}


class Net(nn.Module):
    """Tied, frozen, empty and unused parameters, buffers, and a state of its own."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 10, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        self.empty = nn.Parameter(torch.ones(0, 4))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.head(self.norm(self.embed(x)))

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def trained(seed=0):
    """Return a sharded model and its optimizer after a step."""
    mesh = lab.make_mesh(dp=dist.get_world_size())["dp"]
    torch.manual_seed(seed)
    model = lab.fully_shard(Net(), mesh)
    optimizer = lab.AdamW(model.parameters(), lr=0.1)
    learn(model, optimizer)
    return model, optimizer


def learn(model, optimizer):
    x = torch.arange(10) if dist.get_rank() == 0 else torch.arange(5)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(model, optimizer):
    return lab.full_state_dict(model), lab.full_state_dict(optimizer)


def raised(kind, call, *args, **kwargs):
    """Return what a call raises on this rank."""
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    return f"{type(caught.value).__name__}: {caught.value}"


def draw():
    return torch.rand(2).tolist(), random.random(), np.random.rand()


def save_and_go_on(folder):
    """Save; return what was saved, and what comes after, drawn by each rank alone."""
    model, optimizer = trained()
    for seeded in (torch.manual_seed, random.seed, np.random.seed):
        seeded(dist.get_rank())
    saved = whole(model, optimizer)
    before = torch.get_rng_state()
    path = save_checkpoint(
        folder,
        step=1,
        model=model,
        optimizer=optimizer,
        state=STATE if dist.get_rank() == 0 else None,
        identity={"lr": 0.1},
    )
    assert torch.equal(before, torch.get_rng_state())  # saving draws nothing
    drawn = draw()
    learn(model, optimizer)
    return path, saved, drawn, whole(model, optimizer)


def resume(path):
    model, optimizer = trained(seed=1)
    manifest = load_checkpoint(path, model=model, optimizer=optimizer)
    loaded = whole(model, optimizer)
    drawn = draw()
    learn(model, optimizer)
    return manifest, loaded, drawn, whole(model, optimizer), model.calls


@pytest.fixture(scope="module")
def saved(world2, tmp_path_factory):
    """What two ranks have saved; tests change copies of it only."""
    return world2.run(save_and_go_on, tmp_path_factory.mktemp("ranks"))


def without_statistics(states):
    weights, state = states
    return {n: t for n, t in weights.items() if "running" not in n}, state


def assert_same(found, expected):
    for state, other in zip(found, expected, strict=True):
        torch.testing.assert_close(dict(state), dict(other), rtol=0, atol=0)


def test_ranks_go_on_bit_by_bit_each_with_its_own_random_numbers(saved, world2):
    path = saved[0][0]
    for rank, (manifest, loaded, drawn, after, calls) in enumerate(
        world2.run(resume, path)
    ):
        _, _, expected, later = saved[rank]
        assert_same(loaded, saved[0][1])  # buffers, too, which were others on rank 1
        assert drawn == expected
        assert_same(without_statistics(after), without_statistics(later))
        if rank == 0:
            assert_same(after, later)
        assert (manifest.step, manifest.identity) == (1, {"lr": 0.1})
        assert manifest.world_size == 2
        assert calls == 2
        torch.testing.assert_close(manifest.state, STATE, rtol=0, atol=0)
    assert saved[0][2] != saved[1][2]


def test_no_rank_writes_what_another_has_written(saved):
    path, (weights, _), *_ = saved[0]
    files = read_manifest(path).files
    elements = {}
    for name in files:
        for key, tensor in safetensors.torch.load_file(path / name).items():
            elements[key] = elements.get(key, 0) + tensor.numel()
    for name, tensor in weights.items():
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            is_tied = name == "head.weight"
            assert elements.get(name) == (None if is_tied else tensor.numel()), name
    sizes = [
        sum(file["bytes"] for name, file in files.items() if f"-{rank:05d}-" in name)
        for rank in range(2)
    ]
    assert max(sizes) < 1.2 * min(sizes)


def test_export_needs_neither_model_nor_ranks(saved):
    path, (weights, _), *_ = saved[0]
    exported = export_state_dict(path)
    assert exported["head.weight"] is exported["embed.weight"]
    torch.testing.assert_close(exported, dict(weights), rtol=0, atol=0)
    Net().load_state_dict(exported)


def test_torch_reads_the_files_by_itself(saved):
    path, (weights, _), *_ = saved[0]
    wanted = {n: torch.zeros_like(t) for n, t in weights.items() if n == "embed.weight"}
    reader = dcp.HuggingFaceStorageReader(str(path))
    with pytest.warns(UserWarning, match="assuming the intent is to load"):
        dcp.load(wanted, storage_reader=reader)
    assert torch.equal(wanted["embed.weight"], weights["embed.weight"])


def test_one_process_loads_what_two_ranks_have_saved(saved):
    path, (weights, state), *_ = saved[0]
    model = Net()
    optimizer = lab.AdamW(model.parameters(), lr=0.7)
    load_checkpoint(path, model=model, optimizer=optimizer)
    assert_same(
        (model.state_dict(), optimizer.state_dict()["state"]), (weights, state["state"])
    )
    assert optimizer.param_groups[0]["lr"] == 0.1


# ---- refusals, on every rank -------------------------------------------------------


def refuse_loading(paths, good):
    """Return what each rank raises for each bad checkpoint; nothing may change."""
    model, optimizer = trained(seed=2)
    before, generator = whole(model, optimizer), torch.get_rng_state()
    found = [
        raised(ValueError, load_checkpoint, path, model=model, optimizer=optimizer)
        for path in paths
    ]
    assert torch.equal(generator, torch.get_rng_state())
    sgd = lab.SGD(model.parameters(), lr=0.1)
    found.append(raised(ValueError, load_checkpoint, good, model=model, optimizer=sgd))
    groups = lab.param_groups(model, weight_decay=0.1)
    other = lab.AdamW(groups, lr=0.1)
    found.append(
        raised(ValueError, load_checkpoint, good, model=model, optimizer=other)
    )
    mesh = lab.make_mesh(dp=2)["dp"]
    wide = lab.fully_shard(Net(7), mesh)
    found.append(raised(ValueError, load_checkpoint, good, model=wide))
    untied = Net()
    untied.head.weight = nn.Parameter(torch.zeros(10, 6))
    found.append(raised(ValueError, load_checkpoint, good, model=untied))
    assert_same(whole(model, optimizer), before)
    return found


def damaged(path, folder, name, damage):
    copy = folder / f"{name}-{damage.__name__}" / path.name
    shutil.copytree(path, copy)
    damage(copy / name)
    return copy


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 16
    file.write_bytes(content)


def remove(file):
    file.unlink()


def make_newer(file):
    file.write_text(file.read_text().replace('"version": 2', '"version": 3'))


def test_all_ranks_refuse_alike_and_nothing_changes(saved, world2, tmp_path):
    path = saved[0][0]
    files = sorted(read_manifest(path).files)
    bad = [damaged(path, tmp_path, name, truncate) for name in files]
    bad += [damaged(path, tmp_path, name, flip_a_bit) for name in files]
    bad += [damaged(path, tmp_path, files[-1], remove)]
    bad += [damaged(path, tmp_path, "manifest.json", make_newer), tmp_path / "none"]
    one, other = world2.run(refuse_loading, bad, path)
    assert one == other
    for line, name in zip(one, [*files, *files, files[-1]], strict=False):
        assert f"is not a usable checkpoint: {name} " in line
        assert line.startswith("ValueError: ")
        assert "\n" not in line
    newer, missing, kind, groups, wide, untied = one[len(bad) - 2 :]
    assert "it has version 3, and this labpkg reads 2" in newer
    assert "manifest.json cannot be read" in missing
    assert "the state of AdamW, which SGD cannot use" in kind
    assert "an optimizer of 1 groups, here it has 2" in groups
    assert (
        "another model: embed.weight is (10, 6) torch.float32 there and (10, 7)" in wide
    )
    assert "embed.weight is tied (embed.weight, head.weight) there and not" in untied


def full_disk(fd, data):
    raise OSError(errno.ENOSPC, "No space left on device")


def refuse_saving(folder):
    """Return what each rank raises when something is wrong on one of them."""
    rank, found, patch = dist.get_rank(), [], pytest.MonkeyPatch()
    model, optimizer = trained()
    good = {"model": model, "optimizer": optimizer}
    save_checkpoint(folder, step=1, **good)
    for asynchronous in (False, True):
        with patch.context() as context:
            if rank == 1:
                context.setattr(checkpoint_files.os, "write", full_disk)
            if asynchronous:
                pending = save_checkpoint(folder, step=2, asynchronous=True, **good)
                found.append(raised(OSError, pending.wait))
                assert not pending.done
            else:
                found.append(raised(OSError, save_checkpoint, folder, step=2, **good))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:  # the system itself refuses
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    found.append(raised(OSError, save_checkpoint, folder, step=2, **good))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with patch.context() as context:  # only the rank that writes the manifest
        context.setattr(checkpoint_save, "write_manifest", full_disk)
        found.append(raised(OSError, save_checkpoint, folder, step=2, **good))
    # The next save tells of the one before.
    with patch.context() as context:
        if rank == 1:
            context.setattr(checkpoint_files.os, "write", full_disk)
        save_checkpoint(folder, step=2, asynchronous=True, **good)
        found.append(raised(OSError, save_checkpoint, folder, step=3, **good))
    identity = {"who": {1}} if rank == 0 else {}
    found.append(
        raised(ValueError, save_checkpoint, folder, step=2, identity=identity, **good)
    )
    found.append(raised(ValueError, save_checkpoint, folder, step=2, keep=0, **good))
    state = {"hook": print}
    found.append(
        raised(ValueError, save_checkpoint, folder, step=2, state=state, **good)
    )
    stranger = lab.SGD([nn.Parameter(torch.ones(rank + 1))], lr=0.1)
    found.append(
        raised(
            ValueError, save_checkpoint, folder, step=2, model=model, optimizer=stranger
        )
    )
    found.append(raised(ValueError, save_checkpoint, folder, step=5 + rank, **good))
    with patch.context() as context:
        if rank == 1:
            context.setattr(model, "get_extra_state", {}.popitem)
        for call in (save_checkpoint, load_checkpoint):
            where = {"step": 2} if call is save_checkpoint else {}
            place = folder / "step_000001" if call is load_checkpoint else folder
            found.append(raised(RuntimeError, call, place, **where, **good))
    seen = sorted(os.listdir(folder))
    save_checkpoint(folder, step=4, **good)
    return found, seen


def test_a_save_that_fails_on_one_rank_fails_on_all_and_leaves_nothing(
    world2, tmp_path
):
    (one, seen), (other, _) = world2.run(refuse_saving, tmp_path)
    assert one == other
    assert seen == ["step_000001"]
    assert "step_000002: File too large; the older checkpoints" in one.pop(2)
    for line in one[:4]:
        assert line.startswith("OSError: cannot save ")
        assert "step_000002: No space left on device; the older checkpoints" in line
    identity, keep, state, stranger, steps, *broken = one[4:]
    assert "is not JSON" in identity
    assert "keep=0 would keep nothing" in keep
    assert "state/hook is a builtin_function_or_method, which" in state
    assert "ranks save or load steps [5, 6]; call this with the same" in steps
    for line in broken:
        assert line.startswith("RuntimeError: KeyError: 'popitem(): dictionary is em")
    assert len(broken) == 2
    assert "has a parameter of shape (1,) that the model does not have" in stranger
    found, skipped = newest_checkpoint(tmp_path)
    assert (found, skipped) == (tmp_path / "step_000004", [])


# ---- asynchronous ------------------------------------------------------------------


def train_while_saving(folder):
    """Save, hold the writing up, train on; return what should be there."""
    model, optimizer = trained()
    may_write = threading.Event()
    write, patch = os.write, pytest.MonkeyPatch()

    def held_up(fd, data):
        if threading.current_thread().name == "labpkg-save":
            assert may_write.wait(30)
        return write(fd, data)

    expected = []
    with patch.context() as context:
        context.setattr(checkpoint_files.os, "write", held_up)
        for step in (1, 2):
            expected.append(whole(model, optimizer))
            pending = save_checkpoint(
                folder, step=step, model=model, optimizer=optimizer, asynchronous=True
            )
            if step == 1:  # the second save waits for the first
                assert not pending.done
                assert not pending.path.exists()
                may_write.set()
            learn(model, optimizer)
        assert (folder / "step_000001").exists()
        assert pending.wait() == pending.wait() == folder / "step_000002"
        assert pending.done
    memory = [t.data_ptr() for _, _, t in pending.writing.parts]
    pending = save_checkpoint(
        folder, step=3, model=model, optimizer=optimizer, asynchronous=True, keep=2
    )
    again = [t.data_ptr() for _, _, t in pending.writing.parts]
    assert sorted(memory) == sorted(again)  # the memory is used again
    pending.wait()
    return expected


def test_training_goes_on_while_a_checkpoint_is_written(world2, tmp_path):
    expected = world2.run(train_while_saving, tmp_path)[0]
    assert sorted(os.listdir(tmp_path)) == ["step_000002", "step_000003"]
    model = Net()
    optimizer = lab.AdamW(model.parameters(), lr=0.1)
    load_checkpoint(tmp_path / "step_000002", model=model, optimizer=optimizer)
    found = model.state_dict(), optimizer.state_dict()
    assert_same(found, expected[1])
    verify_checkpoint(tmp_path / "step_000003")


def leave_at_once(folder, step):
    model, optimizer = trained()
    save_checkpoint(
        folder, step=step, model=model, optimizer=optimizer, asynchronous=True
    )
    # No wait: the ranks end, as if they were killed.


def test_a_save_that_nobody_waited_for_is_complete_or_not_there(world2, tmp_path):
    for step in range(2):
        world2.run(leave_at_once, tmp_path, step)
        found, skipped = newest_checkpoint(tmp_path)
        assert skipped == []
        assert found in (None, *(tmp_path / f"step_{s:06d}" for s in range(2)))
    lab.save_checkpoint(tmp_path, step=9, model=lab.MLP(2, 2))  # the lock is stale
    assert {path.name[:5] for path in Path(tmp_path).iterdir()} == {"step_"}
