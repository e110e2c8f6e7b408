"""Replicas: equal models on all ranks of an axis, and who may train them.

Data parallelism rests on equal starts. `require_same_model` and `broadcast_state` make
them; `GradientHook` and `release` see to it that a parameter has one engine at a time.
`check_replicas` proves that replicas are still equal, bit by bit. `average_parameters`
makes replicas equal again that were trained apart on purpose.

Chapter: parallelism/data_parallel. References: Li et al. 2020, PVLDB 13(12):3005-3018,
arXiv:2006.15704; Stich 2019, Local SGD Converges Fast and Communicates Little,
arXiv:1805.09767; Steele, Lea and Flood 2014, Fast Splittable Pseudorandom Number
Generators, doi:10.1145/2660193.2660195.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes.flat import bucket_parameters, flat_views, shard_of
from labpkg.processes.in_place import all_reduce_, broadcast_
from labpkg.processes.messages import all_gather_object
from labpkg.processes.traffic import axis_of

_BUCKET_BYTES = 25 * 2**20
_CHUNK_BYTES = 2**22  # a multiple of 8; small enough to stay in the cache


class _Engine(Protocol):
    @property
    def accumulated(self) -> Callable[..., None]: ...


class GradientHook:
    """What a parameter calls when its gradient is complete.

    The link to the engine is weak: Python's garbage collector cannot see through the
    hooks of a tensor, so a strong link would keep model and buckets for ever.

    Args:
        engine: What averages the gradient; its `accumulated(*place)` is called.
        place: How the engine finds the parameter.
    """

    def __init__(self, engine: _Engine, *place: Any) -> None:
        self.engine, self.name = weakref.ref(engine), type(engine).__name__
        self.place = place

    def __call__(self, _: Tensor) -> None:
        """Tell the engine."""
        engine = self.engine()
        if engine is None:
            raise RuntimeError(
                f"the {self.name} around this model is gone, so its gradients would "
                "not be averaged; keep the wrapper and call it, or train a deepcopy"
            )
        engine.accumulated(*self.place)


def release(name: str, parameter: Tensor) -> None:
    """Remove the hooks of engines that are gone; refuse a living one.

    Args:
        name: How a message calls the parameter.
        parameter: A parameter that an engine wants to take.

    Raises:
        ValueError: If another engine averages its gradient.
    """
    hooks = parameter._post_accumulate_grad_hooks or {}  # pyright: ignore
    for key, hook in list(hooks.items()):
        if isinstance(hook, GradientHook):
            if hook.engine() is not None:
                raise ValueError(
                    f"{name} belongs to another {hook.name} already, and would be "
                    "averaged twice; wrap a model once, or delete the other wrapper"
                )
            del hooks[key]


def reduces_in_backward(parameter: Tensor) -> bool:
    """Return whether the next backward hands a gradient to an engine to be averaged.

    Args:
        parameter: Whose; under `no_sync` its gradient only accumulates.
    """
    hooks = parameter._post_accumulate_grad_hooks or {}  # pyright: ignore
    engines = [h.engine() for h in hooks.values() if isinstance(h, GradientHook)]
    return any(e is not None and getattr(e, "syncs", True) for e in engines)


def take_parameters(module: nn.Module) -> list[Tensor]:
    """Return the parameters that need a gradient, free for one engine to average.

    Args:
        module: The replica of this rank.

    Raises:
        ValueError: If there are none, if a layer makes sparse gradients, or if an
            engine has one already.
    """
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError(
            "the model has no parameter that needs a gradient; data parallelism has "
            "nothing to average: use the model as it is"
        )
    require_dense(module)
    for name, parameter in named.items():
        release(name, parameter)
    return list(named.values())


def require_dense(module: nn.Module) -> None:
    """Refuse layers whose gradients have no place in a flat bucket.

    Args:
        module: The model.

    Raises:
        ValueError: If a layer makes sparse gradients.
    """
    for name, layer in module.named_modules():
        if getattr(layer, "sparse", False):
            raise ValueError(
                f"{name} makes sparse gradients, which have no place in a bucket; "
                "build it with sparse=False"
            )


def require_device(
    module: nn.Module, mesh: DeviceMesh, *, allows_meta: bool = False
) -> None:
    """Refuse a model that lies elsewhere than the mesh; nothing is communicated.

    Args:
        module: The replica of this rank.
        mesh: The axis, such as `mesh["dp"]`.
        allows_meta: Also take a model of which no parameter has memory yet.

    Raises:
        ValueError: If the mesh has several axes, if a parameter or buffer is not on its
            kind of device, or if they lie on several.
    """
    axis_of(mesh)
    is_empty = allows_meta and all(p.is_meta for p in module.parameters())
    first = None
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_empty and tensor.is_meta:
            continue
        if tensor.device.type != mesh.device_type:
            raise ValueError(
                f"{name} lies on {tensor.device}, but the mesh is one of "
                f"{mesh.device_type}; {_way_to(mesh.device_type, tensor)}"
            )
        first = first or (name, tensor.device)
        if tensor.device != first[1]:
            raise ValueError(
                f"{first[0]} lies on {first[1]} and {name} on {tensor.device}; a "
                "replica needs one device: move the model there first"
            )


def _way_to(device: str, tensor: Tensor) -> str:
    if tensor.is_meta:
        return "give the model memory and values first: materialize(model)"
    return f"move the model first: model.to({device!r})"


def require_same_model(module: nn.Module, mesh: DeviceMesh) -> None:
    """Raise on every rank if the models differ in names, shapes or dtypes.

    Args:
        module: The replica of this rank.
        mesh: The axis.

    Raises:
        ValueError: With the first difference.
    """
    mine = [
        (name, tuple(t.shape), str(t.dtype), t.requires_grad, t.is_meta)
        for name, t in (*module.named_parameters(), *module.named_buffers())
    ]
    for rank, theirs in enumerate(all_gather_object(mine, mesh)):
        if theirs != mine:
            first = next(
                (a for a, b in zip(mine, theirs, strict=False) if a != b), None
            )
            raise ValueError(
                f"rank {rank} of the axis holds another model ({len(theirs)} tensors, "
                f"here {len(mine)}; first difference at {first}); build the same model "
                "on every rank"
            )


def replica_parameters(model: nn.Module) -> list[Tensor]:
    """Return the parameters of a replica; refuse a model of which ranks hold slices.

    Args:
        model: What should be a replica.

    Raises:
        ValueError: If `fully_shard` has cut it.
    """
    for name, parameter in model.named_parameters():
        shard = shard_of(parameter)
        if shard is not None and shard.local is parameter:
            raise ValueError(
                f"{name} is cut by fully_shard, so each rank holds another part of it "
                "and there are no replicas to average or compare; fully_shard averages "
                "gradients itself, full_state_dict shows the whole"
            )
    return list(model.parameters())


def broadcast_state(tensors: Iterable[Tensor], mesh: DeviceMesh) -> None:
    """Overwrite tensors, such as parameters and buffers, with those of rank 0.

    Args:
        tensors: The same on every rank, but for their values; one on "meta" has none.
        mesh: The axis.

    Communication: one broadcast per 25 MiB and dtype.
    """
    filled = [tensor for tensor in tensors if not tensor.is_meta]
    with torch.no_grad():
        for bucket in bucket_parameters(filled, _BUCKET_BYTES):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
            broadcast_(flat, mesh).wait()
            _write_back(bucket, flat)


def average_parameters(model: nn.Module, mesh: DeviceMesh) -> None:
    """Replace parameters by their mean over the ranks: the meeting of local SGD.

    Ranks that train the bare model for H steps, each on its own shard, and then meet
    here send 1 / H of the bytes of data parallelism. With H = 1 and an update that is
    linear in the gradients (SGD, also with momentum, Nesterov or weight decay) it is
    the same as averaging gradients; with Adam or H > 1 it is another algorithm.

    Parameters that need a gradient are averaged, and so are floating buffers: running
    statistics that each rank took on its own data. Integer and boolean buffers, such as
    counters, become those of rank 0. Frozen parameters are left alone, and so is the
    state of an optimizer. Half precision is summed in float32.

    Args:
        model: The replica of this rank, with the same names and shapes on every rank.
        mesh: The data-parallel axis.

    Raises:
        ValueError: If the mesh has several axes, if the model lies on another device,
            or if `fully_shard` has cut it.

    Communication: an all_reduce of 2 (n - 1) / n of the bytes of parameters and
    buffers, 25 MiB at a time; integer buffers are broadcast.

    Reference: Stich 2019, arXiv:1805.09767.
    """
    require_device(model, mesh)
    buffers = list(model.buffers())
    moving = [p for p in replica_parameters(model) if p.requires_grad]
    moving += [b for b in buffers if b.is_floating_point() or b.is_complex()]
    with torch.no_grad():
        for bucket in bucket_parameters(moving, _BUCKET_BYTES):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
            flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
            all_reduce_(flat, mesh, op="mean").wait()
            _write_back(bucket, flat)
    counters = [b for b in buffers if not (b.is_floating_point() or b.is_complex())]
    broadcast_state(counters, mesh)


def _write_back(tensors: list[Tensor], flat: Tensor) -> None:
    views = flat_views(flat, [tensor.shape for tensor in tensors])
    for tensor, view in zip(tensors, views, strict=True):
        tensor.copy_(view)


def check_replicas(model: nn.Module, mesh: DeviceMesh, *, buffers: bool = True) -> None:
    """Raise on every rank unless all replicas are equal, bit by bit.

    Each rank makes a 64-bit fingerprint of every tensor, on its device; one changed bit
    is sure to change it. Equal NaNs are equal; 0.0 and -0.0 are not. The ranks outside
    the majority are named; where there is none, as between two ranks, all are.

    Args:
        model: The replica of this rank.
        mesh: The data-parallel axis.
        buffers: Also compare buffers. Those that a forward pass changes, such as
            running statistics, differ by rank until they are next broadcast.

    Raises:
        RuntimeError: With each differing rank and its first differing tensor.
        ValueError: If the mesh has several axes or `fully_shard` has cut the model.

    Communication: all_gather of about 100 bytes per tensor.
    """
    axis_of(mesh)
    replica_parameters(model)  # or refuse
    tensors = [*model.named_parameters(), *(model.named_buffers() if buffers else ())]
    mine = {
        name: (_fingerprint(t), str(t.dtype), tuple(t.shape)) for name, t in tensors
    }
    replicas = all_gather_object(mine, mesh)
    strays: dict[int, str] = {}
    names = list(dict.fromkeys(name for replica in replicas for name in replica))
    num_differing = 0
    for name in names:
        ranks = _minority([replica.get(name) for replica in replicas])
        num_differing += bool(ranks)
        for rank in ranks:
            strays.setdefault(rank, name)
    if strays:
        found = ", ".join(f"rank {rank} in {strays[rank]}" for rank in sorted(strays))
        raise RuntimeError(
            f"the replicas have drifted apart: {found} first ({num_differing} of "
            f"{len(names)} tensors differ between the {len(replicas)} ranks); look for "
            "steps or random numbers that differ by rank, or changes outside of "
            "training, and restart from a checkpoint"
        )


def _minority(values: list[Hashable]) -> list[int]:
    """Return the ranks that differ from the most common value; all if there is none."""
    counts = Counter(values).most_common()
    if len(counts) == 1:
        return []
    (usual, most), (_, second) = counts[:2]
    return [r for r, value in enumerate(values) if most == second or value != usual]


def _fingerprint(tensor: Tensor) -> int:
    """Return 64 bits of a tensor's bits: a sum of mixed words (SplitMix64).

    Sums of integers have no order, so a GPU gives what a CPU gives.
    """
    data = tensor.detach().reshape(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, len(data), _CHUNK_BYTES):
        part = data[start : start + _CHUNK_BYTES]
        words = part.new_zeros(-(-len(part) // 8) * 8)
        words[: len(part)] = part
        words = words.view(torch.int64)
        place = torch.arange(len(words), device=data.device) + (start // 8 + 1)
        # The odd factors, as signed numbers, and shifts are those of SplitMix64.
        words += place * -0x61C8864680B583EB
        for shift, factor in (
            (30, -0x40A7B892E31B1A47),
            (27, -0x6B2FB644ECCEEE15),
            (31, 1),
        ):
            words ^= (words >> shift) & ((1 << 64 - shift) - 1)  # no sign bits
            words *= factor
        total += words.sum()
    return int(total)
