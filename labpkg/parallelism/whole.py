"""Whole tensors from pieces and back: state that no engine and no world size changes.

What `ZeroOptimizer` and `fully_shard` slice, what `apply_tensor_parallel` cuts and
`Pipeline` deals out to its stages, these functions put together: gradients by name, and
the `state_dict` of a model or an optimizer exactly as one process has it. So a
checkpoint of four ranks at stage 3 continues on one rank, or on three at stage 1, and
one of two tensor-parallel ranks on four stages.

Contract: every rank calls the same function with the same arguments. What is divided
carries a mark (`Shard`, `Cut`, `Place`); all else is taken as it is, so plain models
work too.

Chapters: parallelism/zero, parallelism/tensor_parallel, parallelism/pipeline.
References: Rajbhandari et al. 2020, SC20, arXiv:1910.02054.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from labpkg.processes.cuts import Place, mark_place, place_of
from labpkg.processes.optimizer_state import (
    load_whole_optimizer_state,
    whole_optimizer_state,
)
from labpkg.processes.pieces import (
    Announced,
    Device,
    by_stage,
    copied,
    gathered,
    in_order,
    owner_of,
    shown,
    take,
    whole_shape,
)


class _Entry(NamedTuple):
    """What a stage tells the others about a name.

    Attributes:
        number: Of a parameter that is dealt out, in the whole model; else None.
        what: `Announced` for a tensor, otherwise the value itself.
    """

    number: int | None
    what: Any


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    decays: Callable[[str, torch.Size], bool] = lambda name, shape: len(shape) >= 2,
) -> list[dict[str, Any]]:
    """Split the trainable parameters into those with weight decay and those without.

    Biases and the gains of norms are usually not decayed: they have one dimension. A
    slice of `fully_shard` has one dimension whatever it is a slice of, so the choice
    looks at the shape of the whole parameter: the groups are the same before and after.
    All stages of a `Pipeline` have the same groups: where a stage has no parameter for
    one, an empty tensor stands in, so that every rank can make its optimizer.

    Args:
        model: A model under any engine.
        weight_decay: Of the parameters that decay, at least 0.
        decays: Given the name and the whole shape, whether a parameter decays.

    Returns:
        Groups for an optimizer, those that decay first; an empty one is left out.

    Raises:
        ValueError: If `weight_decay` is negative or no parameter needs a gradient.

    Communication: none, but for a `Pipeline` an `all_gather_object` of the choices.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay} must be at least 0; choose 0.1")
    stages = _stages_of(model)
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    told = by_stage(
        {_known_as(n, p): bool(decays(n, whole_shape(p))) for n, p in trainable}, stages
    )
    # Of a tied parameter the first stage decides, under whose name it is known.
    choices = {k: v for choices in reversed(told.values()) for k, v in choices.items()}
    groups = []
    for decay in sorted(set(choices.values()), reverse=True):
        members = [p for n, p in trainable if choices[_known_as(n, p)] == decay]
        if stages is not None and not members:
            members = [nn.Parameter(torch.empty(0, device=stages.device_type))]
            mark_place(members[0], Place(stages, counts=False))
        groups.append({"params": members, "weight_decay": decay * weight_decay})
    if not groups:
        raise ValueError(
            "the model has no parameter that needs a gradient, so there is nothing to "
            "optimize; unfreeze a layer"
        )
    return groups


def full_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Return a copy of the whole gradient of each parameter, on every rank.

    For tests and for looking: no rank may have whole gradients after backward.

    Args:
        model: A model under any engine, after a synchronised backward.

    Returns:
        Gradients by the names of `model.named_parameters()`, of all stages for a
        `Pipeline`; None where no rank used the parameter, or where it is frozen.

    Raises:
        ValueError: If stages of a `Pipeline` use a name for different parameters.

    Communication: one all_gather for each bucket of shards and each cut parameter; for
    a `Pipeline` an `all_gather_object` of the names and a broadcast of each gradient.
    """
    named = {
        name: p
        for name, p in model.named_parameters()
        if (place := place_of(p)) is None or place.counts
    }
    entries = {name: _Entry(_number_of(p), _gradient(p)) for name, p in named.items()}
    trainable = {name: p for name, p in named.items() if p.requires_grad}
    order = [name for name in in_order(trainable) if entries[name].what is not None]
    wholes = gathered(trainable, lambda owner: owner.grad)
    own = ((name, whole) for name, whole in wholes if name in order)
    everything, shown_ones = _of_all_stages(entries, order, own, _stages_of(model))
    gradients: dict[str, Tensor | None] = dict.fromkeys(everything)
    for name, whole in shown_ones:
        gradients[name] = copied(whole, None)
    return gradients


def _gradient(parameter: Tensor) -> Announced | None:
    gradient = owner_of(parameter).grad
    if gradient is None:
        return None
    return Announced(whole_shape(parameter), gradient.dtype)


def full_state_dict(
    model_or_optimizer: nn.Module | Optimizer, *, device: Device = None
) -> dict[str, Any]:
    """Return a copy of the `state_dict` that one process would have, on every rank.

    The state of a model has all parameters, frozen ones too, and buffers, whole; of a
    `Pipeline` those of all stages. That of an optimizer numbers the parameters as torch
    does, has the groups, and the state of each parameter whole; counters come from a
    rank that has them, on the CPU. `load_full_state_dict` reads it under any engine and
    on any number of ranks. `consolidate` returns it on one rank, to be saved.

    Args:
        model_or_optimizer: A model, a torch optimizer or a `ZeroOptimizer`.
        device: Where the copies go, "cpu" if the whole does not fit on the GPU; then
            only one bucket or tensor at a time is whole there. By default where the
            pieces are.

    Returns:
        What `state_dict()` returns in one process. Under a pipeline the names of a
        model come in the order of ranks, and the parameters of each group in that of
        the whole model.

    Raises:
        ValueError: On every rank, if the state of an optimizer is not one number for
            each element of a parameter, so that pieces do not make a whole; or if
            stages use a name for different parameters, or have other groups.

    Communication: one all_gather for each bucket of shards and each cut parameter,
    times the state tensors of a parameter; for the optimizer of slices an
    `all_gather_object` of the counters, too. For a `Pipeline` an `all_gather_object` of
    what each stage has, and a broadcast of each tensor.
    """
    return _whole_state(model_or_optimizer, device, keeps=True)


def consolidate(model_or_optimizer: nn.Module | Optimizer) -> dict[str, Any] | None:
    """Return the `state_dict` of one process on rank 0, on the CPU, for `torch.save`.

    As `full_state_dict`, but only one rank keeps it, so a host with 8 ranks holds it
    once: no device has more than one bucket or tensor whole, and no other rank anything
    afterwards. Every rank must call it.

    Args:
        model_or_optimizer: A model, a torch optimizer or a `ZeroOptimizer`.

    Returns:
        The state on rank 0 of all ranks; None on the others.

    Raises:
        ValueError: As `full_state_dict`.

    Communication: that of `full_state_dict`.
    """
    keeps = not dist.is_initialized() or dist.get_rank() == 0
    state = _whole_state(model_or_optimizer, "cpu", keeps=keeps)
    return state if keeps else None


def _whole_state(
    model_or_optimizer: nn.Module | Optimizer, device: Device, *, keeps: bool
) -> dict[str, Any]:
    if isinstance(model_or_optimizer, Optimizer):
        return whole_optimizer_state(model_or_optimizer, device, keeps=keeps)
    model = model_or_optimizer
    held = model.state_dict(keep_vars=True)
    tensors = {name: v for name, v in held.items() if isinstance(v, Tensor)}
    everything, shown_ones = _of_all_stages(
        _entries(held),
        in_order(tensors),
        gathered(tensors, lambda owner: owner),
        _stages_of(model),
    )
    state = OrderedDict(
        (
            name,
            None if isinstance(entry.what, Announced) else copied(entry.what, device),
        )
        for name, entry in everything.items()
    )
    for name, whole in shown_ones:
        state[name] = copied(whole, device) if keeps else None
    versions = OrderedDict()  # of layers, which may change
    for theirs in by_stage(getattr(held, "_metadata", {}), _stages_of(model)).values():
        versions |= theirs
    vars(state)["_metadata"] = versions
    return state


def load_full_state_dict(
    model_or_optimizer: nn.Module | Optimizer, state: Mapping[str, Any]
) -> None:
    """Load what `full_state_dict` returned, or a `state_dict` of one process.

    Each rank takes its pieces, so the engine and the number of ranks may be others than
    those that saved.

    Args:
        model_or_optimizer: A model, a torch optimizer or a `ZeroOptimizer`.
        state: The whole state, equal on all ranks.

    Raises:
        ValueError: If names or parameters are missing or unexpected, if shapes differ,
            or if the state is that of another kind of optimizer. Nothing is loaded, on
            any rank.

    Communication: none, but for a `Pipeline` an `all_gather_object` of what each stage
    has.
    """
    if isinstance(model_or_optimizer, Optimizer):
        load_whole_optimizer_state(model_or_optimizer, state)
        return
    model = model_or_optimizer
    held = model.state_dict(keep_vars=True)
    entries, _ = _of_all_stages(_entries(held), [], iter(()), _stages_of(model))
    _check_model_state(entries, state)
    # Where tied names differ the last one wins, as it does in one process.
    tied = {entry.number: name for name, entry in entries.items()}
    local = OrderedDict()
    for name, value in held.items():
        number = entries[name].number
        whole = state[name if number is None else tied[number]]
        if isinstance(value, Tensor) and value.shape != whole_shape(value):
            whole = take(whole, value, sliced=owner_of(value) is value)
        local[name] = whole
    vars(local)["_metadata"] = getattr(state, "_metadata", None)
    model.load_state_dict(local)


def _entries(held: Mapping[str, Any]) -> dict[str, _Entry]:
    return {
        name: _Entry(_number_of(value), Announced(whole_shape(value), value.dtype))
        if isinstance(value, Tensor)
        else _Entry(None, value)
        for name, value in held.items()
    }


def _of_all_stages(
    entries: dict[str, _Entry],
    order: list[str],
    own: Iterator[tuple[str, Tensor]],
    stages: DeviceMesh | None,
) -> tuple[dict[str, _Entry], Iterator[tuple[str, Tensor]]]:
    """Return the entries of all stages by name, and their tensors one by one."""
    told = by_stage((entries, order), stages)
    everything: dict[str, _Entry] = {}
    for theirs, _ in told.values():
        for name, entry in theirs.items():
            if everything.setdefault(name, entry).number != entry.number:
                raise ValueError(
                    f"{name} is the name of different parameters in two stages, so "
                    "together they are no model; cut one model with split_stages"
                )
    announced = {
        rank: [(name, theirs[name].what) for name in names]
        for rank, (theirs, names) in told.items()
    }
    return everything, shown(own, announced, stages)


def _stages_of(model: nn.Module) -> DeviceMesh | None:
    place = place_of(model)
    return None if place is None else place.mesh


def _number_of(value: Tensor) -> int | None:
    place = place_of(value)
    return None if place is None else place.number


def _known_as(name: str, parameter: Tensor) -> int | str:
    number = _number_of(parameter)
    return name if number is None else number


def _check_model_state(entries: Mapping[str, _Entry], state: Mapping[str, Any]) -> None:
    wrong = [f"{name} is missing" for name in entries if name not in state]
    wrong += [f"{name} is unexpected" for name in state if name not in entries]
    for name, (_, what) in entries.items():
        if name in state and isinstance(what, Announced):
            expected, given = tuple(what.shape), tuple(state[name].shape)
            if given != expected:
                wrong.append(f"{name} has shape {given} instead of {expected}")
    if wrong:
        raise ValueError(
            f"the state does not fit the model: {'; '.join(wrong)}; load a state of "
            "the same model, whole"
        )
