"""Pieces: what this rank holds of each tensor of a model, and how to make it whole.

Three engines divide, and may do so one inside the other: a pipeline deals parameters
out to its stages (`Place`), tensor parallelism cuts each along a dim (`Cut`), sharding
cuts what is left into flat slices (`Shard`). The way back goes through the same axes in
reverse: slices are gathered, the cuts put together, the stages shared.

Contract: all ranks of an axis ask for the same tensors in the same order. What carries
no mark is whole already, so plain models need no case of their own.

Chapters: parallelism/zero, parallelism/tensor_parallel, parallelism/pipeline.
References: Rajbhandari et al. 2020, SC20, arXiv:1910.02054; Shoeybi et al. 2019,
arXiv:1909.08053.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes.cuts import cut_of
from labpkg.processes.flat import shard_of
from labpkg.processes.in_place import broadcast_
from labpkg.processes.messages import all_gather_object
from labpkg.processes.traffic import always_on

Device = torch.device | str | None
_Key = TypeVar("_Key", bound=Hashable)
_T = TypeVar("_T")


class Announced(NamedTuple):
    """A whole tensor that a rank will show to the others."""

    shape: torch.Size
    dtype: torch.dtype


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape that a tensor of a model has in one process."""
    cut, shard = cut_of(tensor), shard_of(tensor)
    if cut is not None:
        return cut.shape
    return tensor.shape if shard is None else shard.shape


def owner_of(parameter: Tensor) -> Tensor:
    """Return what carries the gradient and the state: a slice, or the parameter."""
    shard = shard_of(parameter)
    return parameter if shard is None else shard.local


def is_divided(parameter: Tensor) -> bool:
    """Return whether the gradient and the state of a parameter lie on several ranks."""
    return cut_of(parameter) is not None or shard_of(parameter) is not None


def take(whole: Tensor, tensor: Tensor, *, sliced: bool) -> Tensor:
    """Return a copy of this rank's piece of a whole; a view would keep all of it alive.

    Args:
        whole: As in one process.
        tensor: Of the model; its marks tell how it is divided.
        sliced: Also cut by its shard, as its gradient and state are. The parameters of
            stages 1 and 2 are not.
    """
    cut, shard = cut_of(tensor), shard_of(tensor) if sliced else None
    part = whole.detach() if cut is None else cut.take(whole.detach())
    return (
        part if shard is None else part.reshape(-1)[shard.start : shard.stop]
    ).clone()


def in_order(tensors: Mapping[_Key, Tensor]) -> list[_Key]:
    """Return the keys in the order in which `gathered` yields them."""
    return [key for keys in _together(tensors) for key in keys]


def gathered(
    tensors: Mapping[_Key, Tensor],
    value: Callable[[Tensor], Tensor | None],
    *,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[_Key, Tensor]]:
    """Yield a tensor of each parameter whole, one bucket of shards at a time.

    Args:
        tensors: Parameters and buffers of a model.
        value: Given the owner of a parameter, what this rank has for it, such as its
            gradient; None counts as zeros.
        dtype: Of what is gathered from shards; by default that of the parameter.

    Yields:
        Key and whole tensor, which is one of the model's own where nothing is divided.

    Communication: one all_gather for each bucket of shards and for each cut parameter.
    """

    def part(tensor: Tensor) -> Tensor:
        given = value(tensor)
        return torch.zeros_like(tensor) if given is None else given.detach()

    for keys in _together(tensors):
        shards = [shard_of(tensors[key]) for key in keys]
        if shards[0] is None:
            parts = [part(tensors[key]) for key in keys]
        else:
            views = shards[0].bucket.gather(lambda s: value(s.local), dtype=dtype)
            parts = [views[shard.index] for shard in shards if shard is not None]
        for key in keys:
            own, cut = parts.pop(0), cut_of(tensors[key])
            yield key, own if cut is None else cut.gather(own)


def _together(tensors: Mapping[_Key, Tensor]) -> list[list[_Key]]:
    """Group keys by the bucket in which their parameters lie; the others are alone."""
    groups: dict[Hashable, list[_Key]] = {}
    for key, tensor in tensors.items():
        shard = shard_of(tensor)
        place = (None, key) if shard is None else shard.bucket
        groups.setdefault(place, []).append(key)
    return list(groups.values())


def by_stage(mine: _T, mesh: DeviceMesh | None) -> dict[int, _T]:
    """Return what each rank of a pipeline tells the others, by rank.

    Args:
        mine: What this rank tells.
        mesh: The axis over which a model is dealt out; None if it is not, then nothing
            is communicated.
    """
    if mesh is None:
        return {0: mine}
    with always_on():  # or there would be nothing of the right shape
        return dict(enumerate(all_gather_object(mine, mesh)))


def shown(
    own: Iterator[tuple[_Key, Tensor]],
    announced: Mapping[int, Sequence[tuple[_Key, Announced]]],
    mesh: DeviceMesh | None,
) -> Iterator[tuple[_Key, Tensor]]:
    """Yield the tensors of all stages on every rank, those of rank 0 of the axis first.

    Args:
        own: Those of this rank, which are as announced.
        announced: What each rank of the axis will show, as `by_stage` returns it.
        mesh: The axis; None yields the own ones.

    Communication: one broadcast for each tensor.
    """
    if mesh is None:
        yield from own
        return
    for src, entries in announced.items():
        for key, (shape, dtype) in entries:
            if src == mesh.get_local_rank():
                found, tensor = next(own)
                assert found == key, "a rank shows what it has announced"
                # Some state stays on the CPU, which not every backend sends.
                tensor = tensor.detach().to(mesh.device_type).contiguous()
            else:
                tensor = torch.zeros(shape, dtype=dtype, device=mesh.device_type)
            broadcast_(tensor, mesh, src=src).wait()
            yield key, tensor


def copied(value: Any, device: Device) -> Any:
    """Return a copy that shares no memory; a tensor goes to `device` unless None."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    return copy.deepcopy(value)
