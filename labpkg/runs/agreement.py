"""Ranks agree: what one cannot do, none does.

An error that only one rank raises leaves the others waiting in their next collective.
So what may fail on one rank is tried first, and then all ranks raise or none does.

Chapter: runs/checkpointing.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist

from labpkg.processes.messages import all_gather_object
from labpkg.processes.traffic import always_on

_T = TypeVar("_T")


def own_rank() -> int:
    """Return the number of this rank among all; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_everyone() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def everyone(value: _T) -> list[_T]:
    """Return what every rank says, by rank, on every rank.

    Args:
        value: What this rank says; any picklable value.

    Communication: an `all_gather_object`; none without a process group.
    """
    if not dist.is_initialized():
        return [value]
    with always_on():  # an answer from this rank alone would be no agreement
        return all_gather_object(value)


def as_told(error: BaseException | None) -> BaseException | None:
    """Return an error that can be sent to other ranks and says the same.

    Args:
        error: What went wrong here, or None.
    """
    if error is None or type(error) is ValueError:
        return error
    if isinstance(error, OSError):
        told = OSError(error.strerror or str(error))
        told.errno = error.errno
        return told
    told = RuntimeError(f"{type(error).__name__}: {error}")
    told.add_note("".join(traceback.format_exception(error)))  # notes travel
    return told


def raise_first(errors: Sequence[BaseException | None]) -> None:
    """Raise the error of the first rank that has one, the same on every rank.

    Args:
        errors: By rank, as `everyone` returns them.

    Raises:
        ValueError, OSError, RuntimeError: What the rank has said.
    """
    for error in errors:
        if error is not None:
            raise error
