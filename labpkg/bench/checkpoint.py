"""Checkpoints against a plain copy of as many bytes; what asynchronous ones cost.

A GPT and its AdamW are saved by data-parallel ranks, each about an equal part, and
loaded by all of them, whole. Per rank that is to be held against copying a file of as
many bytes as it saves and flushing it to the disk. All files are read from memory of
the system, since they were just written. The peer is `torch.distributed.checkpoint`
with its own files, which it flushes, too, but neither checks nor renames.

An asynchronous save stalls training until the state is copied. That is held against a
training step of the same model; the thread that writes then takes some of the time of
a core, which a rank on a GPU does not need.

Chapters: runs/checkpointing, planning/measuring.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from labpkg.bench.measure import Sample, alternate, compare
from labpkg.bench.steps import LARGE, SMALL
from labpkg.foundations.losses import cross_entropy
from labpkg.foundations.models import GPT
from labpkg.foundations.optimizers import AdamW
from labpkg.parallelism.data_parallel import DataParallel
from labpkg.processes.mesh import make_mesh
from labpkg.processes.world import World
from labpkg.runs.agreement import own_rank
from labpkg.runs.checkpoint import PendingSave, load_checkpoint, save_checkpoint

BASE = "file copy, flushed"
STEP = "training step"

_NUM_RANKS = 2
_CHUNK_BYTES = 2**20


def rows(*, quick: bool = False) -> list[dict[str, Any]]:
    """Measure saving and loading by 2 ranks on the CPU, in the folder for temporaries.

    Args:
        quick: A small model and few rounds: the form of the answer, not its numbers.

    Returns:
        Rows as in `labpkg.bench.run`, milliseconds per call, with `gb_per_s`: bytes of
        the checkpoint per rank and second; None for the step and what it is stalled.
    """
    with World(_NUM_RANKS, device="cpu", timeout_s=None) as world:
        with tempfile.TemporaryDirectory() as folder:
            samples, num_bytes = world.run(_measure_files, Path(folder), quick)[0]
        with tempfile.TemporaryDirectory() as folder:
            stalls = world.run(_measure_stalls, Path(folder), quick)[0]
    size = f"{num_bytes / 2**20:.1f} MiB a rank"
    found = compare(samples, base=BASE, config=f"{_NUM_RANKS} ranks, {size}")
    for row in found:
        row["gb_per_s"] = num_bytes / row["value"] * 1e3 / 1e9
    config = f"{_NUM_RANKS} ranks, {size}: what stalls training"
    stalled = compare(stalls, base=STEP, config=config)
    return found + [{**row, "gb_per_s": None} for row in stalled]


def _trained(quick: bool) -> tuple[DataParallel, Optimizer, Callable[[], object]]:
    """Return a model, its optimizer after a step, and a step."""
    config = SMALL if quick else LARGE
    mesh = make_mesh(dp=_NUM_RANKS)["dp"]
    model = DataParallel(GPT(config), mesh)
    optimizer = AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(config.vocab_size, (4, config.sequence_length + 1))

    def step() -> None:
        cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return model, optimizer, step


def _measure_files(folder: Path, quick: bool) -> tuple[dict[str, list[Sample]], int]:
    model, optimizer, _ = _trained(quick)
    weights = sum(p.nbytes for p in model.parameters())
    num_bytes = 3 * weights // _NUM_RANKS  # with both moments of Adam
    both = {"model": model, "optimizer": optimizer}
    path = save_checkpoint(folder, step=0, **both)
    by_torch = folder / "torch"
    variants = {
        BASE: _copying(folder / f"copied-{own_rank()}", num_bytes),
        "labpkg:save": lambda: save_checkpoint(folder, step=0, **both),
        "labpkg:load": lambda: load_checkpoint(path, **both),
        "torch:save": lambda: _save_by_torch(by_torch, model, optimizer),
        "torch:load": lambda: _load_by_torch(by_torch, model, optimizer),
    }
    variants["torch:save"]()
    rounds, most = (2, 2) if quick else (12, 36)
    samples = alternate(
        variants, num_rounds=rounds, max_rounds=most, warm_up=1, sample_s=0.0
    )
    return samples, num_bytes


def _copying(source: Path, num_bytes: int) -> Callable[[], None]:
    """Return a call that copies a file as plainly as can be, and flushes the copy."""
    source.write_bytes(os.urandom(num_bytes))
    target, buffer = source.with_suffix(".copy"), bytearray(_CHUNK_BYTES)

    def copy() -> None:
        target.unlink(missing_ok=True)
        with open(source, "rb", buffering=0) as a, open(target, "xb", buffering=0) as b:
            while n := a.readinto(buffer):
                b.write(memoryview(buffer)[:n])
            os.fsync(b.fileno())

    return copy


def _state_for_torch(model: DataParallel, optimizer: Optimizer) -> dict[str, Any]:
    # By names: numbers of parameters would come back as text, beside the old ones.
    found = get_state_dict(model.module, optimizer)
    return dict(zip(("model", "optimizer"), found, strict=True))


def _save_by_torch(path: Path, model: DataParallel, optimizer: Optimizer) -> None:
    with warnings.catch_warnings(action="ignore"):  # what it says of its own parts
        writer = dcp.FileSystemWriter(path, overwrite=True)
        dcp.save(_state_for_torch(model, optimizer), storage_writer=writer)


def _load_by_torch(path: Path, model: DataParallel, optimizer: Optimizer) -> None:
    state = _state_for_torch(model, optimizer)
    with warnings.catch_warnings(action="ignore"):
        dcp.load(state, storage_reader=dcp.FileSystemReader(path))
    set_state_dict(
        model.module,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


def _measure_stalls(folder: Path, quick: bool) -> dict[str, list[Sample]]:
    """Time steps, and calls that begin to save; writing ends before the next sample."""
    model, optimizer, step = _trained(quick)
    pending: list[PendingSave] = []

    def begin() -> None:
        both = {"model": model, "optimizer": optimizer}
        pending.append(save_checkpoint(folder, step=0, **both, asynchronous=True))

    def finish() -> None:
        while pending:
            pending.pop().wait()

    # The first save takes memory, which the later ones take over.
    return alternate(
        {STEP: step, "labpkg:asynchronous save": begin},
        num_rounds=2 if quick else 14,
        max_rounds=2 if quick else 42,
        warm_up=1,
        sample_s=0.0,
        settle=finish,
    )
