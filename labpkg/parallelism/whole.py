"""Whole tensors from shards and back: state that no engine and no world size changes.

What `ZeroOptimizer` and `fully_shard` cut, these functions put together: gradients by
name, and the `state_dict` of a model or an optimizer exactly as one process has it.
So a checkpoint of four ranks at stage 3 continues on one rank, or on three at stage 1.

Contract: every rank calls the same function with the same arguments. A parameter that
is cut carries a `Shard`; all others are taken as they are, so plain models work too.

Chapter: parallelism/zero. Reference: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from labpkg.processes.flat import Shard, ShardedBucket, shard_of
from labpkg.processes.messages import all_gather_object

Device = torch.device | str | None

_NAMES = ("params", "param_names")  # of a group; all else are options


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

    Args:
        model: A model, sharded or not.
        weight_decay: Of the parameters that decay, at least 0.
        decays: Given the name and the whole shape, whether a parameter decays.

    Returns:
        Groups for an optimizer, those that decay first; an empty one is left out.

    Raises:
        ValueError: If `weight_decay` is negative or no parameter needs a gradient.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay} must be at least 0; choose 0.1")
    chosen: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            chosen[bool(decays(name, _whole_shape(parameter)))].append(parameter)
    groups = [
        {"params": parameters, "weight_decay": weight_decay if decay else 0.0}
        for decay, parameters in chosen.items()
        if parameters
    ]
    if not groups:
        raise ValueError(
            "the model has no parameter that needs a gradient, so there is nothing to "
            "optimize; unfreeze a layer"
        )
    return groups


def full_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Return a copy of the whole gradient of each parameter, on every rank.

    For tests and for looking: after backward stages 1 to 3 leave `p.grad` in slices.

    Args:
        model: A model under any engine, after a synchronised backward.

    Returns:
        Gradients by the names of `model.named_parameters()`; None where no rank used
        the parameter, or where it is frozen.

    Communication: one all_gather for each bucket of shards.
    """
    named = dict(model.named_parameters())
    whole = _gather(named, lambda shard: shard.local.grad)
    gradients: dict[str, Tensor | None] = {}
    for name, parameter in named.items():
        shard = shard_of(parameter)
        owner = parameter if shard is None else shard.local
        if owner.grad is None:
            gradients[name] = None
        else:
            gradients[name] = whole.get(name, owner.grad).detach().clone()
    return gradients


def full_state_dict(
    model_or_optimizer: nn.Module | Optimizer, *, device: Device = None
) -> dict[str, Any]:
    """Return a copy of the `state_dict` that one process would have, on every rank.

    The state of a model has all parameters, frozen ones too, and buffers, whole. That
    of an optimizer numbers the parameters as torch does, has the groups, and the state
    of each parameter whole; counters come from a rank that has them. Save it on one
    rank; `load_full_state_dict` reads it under any engine and on any number of ranks.

    Args:
        model_or_optimizer: A model, a torch optimizer or a `ZeroOptimizer`.
        device: Where the copies go, "cpu" if the whole does not fit on the GPU; then
            only one bucket at a time is whole there. By default where the shards are.

    Returns:
        What `state_dict()` returns in one process.

    Raises:
        ValueError: On every rank, if the state of an optimizer is not one number for
            each element of a parameter, so that slices do not make a whole.

    Communication: one all_gather for each bucket of shards, times the state tensors of
    a parameter; for an optimizer an `all_gather_object` of the counters, too.
    """
    if isinstance(model_or_optimizer, Optimizer):
        return _full_optimizer_state(model_or_optimizer, device)
    state = model_or_optimizer.state_dict(keep_vars=True)
    named = {n: v for n, v in state.items() if isinstance(v, Tensor)}
    whole = _gather(named, lambda shard: shard.local, device)
    for name, value in state.items():
        state[name] = whole[name] if name in whole else _copied(value, device)
    return state


def load_full_state_dict(
    model_or_optimizer: nn.Module | Optimizer, state: Mapping[str, Any]
) -> None:
    """Load what `full_state_dict` returned, or a `state_dict` of one process.

    Each rank takes its slices, so the engine and the number of ranks may be others than
    those that saved.

    Args:
        model_or_optimizer: A model, a torch optimizer or a `ZeroOptimizer`.
        state: The whole state, equal on all ranks.

    Raises:
        ValueError: If names or parameters are missing or unexpected, if shapes differ,
            or if the state is that of another kind of optimizer. Nothing is loaded.
    """
    if isinstance(model_or_optimizer, Optimizer):
        _load_optimizer_state(model_or_optimizer, state)
        return
    variables = model_or_optimizer.state_dict(keep_vars=True)
    _check_model_state(variables, state)
    local = dict(state)
    for name, variable in variables.items():
        shard = shard_of(variable) if isinstance(variable, Tensor) else None
        if shard is not None and variable is shard.local:
            local[name] = _cut(state[name], shard)
    model_or_optimizer.load_state_dict(local)


def _whole_shape(tensor: Tensor) -> torch.Size:
    shard = shard_of(tensor)
    return tensor.shape if shard is None else shard.shape


def _cut(whole: Tensor, shard: Shard) -> Tensor:
    """Return a copy of this rank's slice; a view would keep the whole alive."""
    return whole.detach().reshape(-1)[shard.start : shard.stop].clone()


def _copied(value: Any, device: Device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    return copy.deepcopy(value)


def _gather(
    named: Mapping[str, Tensor],
    value: Callable[[Shard], Tensor | None],
    device: Device = None,
) -> dict[str, Tensor]:
    """Return a tensor of each parameter that is cut, whole, by name."""
    buckets: dict[ShardedBucket, list[tuple[str, int]]] = {}
    for name, tensor in named.items():
        shard = shard_of(tensor)
        if shard is not None:
            buckets.setdefault(shard.bucket, []).append((name, shard.index))
    whole = {}
    for bucket, places in buckets.items():
        views = bucket.gather(value)
        for name, i in places:
            whole[name] = views[i].to(device, copy=True)
    return whole


def _check_model_state(variables: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    wrong = [f"{name} is missing" for name in variables if name not in state]
    wrong += [f"{name} is unexpected" for name in state if name not in variables]
    for name, variable in variables.items():
        if name in state and isinstance(variable, Tensor):
            expected, given = tuple(_whole_shape(variable)), tuple(state[name].shape)
            if given != expected:
                wrong.append(f"{name} has shape {given} instead of {expected}")
    if wrong:
        raise ValueError(
            f"the state does not fit the model: {'; '.join(wrong)}; load a state of "
            "the same model, whole"
        )


# Note [state of an optimizer]
# torch numbers the parameters through all groups and keeps a dictionary for each that
# had a gradient. Its tensors have the shape of the parameter, one number per element,
# and are cut with it; all else (`step`) is one number, the same on every rank. A rank
# with an empty slice may have no state where others do, or an old one: the others tell.


def _full_optimizer_state(optimizer: Optimizer, device: Device) -> dict[str, Any]:
    inner = _inner(optimizer)
    state: dict[int, dict[str, Any]] = {}
    sharded: dict[DeviceMesh, dict[int, tuple[Shard, dict[str, Any]]]] = {}
    for i, parameter in enumerate(_parameters_of(optimizer)):
        shard = shard_of(parameter)
        own = inner.state.get(parameter if shard is None else shard.local, {})
        if shard is not None:
            sharded.setdefault(shard.mesh, {})[i] = (shard, own)
        elif own:
            state[i] = {key: _copied(value, device) for key, value in own.items()}
    for mesh, cut in sharded.items():
        state |= _gather_states(mesh, cut, device)
    # That of the base class: a ZeroOptimizer has its own.
    groups = Optimizer.state_dict(optimizer)["param_groups"]
    return {"state": dict(sorted(state.items())), "param_groups": copy.deepcopy(groups)}


def _inner(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that has the state: that of the slices, or itself."""
    return getattr(optimizer, "inner", optimizer)


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _gather_states(
    mesh: DeviceMesh, cut: dict[int, tuple[Shard, dict[str, Any]]], device: Device
) -> dict[int, dict[str, Any]]:
    """Return the state of the parameters that are cut over an axis, whole."""
    mine = {
        i: {key: _described(value, shard.local) for key, value in own.items()}
        for i, (shard, own) in cut.items()
        if shard.local.numel() or not shard.shape.numel()
    }
    state: dict[int, dict[str, Any]] = {}
    for theirs in all_gather_object(mine, mesh):
        for i, described in theirs.items():
            if described:
                state.setdefault(i, {}).update(described)
    _require_elementwise(state)
    passes: dict[tuple[ShardedBucket, str, torch.dtype], dict[int, int]] = {}
    for i in sorted(state):  # the same order on every rank
        shard = cut[i][0]
        for key, dtype in sorted(state[i].items()):
            if isinstance(dtype, torch.dtype):
                number_of = passes.setdefault((shard.bucket, key, dtype), {})
                number_of[shard.index] = i
    for (bucket, key, dtype), number_of in passes.items():
        pieces = {place: cut[i][1].get(key) for place, i in number_of.items()}
        views = bucket.gather(lambda s, own=pieces: own.get(s.index), dtype=dtype)
        for place, i in number_of.items():
            state[i][key] = views[place].to(device, copy=True)
    return state


def _described(value: Any, local: Tensor) -> Any:
    """Return the dtype of a slice, a number as it is, what else it is as a string."""
    if not isinstance(value, Tensor):
        known = value is None or isinstance(value, bool | int | float | complex)
        return value if known else f"a {type(value).__name__}"
    if value.ndim == 0:
        return value.detach().cpu()
    if value.shape == local.shape:
        return value.dtype
    return f"of shape {tuple(value.shape)}, the slice of {tuple(local.shape)}"


def _require_elementwise(state: dict[int, dict[str, Any]]) -> None:
    wrong = [
        f"{key!r} of parameter {i} is {value}"
        for i, described in sorted(state.items())
        for key, value in described.items()
        if isinstance(value, str)
    ]
    if wrong:
        raise ValueError(
            f"the state is not one number for each element: {'; '.join(wrong)}; slices "
            "of it make no whole: use an elementwise optimizer, such as AdamW"
        )


def _load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    _check_groups(optimizer, state)
    parameters = _parameters_of(optimizer)
    shards = {i: shard_of(p) for i, p in enumerate(parameters)}
    numbers = _numbers(state["state"], parameters)
    _check_shapes(state["state"], shards, numbers)
    inner = _inner(optimizer)
    packed = Optimizer.state_dict(inner)
    place = {id(p): i for i, p in enumerate(_parameters_of(inner))}
    packed["state"] = {}
    for i, whole in state["state"].items():
        shard = shards[i]
        owner = parameters[i] if shard is None else shard.local
        if id(owner) in place:  # a ZeroOptimizer leaves out empty slices
            packed["state"][place[id(owner)]] = {
                key: copy.deepcopy(value)
                if shard is None or key in numbers
                else _cut(value, shard)
                for key, value in whole.items()
            }
    inner.load_state_dict(packed)
    for group, given in zip(optimizer.param_groups, state["param_groups"], strict=True):
        options = {key: value for key, value in given.items() if key not in _NAMES}
        group.update(copy.deepcopy(options))


def _check_groups(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    if set(state) != {"state", "param_groups"}:
        raise ValueError(
            f"the state has the entries {', '.join(map(str, state))}, not `state` and "
            "`param_groups`; load what full_state_dict(optimizer) returned"
        )
    groups, given = optimizer.param_groups, state["param_groups"]
    sizes, given_sizes = ([len(g["params"]) for g in each] for each in (groups, given))
    if sizes != given_sizes:
        raise ValueError(
            f"the state has groups of {given_sizes} parameters, the optimizer of "
            f"{sizes}; make it with the same groups"
        )
    for number, (group, other) in enumerate(zip(groups, given, strict=True)):
        missing = sorted(set(group) - set(other) - {*_NAMES})
        if missing:
            raise ValueError(
                f"group {number} of the state lacks {', '.join(missing)}: it is that "
                "of another kind of optimizer; make the kind that was saved"
            )


def _numbers(
    states: Mapping[int, Mapping[str, Any]], parameters: list[Tensor]
) -> set[str]:
    """Return the keys that hold one number, not one for each element.

    A parameter without dimensions does not tell them apart, but the others do.
    """
    numbers = {"step"}
    for i, state in states.items():
        has_dims = i < len(parameters) and len(_whole_shape(parameters[i])) > 0
        for key, value in state.items():
            if not isinstance(value, Tensor) or (value.ndim == 0 and has_dims):
                numbers.add(key)
    return numbers


def _check_shapes(
    states: Mapping[int, Mapping[str, Any]],
    shards: Mapping[int, Shard | None],
    numbers: set[str],
) -> None:
    wrong = [f"parameter {i} is unexpected" for i in states if i not in shards]
    for i, state in states.items():
        shard = shards.get(i)
        for key, value in state.items():
            if shard and key not in numbers and value.shape != shard.shape:
                wrong.append(
                    f"{key!r} of parameter {i} has shape {tuple(value.shape)} instead "
                    f"of {tuple(shard.shape)}"
                )
    if wrong:
        raise ValueError(
            f"the state does not fit the optimizer: {'; '.join(wrong)}; load a state "
            "of the same parameters, whole"
        )
