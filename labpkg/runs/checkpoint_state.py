"""What a checkpoint holds of a model and its optimizer, by name, whatever the layout.

Each rank says what it holds: names, shapes, and where its rectangles lie. Put together
that is the inventory of the whole: the same under every layout, so a checkpoint of one
fits another. The state of an optimizer is known by the name of its parameter.

# Note [who tells]
Several ranks hold the same: data-parallel replicas, copies of a tied parameter on
other stages. Replicas tell the same pieces, and one of them writes each. Of a tied
parameter only the stage whose copy counts tells. A rank whose slice of a parameter is
empty may have no state where others do, or an old one, so it tells none.

Chapter: runs/checkpointing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from labpkg.processes.cuts import place_of
from labpkg.processes.flat import shard_of
from labpkg.processes.pieces import is_divided, owner_of, whole_shape
from labpkg.processes.rectangles import rectangles
from labpkg.runs.checkpoint_files import Piece, dtype_name

MODEL, TRAINING = "model", "training"  # kinds of files
_LEFT_OUT = ("params", "param_names")  # of a group; all else are options


class Known(NamedTuple):
    """What all ranks know of a tensor.

    Attributes:
        kind: In which files it goes.
        dtype: As safetensors calls it.
        shape: Of the whole.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]


class Offer(NamedTuple):
    """A piece that a rank could write.

    Attributes:
        piece: What it is.
        num_bytes: Its size.
        by_any: Whether any holder may write it; else the first one does.
    """

    piece: Piece
    num_bytes: int
    by_any: bool


@dataclass(kw_only=True, slots=True)
class Told:
    """What a rank tells the others; see Note [who tells].

    Attributes:
        tensors: What it holds something of, by name.
        offers: What it could write.
        names: Each name of the model, and the first name of its tensor on this rank.
        numbers: Where parameters stand in the whole model; only under a pipeline.
        kind: Class of the optimizer, None without one.
        options: Of each of its groups.
        groups: Names of the parameters of each group.
        states: Of each parameter by its name: what is no tensor, and names of tensors.
        extras: What modules keep that is no tensor.
        random: The random state of this rank.
        state: What the run saves with it; that of rank 0 counts.
    """

    tensors: dict[str, Known] = field(default_factory=dict)
    offers: list[Offer] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    kind: str | None = None
    options: list[Any] = field(default_factory=list)
    groups: list[list[str]] = field(default_factory=list)
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    random: Any = None
    state: Any = None


class Inventory:
    """What this rank holds of a model, an optimizer and a run.

    Args:
        model: A model under any engine.
        optimizer: A torch optimizer, or one that has an `inner` optimizer of slices.

    Attributes:
        told: What the others must know.
        held: What this rank could write, by piece; views of what it holds.

    Raises:
        ValueError: If something cannot be saved: a dtype that safetensors does not
            know, a parameter of the optimizer that the model does not have, a state
            that is not one number for each element of a divided parameter.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self.told = Told()
        self.held: dict[Piece, Tensor] = {}
        first: dict[int, str] = {}
        for name, value in model.state_dict(keep_vars=True).items():
            if not isinstance(value, Tensor):
                self.told.extras[name] = self.encoded(value, f"extra/{name}")
                continue
            known_as = first.setdefault(id(value), name)
            self.told.names[name] = known_as
            place = place_of(value)
            if place is not None and place.number is not None:
                self.told.numbers[name] = place.number
            if known_as == name and (place is None or place.counts):
                by_any = isinstance(value, nn.Parameter)  # buffers: those of rank 0
                self._add(name, MODEL, value, value, sliced=_owns(value), any_=by_any)
        if optimizer is not None:
            self._add_optimizer(optimizer, first)

    def encoded(self, value: Any, name: str) -> Any:
        """Return what JSON can hold of a value; its tensors are added under names.

        Args:
            value: None, numbers, strings, tensors, and lists, tuples and mappings of
                such.
            name: Of the value.

        Raises:
            ValueError: If it contains something else.
        """
        if isinstance(value, Tensor):
            self._add(name, TRAINING, value.detach(), value, sliced=False)
            return {"$tensor": name}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Mapping):
            rows = [[k, self.encoded(v, f"{name}/{k}")] for k, v in value.items()]
            is_plain = all(isinstance(k, str) and k[:1] != "$" for k in value)
            return dict(rows) if is_plain else {"$items": rows}
        if isinstance(value, list | tuple):
            parts = [self.encoded(v, f"{name}/{i}") for i, v in enumerate(value)]
            return parts if isinstance(value, list) else {"$tuple": parts}
        raise ValueError(
            f"{name} is a {type(value).__name__}, which a checkpoint cannot hold "
            "without a pickle; save numbers, strings, tensors, and lists, tuples and "
            "dicts of them"
        )

    def _add(
        self,
        name: str,
        kind: str,
        tensor: Tensor,
        held: Tensor,
        *,
        sliced: bool,
        any_: bool = True,
    ) -> None:
        """Add what this rank holds of a tensor with the marks of `tensor`."""
        dtype = dtype_name(held.dtype)
        if dtype is None or held.layout != torch.strided:
            raise ValueError(
                f"{name} is {held.dtype} of layout {held.layout}, which safetensors "
                "cannot hold; convert it, or register a buffer with persistent=False"
            )
        shape = whole_shape(tensor) if kind == MODEL or sliced else held.shape
        self.told.tensors[name] = Known(kind, dtype, tuple(shape))
        for offsets, sizes, local in rectangles(tensor, held, sliced=sliced):
            piece = Piece(name, offsets, sizes)
            self.held[piece] = local
            self.told.offers.append(Offer(piece, local.nbytes, any_))

    def _add_optimizer(self, optimizer: Optimizer, names: Mapping[int, str]) -> None:
        inner = inner_of(optimizer)
        self.told.kind = type(inner).__name__
        for number, group in enumerate(optimizer.param_groups):
            options = {k: v for k, v in group.items() if k not in _LEFT_OUT}
            encoded = self.encoded(options, f"optimizer/group {number}")
            self.told.options.append(encoded)
            members = [p for p in group["params"] if not is_stand_in(p)]
            for p in members:
                if id(p) not in names:
                    raise ValueError(
                        f"group {number} of the optimizer has a parameter of shape "
                        f"{tuple(p.shape)} that the model does not have; make one "
                        "module of all that is trained, and save that"
                    )
                place, shard = place_of(p), shard_of(p)
                counts = place is None or place.counts
                is_empty = shard is not None and not shard.local.numel()
                if counts and not (is_empty and whole_shape(p).numel()):
                    self._add_state(names[id(p)], p, inner)
            self.told.groups.append([names[id(p)] for p in members])

    def _add_state(self, name: str, parameter: Tensor, inner: Optimizer) -> None:
        own = inner.state.get(owner_of(parameter))
        if not own:
            return
        encoded = self.told.states[name] = {}
        for key, value in own.items():
            full_name = f"optimizer/{name}/{key}"
            is_tensor = isinstance(value, Tensor)
            if not is_divided(parameter) or (is_tensor and value.ndim == 0):
                encoded[key] = self.encoded(value, full_name)
            elif is_tensor and value.shape == owner_of(parameter).shape:
                self._add(full_name, TRAINING, parameter, value, sliced=True)
                encoded[key] = {"$tensor": full_name}
            elif value is None or isinstance(value, bool | int | float):
                encoded[key] = value
            else:
                what = tuple(value.shape) if is_tensor else type(value).__name__
                raise ValueError(
                    f"{key!r} of {name} is {what}, not one number for each of the "
                    f"{tuple(owner_of(parameter).shape)} elements that this rank has, "
                    "so pieces of it make no whole; use an elementwise optimizer, such "
                    "as AdamW"
                )


def decoded(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """Turn what `Inventory.encoded` returned back.

    Args:
        value: As it was in JSON.
        tensor: Returns a tensor by its name.
    """
    if isinstance(value, list):
        return [decoded(v, tensor) for v in value]
    if not isinstance(value, dict):
        return value
    match next(iter(value.items()), None):
        case "$tensor", name:
            return tensor(name)
        case "$tuple", parts:
            return tuple(decoded(parts, tensor))
        case "$items", rows:
            return {k: decoded(v, tensor) for k, v in rows}
    return {k: decoded(v, tensor) for k, v in value.items()}


def inner_of(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that has the state: that of the slices, or itself."""
    return getattr(optimizer, "inner", optimizer)


def is_stand_in(parameter: Tensor) -> bool:
    """Return whether it stands for a group that is empty on this stage."""
    place = place_of(parameter)
    return place is not None and place.number is None


def _owns(tensor: Tensor) -> bool:
    """Whether a tensor of a model is a slice itself, as those of `fully_shard` are."""
    return shard_of(tensor) is not None and owner_of(tensor) is tensor


# ---- the whole ---------------------------------------------------------------------


class Whole:
    """The inventories of all ranks put together.

    Args:
        told: By rank.

    Attributes:
        tensors: All, by name.
        names: Each name of the model, and the name under which its tensor is saved.
        groups: Of the optimizer, the names of the parameters as in `names`.

    Raises:
        ValueError: If stages have other groups, use a name for different tensors, or
            if pieces do not make a whole.
    """

    def __init__(self, told: Sequence[Told]) -> None:
        self.told = told
        self.tensors: dict[str, Known] = {}
        numbered: dict[int, str] = {}
        for rank in told:
            for name, known in rank.tensors.items():
                if self.tensors.setdefault(name, known) != known:
                    raise ValueError(
                        f"{name} is {known[1:]} on one rank and "
                        f"{self.tensors[name][1:]} on another; make the same model on "
                        "all ranks"
                    )
                if name in rank.numbers:
                    numbered[rank.numbers[name]] = name
        self.names = {
            name: numbered[rank.numbers[name]] if name in rank.numbers else known_as
            for rank in told
            for name, known_as in rank.names.items()
        }
        self._require_complete()
        self.groups = self._merged_groups()

    def _require_complete(self) -> None:
        found = dict.fromkeys(self.tensors, 0)
        for piece in {offer.piece for rank in self.told for offer in rank.offers}:
            found[piece.name] += math.prod(piece.sizes)
        for name, (_, _, shape) in self.tensors.items():
            if found[name] != math.prod(shape):
                raise ValueError(
                    f"the pieces of {name} have {found[name]} elements, the whole has "
                    f"shape {shape}; call this on every rank of the job, with the "
                    "model in its engine"
                )

    def _merged_groups(self) -> list[list[str]]:
        counts = {len(rank.groups) for rank in self.told}
        if len(counts) > 1:
            raise ValueError(
                f"ranks have optimizers of {sorted(counts)} groups, which make no "
                "whole; build the groups of all stages with labpkg.param_groups"
            )
        groups: list[list[str]] = []
        for number in range(counts.pop()):
            places: dict[str, int] = {}
            for rank in self.told:
                for i, name in enumerate(rank.groups[number]):
                    places.setdefault(self.names[name], rank.numbers.get(name, i))
            groups.append(sorted(places, key=places.__getitem__))
        return groups

    @property
    def optimizer(self) -> dict[str, Any] | None:
        """Class, groups and state of the optimizer, for the manifest."""
        first = self.told[0]
        if first.kind is None:
            return None
        states: dict[str, dict[str, Any]] = {}
        for rank in self.told:
            for name, state in rank.states.items():
                states.setdefault(self.names[name], {}).update(state)
        return {
            "class": first.kind,
            "options": first.options,
            "groups": self.groups,
            "states": states,
        }

    def shared_out(self) -> list[list[Piece]]:
        """Return what each rank writes: each piece once, about as many bytes each."""
        holders: dict[Piece, list[int]] = {}
        offers: dict[Piece, Offer] = {}
        for rank, told in enumerate(self.told):
            for offer in told.offers:
                holders.setdefault(offer.piece, []).append(rank)
                offers[offer.piece] = offer
        load, shares = [0] * len(self.told), [[] for _ in self.told]
        # What has no choice first, then the largest.
        order = lambda p: (len(holders[p]) > 1, -offers[p].num_bytes)
        for piece in sorted(holders, key=order):
            ranks = holders[piece] if offers[piece].by_any else holders[piece][:1]
            writer = min(ranks, key=load.__getitem__)
            load[writer] += offers[piece].num_bytes
            shares[writer].append(piece)
        return shares
