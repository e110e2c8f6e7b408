"""Writing a checkpoint: each rank its files, the first rank the rest.

# Note [a thread sends nothing]
An asynchronous save writes in a thread while training goes on. A thread must not
communicate: its collectives would mix with those of training. So each rank leaves a
note beside its files once they are on the disk, and the first rank, which sees all
notes, makes the checkpoint visible. `PendingSave.wait` then lets the ranks agree on
how it ended.

Chapter: runs/checkpointing.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from labpkg.runs.agreement import as_told, everyone, own_rank
from labpkg.runs.checkpoint_files import (
    Manifest,
    Piece,
    write_manifest,
    write_tensors,
)
from labpkg.runs.checkpoint_folder import clean_up, put_in_place, retire
from labpkg.runs.checkpoint_lock import give_lock_back

_POLL_S = 0.02
_PATIENCE_S = 60.0  # until notes of other hosts are seen that are written for certain

Part = tuple[str, Piece, Tensor]  # kind of file, what it is, and its elements


@dataclass(frozen=True, kw_only=True, slots=True)
class Writing:
    """What a rank has to write.

    Attributes:
        target: The checkpoint.
        partial: Where it is until it is complete.
        parts: What this rank writes.
        manifest: Makes the manifest, given the files; the first rank calls it.
        num_ranks: Ranks that write.
        keep: How many checkpoints stay; None keeps all.
        owns_lock: Whether the folder was claimed for this save alone.
    """

    target: Path
    partial: Path
    parts: list[Part]
    manifest: Callable[[dict[str, Any]], Manifest]
    num_ranks: int
    keep: int | None
    owns_lock: bool

    def write_own(self) -> None:
        """Write the files of this rank, and the note that they are complete.

        Raises:
            OSError: If something cannot be written.
        """
        self.partial.mkdir(exist_ok=True)  # another host may not see it yet
        files: dict[str, list[tuple[Piece, Tensor]]] = {}
        seen: dict[str, int] = {}
        for kind, piece, tensor in self.parts:
            k = seen[piece.name] = seen.get(piece.name, -1) + 1
            name = f"{kind}-{own_rank():05d}-{k}.safetensors"
            files.setdefault(name, []).append((piece, tensor))
        entries = {n: write_tensors(self.partial / n, p) for n, p in files.items()}
        # Not flushed: after a crash of the machine nobody asks for it.
        self._hidden_note(own_rank()).write_text(json.dumps(entries))
        os.replace(self._hidden_note(own_rank()), self._note(own_rank()))

    def complete(self, may_wait: threading.Event, must_end: threading.Event) -> None:
        """Make the checkpoint visible once all ranks have written; the first rank does.

        Args:
            may_wait: Set while ranks may still be writing.
            must_end: Set when there is nothing to wait for.

        Raises:
            OSError: If something cannot be written or removed.
        """
        last_call = None
        while missing := [r for r in range(self.num_ranks) if not self._is_noted(r)]:
            if must_end.is_set():
                return
            if not may_wait.is_set() or not threading.main_thread().is_alive():
                last_call = last_call or time.monotonic() + _PATIENCE_S
                if time.monotonic() > last_call:
                    raise OSError(
                        f"what ranks {missing} have written does not appear in "
                        f"{self.partial} on the host of rank 0; save to a folder that "
                        "all hosts share"
                    )
            time.sleep(_POLL_S)
        files: dict[str, Any] = {}
        for rank in range(self.num_ranks):
            files |= json.loads(self._note(rank).read_bytes())
            self._note(rank).unlink()
        write_manifest(self.partial, self.manifest(files))
        put_in_place(self.partial, self.target)
        if self.keep is not None:
            retire(self.target, self.keep)

    def end(self) -> None:
        """Remove what is not complete, and let others write; the first rank does."""
        with suppress(OSError):
            clean_up(self.target.parent)
        if self.owns_lock:
            give_lock_back(self.target.parent)

    def _note(self, rank: int) -> Path:
        return self.partial / f"written-{rank:05d}.json"

    def _hidden_note(self, rank: int) -> Path:
        return self.partial / f".written-{rank:05d}.json"

    def _is_noted(self, rank: int) -> bool:
        return self._note(rank).exists()


class PendingSave:
    """A checkpoint that is being written while training goes on.

    Made by `save_checkpoint(..., asynchronous=True)` on every rank.

    Args:
        writing: What this rank has to write; it must not change meanwhile.
        asynchronous: Write in a thread, else before this returns.

    Attributes:
        path: The folder of the checkpoint.
        is_over: Whether `wait` has returned or raised.
    """

    def __init__(self, writing: Writing, *, asynchronous: bool) -> None:
        self.path = writing.target
        self.writing = writing
        self._is_first = own_rank() == 0
        self._may_wait, self._must_end = threading.Event(), threading.Event()
        self._has_written = threading.Event()
        self._error: BaseException | None = None  # of writing
        self._failure: BaseException | None = None  # of the whole
        self.is_over = False
        self._thread: threading.Thread | None = None
        if asynchronous:
            self._may_wait.set()
            # Python waits for it before it ends.
            self._thread = threading.Thread(target=self._write, name="labpkg-save")
            self._thread.start()
        else:
            self._write_own()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # a model that is copied is not being saved

    @property
    def done(self) -> bool:
        """Whether the checkpoint is complete on the disk; no other rank is asked."""
        if self.is_over:
            return self._failure is None
        return self.path.exists() and not self.writing.partial.exists()

    def wait(self) -> Path:
        """Wait until the checkpoint is complete, on every rank.

        Returns:
            The folder of the checkpoint.

        Raises:
            OSError: On every rank, if a rank could not write; what is half-written is
                removed, and the older checkpoints stay.

        Communication: two `all_gather_object` of an error or None.
        """
        if not self.is_over:
            self._has_written.wait()
            errors = everyone(self._error)
            self._may_wait.clear()
            if any(errors):
                self._must_end.set()
            if self._thread is not None:
                self._thread.join()
            elif self._is_first:
                self._complete(errors)
            self._failure = next(
                filter(None, [*errors, *everyone(self._failure)]), None
            )
            self.is_over = True
        if self._failure is not None:
            raise cannot_save(self.path, self._failure)
        return self.path

    def _write(self) -> None:
        self._write_own()
        if self._is_first:
            self._complete([self._error])

    def _write_own(self) -> None:
        try:
            self.writing.write_own()
        except Exception as error:  # all ranks raise it in `wait`
            self._error = as_told(error)
        self._has_written.set()

    def _complete(self, errors: Sequence[BaseException | None]) -> None:
        try:
            if any(errors):
                while threading.main_thread().is_alive():
                    if self._must_end.wait(_POLL_S):  # others may still write
                        break
            else:
                self.writing.complete(self._may_wait, self._must_end)
        except Exception as error:
            self._failure = as_told(error)
        self.writing.end()


def staged(parts: list[Part], earlier: list[Part]) -> list[Part]:
    """Return copies on the CPU, which training does not change.

    The memory of an earlier save is taken again: fresh memory costs more than the copy.

    Args:
        parts: What this rank writes.
        earlier: Copies that are not needed any more.
    """
    memory = {(piece, t.dtype): t for _, piece, t in earlier}
    copies = []
    for kind, piece, tensor in parts:
        copy = memory.get((piece, tensor.dtype))
        if copy is None:
            copy = torch.empty(
                piece.sizes, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda
            )
        copy.copy_(tensor.detach(), non_blocking=True)
        copies.append((kind, piece, copy))
    if any(tensor.is_cuda for _, _, tensor in parts):
        torch.cuda.current_stream().synchronize()
    return copies


def cannot_save(path: Path, error: BaseException) -> BaseException:
    """Return the error of a save that failed: a disk's says what there still is."""
    if not isinstance(error, OSError):
        return error
    failure = OSError(
        f"cannot save {path}: {error}; the older checkpoints are intact: make room and "
        "resume"
    )
    failure.errno = error.errno
    return failure
