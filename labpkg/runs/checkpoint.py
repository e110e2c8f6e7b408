"""Checkpoints: saved under any layout, loaded under any other, complete or not there.

Every rank writes pieces of what it holds and nobody ever holds the whole. A piece is a
box of a whole tensor, known by name and offsets, so a rank of another layout finds the
boxes that overlap its own; this is what `torch.distributed.checkpoint` does, and its
`HuggingFaceStorageReader` reads these files. Saved are model, optimizer, random states
of all ranks and what the run adds; the position in the data needs no file where a
batch is a function of (seed, step).

Contract: all ranks call. Saving writes beside, flushes and renames, so whatever breaks
off leaves the older checkpoints as they are. Loading verifies every byte before it
changes anything, and executes nothing: there is no pickle. What one rank refuses or
cannot do, all refuse.

Chapter: runs/checkpointing. References: Pillai et al. 2014, OSDI; Eisenman et al. 2022,
Check-N-Run, NSDI (asynchronous, verified).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

from torch import nn
from torch.optim import Optimizer

from labpkg.runs.agreement import (
    as_told,
    everyone,
    num_everyone,
    own_rank,
    raise_first,
)
from labpkg.runs.checkpoint_files import (
    Manifest,
    bad,
    read_manifest,
    verify_files,
)
from labpkg.runs.checkpoint_folder import (
    clean_up,
    list_checkpoints,
    newest_checkpoint,
    target_of,
    verify_checkpoint,
)
from labpkg.runs.checkpoint_load import Loading, Reader, check_fit
from labpkg.runs.checkpoint_lock import give_lock_back, take_lock
from labpkg.runs.checkpoint_save import (
    Part,
    PendingSave,
    Writing,
    cannot_save,
    staged,
)
from labpkg.runs.checkpoint_state import Inventory, Whole, decoded
from labpkg.runs.random_states import random_state, set_random_state

__all__ = [
    "Manifest",
    "PendingSave",
    "clean_up",
    "export_state_dict",
    "list_checkpoints",
    "load_checkpoint",
    "newest_checkpoint",
    "read_manifest",
    "save_checkpoint",
    "verify_checkpoint",
]

_PENDING = "_labpkg_pending_save"


@overload
def save_checkpoint(
    folder: str | os.PathLike[str],
    *,
    step: int,
    model: nn.Module,
    optimizer: Optimizer | None = ...,
    state: Any = ...,
    identity: Mapping[str, Any] | None = ...,
    keep: int | None = ...,
    asynchronous: Literal[False] = ...,
) -> Path: ...
@overload
def save_checkpoint(
    folder: str | os.PathLike[str],
    *,
    step: int,
    model: nn.Module,
    optimizer: Optimizer | None = ...,
    state: Any = ...,
    identity: Mapping[str, Any] | None = ...,
    keep: int | None = ...,
    asynchronous: Literal[True],
) -> PendingSave: ...
@overload
def save_checkpoint(
    folder: str | os.PathLike[str],
    *,
    step: int,
    model: nn.Module,
    optimizer: Optimizer | None = ...,
    state: Any = ...,
    identity: Mapping[str, Any] | None = ...,
    keep: int | None = ...,
    asynchronous: bool,
) -> Path | PendingSave: ...
def save_checkpoint(
    folder: str | os.PathLike[str],
    *,
    step: int,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    state: Any = None,
    identity: Mapping[str, Any] | None = None,
    keep: int | None = None,
    asynchronous: bool = False,
) -> Path | PendingSave:
    """Save a training state so that a run can go on bit by bit from it, on any layout.

    Each rank writes about an equal part: what several hold is written once. Beside
    model and optimizer the random generators of every rank are saved: torch's, those of
    Python and of NumPy.

    With `asynchronous` training stalls only while the state is copied to memory of the
    CPU; a thread writes it. The copy stays with the model for the next save, which
    waits for the one before. Python waits before it ends; a function of `World.run`
    calls `.wait()` before it returns.

    Args:
        folder: Where checkpoints are collected, on a disk that all hosts share; the new
            one is `folder/step_<six digits>` and replaces one of the same step.
        step: Optimizer steps done.
        model: A model under any engine. Its state is saved under the names of
            `state_dict`, tied parameters once.
        optimizer: Its state, by the names of the parameters.
        state: What else the run needs, such as {"loss_scale": 1024.0}: numbers,
            strings, tensors, and lists, tuples and dicts of such. Rank 0's counts.
        identity: JSON values that a run must share to resume from here.
        keep: Remove older checkpoints but for the newest `keep`, with this one; None
            keeps all.
        asynchronous: Return before it is written.

    Returns:
        The folder of the checkpoint, on every rank; a `PendingSave` if asynchronous.

    Raises:
        OSError: On every rank, if a rank cannot write; what is half-written is removed.
            An asynchronous save raises it in `wait`, or in the next save.
        ValueError: On every rank, if something cannot be saved, if an option is out of
            range, or if another process that runs saves into the folder.

    Communication: an `all_gather_object` of what each rank holds, and two of one word
    each at the end. The state itself does not travel.
    """
    earlier = vars(model).get(_PENDING)
    if earlier is not None and not earlier.is_over:
        earlier.wait()
    inventory, whole, owns_lock = _begin(
        folder, model, optimizer, state, {"step": step, "identity": identity}, keep
    )
    target, hidden = target_of(folder, step)
    parts: list[Part] = [
        (whole.tensors[piece.name].kind, piece, inventory.held[piece])
        for piece in whole.shared_out()[own_rank()]
    ]
    if asynchronous:
        parts = staged(parts, [] if earlier is None else earlier.writing.parts)
    writing = Writing(
        target=target,
        partial=hidden,
        parts=parts,
        manifest=partial(_manifest, whole, step, identity),
        num_ranks=len(whole.told),
        keep=keep,
        owns_lock=owns_lock,
    )
    pending = PendingSave(writing, asynchronous=asynchronous)
    if not asynchronous:
        return pending.wait()
    vars(model)[_PENDING] = pending
    return pending


def _begin(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None,
    state: Any,
    about: Mapping[str, Any],
    keep: int | None,
) -> tuple[Inventory, Whole, bool]:
    """Take the inventory and make the folder; all ranks do, or none."""
    inventory, error = None, None
    is_claimed = owns_lock = False
    try:
        _check_options(about, keep)
        inventory = Inventory(model, optimizer)
        inventory.told.random = inventory.encoded(
            random_state(), f"random/{own_rank()}"
        )
        if own_rank() == 0:
            inventory.told.state = inventory.encoded(state, "state")
            owns_lock = take_lock(folder)
            is_claimed = True
            clean_up(folder)
            target_of(folder, about["step"])[1].mkdir()
    except Exception as caught:  # also of a module's `get_extra_state`
        error = as_told(caught)
    told = None if inventory is None else inventory.told
    answers = everyone((error, about["step"], told))
    try:
        raise_first([error for error, _, _ in answers])
        _require_same_step([step for _, step, _ in answers])
        whole = Whole([told for _, _, told in answers if told is not None])
    except Exception as failure:
        if is_claimed:
            clean_up(folder)
        if owns_lock:
            give_lock_back(folder)
        if isinstance(failure, OSError):
            failure = cannot_save(target_of(folder, about["step"])[0], failure)
        raise failure from None
    assert inventory is not None
    return inventory, whole, owns_lock


def _require_same_step(steps: Sequence[int]) -> None:
    if {*steps} != {steps[0]}:
        raise ValueError(
            f"ranks save or load steps {steps}; call this with the same step on all"
        )


def _check_options(about: Mapping[str, Any], keep: int | None) -> None:
    step = about["step"]
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"step={step!r} is no number of steps; choose 0 or more")
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep} would keep nothing; choose 1 or more, or None")
    try:
        json.dumps(about)
    except TypeError as error:
        raise ValueError(
            f"identity={about['identity']!r} is not JSON ({error}); give numbers, "
            "strings, lists and dicts"
        ) from None


def _manifest(
    whole: Whole,
    step: int,
    identity: Mapping[str, Any] | None,
    files: dict[str, Any],
) -> Manifest:
    return Manifest(
        step=step,
        identity=dict(identity or {}),
        state=whole.told[0].state,
        world_size=len(whole.told),
        names=whole.names,
        tensors={n: [known.dtype, known.shape] for n, known in whole.tensors.items()},
        extras={n: v for told in whole.told for n, v in told.extras.items()},
        optimizer=whole.optimizer,
        random=[told.random for told in whole.told],
        files=files,
    )


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Optimizer | None = None,
) -> Manifest:
    """Verify a checkpoint, then put its state into a model and an optimizer.

    Layout and number of ranks may be others than those that saved. Each rank verifies
    some of the files and reads the boxes that it holds, no more. A rank that did not
    exist when it was saved keeps its own random state.

    Args:
        path: The folder of the checkpoint.
        model: Gets the weights, under any engine; names, shapes, dtypes and ties must
            agree.
        optimizer: Gets its state, with the same groups; None leaves it and the random
            state out, as for evaluation.

    Returns:
        The manifest; its `state` is what `save_checkpoint` was given.

    Raises:
        ValueError: On every rank, if the checkpoint is missing, foreign, damaged, of a
            newer version, or of another model or optimizer; nothing is changed then.

    Communication: an `all_gather_object` of what each rank holds, and two of an error
    or None.
    """
    path = Path(path)
    manifest, error, told = None, None, None
    try:
        manifest = read_manifest(path)
        _verify_share(path, manifest)
        told = Inventory(model, optimizer).told
    except Exception as caught:
        error = as_told(caught)
    answers = everyone((error, None if manifest is None else manifest.step, told))
    raise_first([error for error, _, _ in answers])
    assert manifest is not None
    _require_same_step([step for _, step, _ in answers if step is not None])
    whole = Whole([told for _, _, told in answers if told is not None])
    check_fit(path, manifest, whole, optimizer)
    loading, random = None, None
    try:
        loading = Loading(path, manifest, model, optimizer)
        if optimizer is not None:
            random = loading.random_state(own_rank())
    except Exception as caught:
        error = as_told(caught)
    raise_first(everyone(error))
    assert loading is not None
    loading.apply()
    if random is not None:
        set_random_state(random)
    return replace(manifest, state=loading.state)


def export_state_dict(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the `state_dict` of the whole model, without a model, in one process.

    Other tools read it: `model.load_state_dict(...)` of the plain model, or
    `safetensors.torch.save_model` after that.

    Args:
        path: The folder of the checkpoint.

    Returns:
        Tensors on the CPU by their names; tied ones are the same tensor.

    Raises:
        ValueError: If the checkpoint is missing, foreign or damaged.
    """
    manifest = verify_checkpoint(path)
    reader = Reader(Path(path), manifest)
    wholes = {name: reader.whole(name) for name in {*manifest.names.values()}}
    tensors = {name: wholes[saved_as] for name, saved_as in manifest.names.items()}
    return tensors | decoded(manifest.extras, reader.whole)


def _verify_share(path: Path, manifest: Manifest) -> None:
    """Verify some of the files; together the ranks verify all."""
    num_ranks, files = num_everyone(), manifest.files
    by_size = sorted(files, key=lambda name: -files[name]["bytes"])
    own = by_size[own_rank() :: num_ranks]
    damage = verify_files(path, {name: files[name] for name in own})
    if damage is not None:
        raise bad(path, damage)
