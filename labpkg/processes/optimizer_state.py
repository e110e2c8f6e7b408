"""The state of an optimizer as one process has it, and back to the pieces of each rank.

# Note [state of an optimizer]
torch numbers the parameters through all groups and keeps a dictionary for each that
had a gradient. Its tensors have the shape of the parameter, one number per element,
and are divided with it; all else (`step`) is one number, the same on every rank. A rank
with an empty slice may have no state where others do, or an old one: the others tell.

# Note [numbers]
A stage of a pipeline numbers its own parameters. The whole model's number of each is in
its `Place`, so in every group the parameters of all stages are sorted by it. That is
the order of one process if its groups list parameters as the model does.

Contract: the optimizer is torch's, or keeps the one of the slices as `inner`; every
rank calls the same function.

Chapters: parallelism/zero, parallelism/tensor_parallel, parallelism/pipeline.
Reference: Rajbhandari et al. 2020, SC20, arXiv:1910.02054.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from labpkg.processes.cuts import place_of
from labpkg.processes.flat import shard_of
from labpkg.processes.messages import all_gather_object
from labpkg.processes.pieces import (
    Announced,
    Device,
    by_stage,
    copied,
    gathered,
    in_order,
    is_divided,
    owner_of,
    shown,
    take,
    whole_shape,
)

_NAMES = ("params", "param_names")  # of a group; all else are options
_Key = tuple[int, str]  # number of a parameter, name of its state


class _Row(NamedTuple):
    """What a stage tells the others about a parameter."""

    number: int  # in the whole model
    name: str | None
    shape: torch.Size
    is_divided: bool


class _Refused(NamedTuple):
    """A state of which pieces make no whole."""

    what: str


@dataclass(frozen=True, slots=True)
class _Numbering:
    """The parameters of an optimizer, of all stages, as one process numbers them.

    Attributes:
        groups: For each group, what is known of its parameters, in order.
        here: The parameters of this rank, by number.
        stages: The axis over which they are dealt out, or None.
    """

    groups: list[list[_Row]]
    here: dict[int, Tensor]
    stages: DeviceMesh | None

    @property
    def rows(self) -> list[_Row]:
        """Those of all groups, by number."""
        return [row for rows in self.groups for row in rows]


def whole_optimizer_state(
    optimizer: Optimizer, device: Device, *, keeps: bool
) -> dict[str, Any]:
    """Return the `state_dict` that one process would have.

    Args:
        optimizer: A torch optimizer, or one that has an `inner` optimizer of slices.
        device: Where the copies go; None leaves them where they are.
        keeps: Whether this rank wants the tensors; it takes part anyway.

    Raises:
        ValueError: On every rank, if pieces of a state make no whole, or if stages have
            other groups.
    """
    numbering, inner = _numbered(optimizer), _inner(optimizer)
    counting = {
        i: p
        for i, p in sorted(numbering.here.items())
        if (place := place_of(p)) is None or place.counts
    }
    described = _described_states(counting, inner)
    passes = _passes(described)
    order = [
        (i, key)
        for key, _, numbers in passes
        for i in in_order({i: counting[i] for i in numbers})
    ]
    stages = by_stage((described, order), numbering.stages)
    state = {
        i: dict(d) for theirs, _ in stages.values() for i, d in theirs.items() if d
    }
    _require_elementwise(state)
    announced = {
        rank: [((i, key), theirs[i][key]) for i, key in keys]
        for rank, (theirs, keys) in stages.items()
    }
    wholes = _wholes(passes, counting, inner)
    for (i, key), whole in shown(wholes, announced, numbering.stages):
        state[i][key] = copied(whole, device) if keeps else None
    groups = _packed_groups(optimizer, numbering)
    return {"state": dict(sorted(state.items())), "param_groups": groups}


def _inner(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that has the state: that of the slices, or itself."""
    return getattr(optimizer, "inner", optimizer)


def _numbered(optimizer: Optimizer) -> _Numbering:
    """Number the parameters of all stages; see Note [numbers]."""
    stages, mine = None, []
    parameters: list[dict[int, Tensor]] = []
    for group in optimizer.param_groups:
        rows, known = [], {}
        names = group.get("param_names", [None] * len(group["params"]))
        for i, (p, name) in enumerate(zip(group["params"], names, strict=True)):
            place = place_of(p)
            stages = place.mesh if place is not None else stages
            number = place.number if place is not None else i
            if number is not None:  # or it stands for a group that is empty here
                rows.append(_Row(number, name, whole_shape(p), is_divided(p)))
                known[number] = p
        mine.append(rows)
        parameters.append(known)
    told = list(by_stage(mine, stages).values())
    _require_same_groups([len(groups) for groups in told])
    groups, here = [], {}
    first = 0
    for number_of_group, known in enumerate(parameters):
        rows = {row.number: row for t in reversed(told) for row in t[number_of_group]}
        groups.append([rows[number] for number in sorted(rows)])
        for i, row in enumerate(groups[-1], first):
            if row.number in known:
                here[i] = known[row.number]
        first += len(rows)
    return _Numbering(groups, here, stages)


def _require_same_groups(counts: list[int]) -> None:
    if len(set(counts)) > 1:
        raise ValueError(
            f"the optimizers of the stages have {counts} groups, which make no whole; "
            "build the groups of all stages with labpkg.param_groups(pipeline, ...)"
        )


def _packed_groups(optimizer: Optimizer, numbering: _Numbering) -> list[dict[str, Any]]:
    """Return the groups with the numbers that their parameters have in one process."""
    # The method of the base class: a ZeroOptimizer has its own.
    groups = copy.deepcopy(Optimizer.state_dict(optimizer)["param_groups"])
    first = 0
    for group, rows in zip(groups, numbering.groups, strict=True):
        group["params"] = list(range(first, first + len(rows)))
        if "param_names" in group:
            group["param_names"] = [row.name for row in rows]
        first += len(rows)
    return groups


def _described_states(
    parameters: Mapping[int, Tensor], inner: Optimizer
) -> dict[int, dict[str, Any]]:
    """Return what the state of each parameter consists of; numbers as they are."""
    described: dict[int, dict[str, Any]] = {}
    sharded: dict[DeviceMesh, dict[int, dict[str, Any]]] = {}
    for i, p in parameters.items():
        own = inner.state.get(owner_of(p), {})
        mine = {key: _described(value, p) for key, value in own.items()}
        shard = shard_of(p)
        described[i] = mine if shard is None else {}
        if shard is not None:
            tells = shard.local.numel() or not shard.shape.numel()
            sharded.setdefault(shard.mesh, {})[i] = mine if tells else {}
    for mesh, mine in sharded.items():
        for theirs in all_gather_object(mine, mesh):
            for i, entries in theirs.items():
                described[i].update(entries)
    return described


def _described(value: Any, parameter: Tensor) -> Any:
    if isinstance(value, Tensor):
        if value.ndim == 0:
            return value.detach().cpu().clone()
        own = owner_of(parameter)
        if not is_divided(parameter):
            return Announced(value.shape, value.dtype)
        if value.shape == own.shape:
            return Announced(whole_shape(parameter), value.dtype)
        shapes = f"{tuple(value.shape)}, the slice of {tuple(own.shape)}"
        return _Refused(f"of shape {shapes}")
    known = value is None or isinstance(value, bool | int | float | complex)
    if known or not is_divided(parameter):
        return copy.deepcopy(value)
    return _Refused(f"a {type(value).__name__}")


def _require_elementwise(state: Mapping[int, Mapping[str, Any]]) -> None:
    wrong = [
        f"{key!r} of parameter {i} is {value.what}"
        for i, described in sorted(state.items())
        for key, value in described.items()
        if isinstance(value, _Refused)
    ]
    if wrong:
        raise ValueError(
            f"the state is not one number for each element: {'; '.join(wrong)}; slices "
            "of it make no whole: use an elementwise optimizer, such as AdamW"
        )


def _passes(
    described: Mapping[int, Mapping[str, Any]],
) -> list[tuple[str, torch.dtype, list[int]]]:
    """Return which states to gather together, in the same order on every rank."""
    passes: dict[tuple[str, torch.dtype], list[int]] = {}
    for i in sorted(described):
        for key in sorted(described[i]):
            entry = described[i][key]
            if isinstance(entry, Announced):
                passes.setdefault((key, entry.dtype), []).append(i)
    return [(key, dtype, numbers) for (key, dtype), numbers in passes.items()]


def _wholes(
    passes: list[tuple[str, torch.dtype, list[int]]],
    parameters: Mapping[int, Tensor],
    inner: Optimizer,
) -> Iterator[tuple[_Key, Tensor]]:
    for key, dtype, numbers in passes:
        chosen = {i: parameters[i] for i in numbers}
        value = lambda owner, key=key: inner.state.get(owner, {}).get(key)
        for i, whole in gathered(chosen, value, dtype=dtype):
            yield (i, key), whole


def load_whole_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load a `state_dict` of one process; each rank takes its pieces.

    Args:
        optimizer: A torch optimizer, or one that has an `inner` optimizer of slices.
        state: The whole state, equal on all ranks.

    Raises:
        ValueError: On every rank, if it does not fit; nothing is loaded then.
    """
    if set(state) != {"state", "param_groups"}:
        raise ValueError(
            f"the state has the entries {', '.join(map(str, state))}, not `state` and "
            "`param_groups`; load what full_state_dict(optimizer) returned"
        )
    numbering = _numbered(optimizer)
    _check_groups(optimizer, numbering, state["param_groups"])
    numbers = _numbers(state["state"], numbering.rows)
    _check_shapes(state["state"], numbering.rows, numbers)
    inner = _inner(optimizer)
    packed = Optimizer.state_dict(inner)
    place = {id(p): i for i, p in enumerate(_parameters_of(inner))}
    packed["state"] = {}
    for i, p in numbering.here.items():
        owner = owner_of(p)
        if i in state["state"] and id(owner) in place:  # ZeRO leaves out empty slices
            packed["state"][place[id(owner)]] = {
                key: take(value, p, sliced=True)
                if is_divided(p) and key not in numbers
                else copy.deepcopy(value)
                for key, value in state["state"][i].items()
            }
    inner.load_state_dict(packed)
    for group, given in zip(optimizer.param_groups, state["param_groups"], strict=True):
        options = {key: value for key, value in given.items() if key not in _NAMES}
        group.update(copy.deepcopy(options))


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _check_groups(
    optimizer: Optimizer, numbering: _Numbering, given: list[dict[str, Any]]
) -> None:
    sizes = [len(rows) for rows in numbering.groups]
    given_sizes = [len(group["params"]) for group in given]
    if sizes != given_sizes:
        raise ValueError(
            f"the state has groups of {given_sizes} parameters, the optimizer of "
            f"{sizes}; make it with the same groups"
        )
    for number, (group, other) in enumerate(
        zip(optimizer.param_groups, given, strict=True)
    ):
        missing = sorted(set(group) - set(other) - {*_NAMES})
        if missing:
            raise ValueError(
                f"group {number} of the state lacks {', '.join(missing)}: it is that "
                "of another kind of optimizer; make the kind that was saved"
            )


def _numbers(states: Mapping[int, Mapping[str, Any]], rows: list[_Row]) -> set[str]:
    """Return the keys that hold one number, not one for each element.

    A parameter without dimensions does not tell them apart, but the others do.
    """
    numbers = {"step"}
    for i, state in states.items():
        has_dims = i < len(rows) and len(rows[i].shape) > 0
        for key, value in state.items():
            if not isinstance(value, Tensor) or (value.ndim == 0 and has_dims):
                numbers.add(key)
    return numbers


def _check_shapes(
    states: Mapping[int, Mapping[str, Any]], rows: list[_Row], numbers: set[str]
) -> None:
    wrong = [
        f"parameter {i} is unexpected" for i in states if i not in range(len(rows))
    ]
    for i, row in enumerate(rows):
        for key, value in states.get(i, {}).items() if row.is_divided else ():
            if key not in numbers and value.shape != row.shape:
                wrong.append(
                    f"{key!r} of parameter {i} has shape {tuple(value.shape)} instead "
                    f"of {tuple(row.shape)}"
                )
    if wrong:
        raise ValueError(
            f"the state does not fit the optimizer: {'; '.join(wrong)}; load a state "
            "of the same parameters, whole"
        )
