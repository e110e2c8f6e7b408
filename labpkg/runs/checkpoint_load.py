"""Reading a checkpoint: the boxes that this rank needs, from whoever wrote them.

Contract: the files have been verified. Everything is planned and the optimizer's state
is read before anything of the model or the optimizer changes.

Chapter: runs/checkpointing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from labpkg.processes.pieces import is_divided, owner_of, whole_shape
from labpkg.processes.rectangles import Corner, Rectangle, overlap, rectangles
from labpkg.runs.checkpoint_files import Manifest, bad, dtype_of
from labpkg.runs.checkpoint_state import Whole, decoded, inner_of


class _Read(NamedTuple):
    """A box to be read.

    Attributes:
        into: What takes it.
        file: Where it is.
        name: Of its tensor.
        box: Its place in the piece that lies there.
    """

    into: Tensor
    file: str
    name: str
    box: tuple[slice, ...]


class Reader:
    """Finds and reads boxes of the tensors of a checkpoint.

    Args:
        path: The folder of the checkpoint.
        manifest: Of the checkpoint.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path, self._manifest = path, manifest
        self._open: dict[str, Any] = {}
        self._pieces: dict[str, list[tuple[str, tuple[Corner, Corner]]]] = {}
        for file, entry in manifest.files.items():
            for name, (offsets, sizes) in entry["pieces"].items():
                self._pieces.setdefault(name, []).append(
                    (file, (tuple(offsets), tuple(sizes)))
                )

    def plan(self, name: str, boxes: Sequence[Rectangle]) -> list[_Read]:
        """Return what to read to fill boxes of a tensor.

        Raises:
            ValueError: If the pieces of the checkpoint do not cover them.
        """
        reads, num_elements = [], 0
        for box, (file, piece) in product(boxes, self._pieces.get(name, [])):
            common = overlap((box.offsets, box.sizes), piece)
            if common is not None:
                into = box.local[_slices(common, box.offsets)]
                reads.append(_Read(into, file, name, _slices(common, piece[0])))
                num_elements += into.numel()
        if num_elements != sum(math.prod(box.sizes) for box in boxes):
            raise bad(self._path, f"the pieces of {name} do not cover it")
        return reads

    def read(self, reads: Sequence[_Read]) -> None:
        """Read what was planned."""
        for into, file, name, box in reads:
            if file not in self._open:
                self._open[file] = safetensors.safe_open(self._path / file, "pt")
            piece = self._open[file].get_tensor(name)  # in memory only where read
            into.copy_(piece[box])

    def whole(self, name: str) -> Tensor:
        """Return a whole tensor, on the CPU."""
        dtype, shape = self._manifest.tensors[name]
        tensor = torch.empty(shape, dtype=dtype_of(dtype), device="cpu")
        if tensor.numel():
            self.read(self.plan(name, [Rectangle((0,) * tensor.ndim, shape, tensor)]))
        return tensor


def _slices(box: tuple[Corner, Corner], offsets: Corner) -> tuple[slice, ...]:
    """Return where a box lies in one that begins at `offsets`."""
    return tuple(
        slice(begin - first, begin - first + n)
        for begin, n, first in zip(*box, offsets, strict=True)
    )


class Loading:
    """What a rank is about to load.

    Making it reads the state of the optimizer and plans the rest; `apply` changes model
    and optimizer.

    Args:
        path: The folder of the checkpoint.
        manifest: Of the checkpoint.
        model: Gets its state.
        optimizer: Gets its state, or None.

    Raises:
        ValueError: If pieces do not cover what is needed.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        model: nn.Module,
        optimizer: Optimizer | None,
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._manifest, self._reader = manifest, Reader(path, manifest)
        self._reads: list[_Read] = []
        self._names: dict[int, str] = {}  # of each tensor, where it is saved
        for name, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and id(tensor) not in self._names:
                self._names[id(tensor)] = saved_as = manifest.names[name]
                boxes = rectangles(tensor, tensor, sliced=owner_of(tensor) is tensor)
                self._reads += self._reader.plan(saved_as, boxes)
        self._packed = None if optimizer is None else self._pack(optimizer)
        self._extras = decoded(manifest.extras, self._reader.whole)
        self.state = decoded(manifest.state, self._reader.whole)

    def random_state(self, rank: int) -> Any:
        """Return the random state that a rank had, None if there was no such rank."""
        states = self._manifest.random
        return decoded(states[rank], self._reader.whole) if rank < len(states) else None

    @torch.no_grad()
    def apply(self) -> None:
        """Change the model and the optimizer."""
        self._reader.read(self._reads)
        if self._extras:
            self._model.load_state_dict(self._extras, strict=False)
        if self._optimizer is None:
            return
        assert self._packed is not None
        inner_of(self._optimizer).load_state_dict(self._packed)
        options = (self._manifest.optimizer or {})["options"]
        for group, given in zip(self._optimizer.param_groups, options, strict=True):
            group.update(decoded(given, self._reader.whole))

    def _pack(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return a `state_dict` of the optimizer of this rank, with the saved state."""
        saved = self._manifest.optimizer
        assert saved is not None
        inner = inner_of(optimizer)
        # The method of the base class: a ZeroOptimizer has its own.
        packed = Optimizer.state_dict(inner)
        numbers = _numbers(saved["states"], self._manifest)
        owners = [p for group in inner.param_groups for p in group["params"]]
        place = {id(owner): i for i, owner in enumerate(owners)}
        packed["state"] = {}
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            state = saved["states"].get(self._names.get(id(p), ""))
            at = place.get(id(owner_of(p)))
            if state and at is not None:  # ZeRO leaves out empty slices
                packed["state"][at] = {
                    key: self._piece(p, value["$tensor"])
                    if is_divided(p) and key not in numbers and _is_tensor(value)
                    else decoded(value, self._reader.whole)
                    for key, value in state.items()
                }
        return packed

    def _piece(self, parameter: Tensor, name: str) -> Tensor:
        """Return this rank's part of a state of a divided parameter."""
        dtype, shape = self._manifest.tensors[name]
        if tuple(shape) != tuple(whole_shape(parameter)):
            raise ValueError(
                f"{name} has shape {tuple(shape)}, its parameter "
                f"{tuple(whole_shape(parameter))}: it is not one number for each "
                "element and cannot be divided; load it where parameters are whole"
            )
        part = torch.empty(owner_of(parameter).shape, dtype=dtype_of(dtype))
        reads = self._reader.plan(name, rectangles(parameter, part, sliced=True))
        self._reader.read(reads)
        return part


def check_fit(
    path: Path, manifest: Manifest, whole: Whole, optimizer: Optimizer | None
) -> None:
    """Refuse a checkpoint of another model or of another optimizer.

    Args:
        path: The folder of the checkpoint.
        manifest: Of the checkpoint.
        whole: What all ranks hold.
        optimizer: That of this rank, or None.

    Raises:
        ValueError: The same on every rank; it names the first difference.
    """
    mine = {n: tuple(whole.tensors[as_][1:]) for n, as_ in whole.names.items()}
    theirs = {n: tuple(manifest.tensors[as_]) for n, as_ in manifest.names.items()}
    own_ties, their_ties = _ties(whole.names), _ties(manifest.names)
    for name in dict.fromkeys([*mine, *theirs]):
        here, there = _shown(mine.get(name)), _shown(theirs.get(name))
        if here == there:
            here, there = own_ties[name], their_ties[name]
        if here != there:
            raise ValueError(
                f"{path} holds another model: {name} is {there} there and {here} here; "
                "build the model that was saved"
            )
    if optimizer is not None:
        _check_optimizer(path, manifest, whole)


def _shown(tensor: tuple[Any, ...] | None) -> str:
    if tensor is None:
        return "missing"
    dtype, shape = tensor
    return f"{tuple(shape)} {dtype_of(dtype)}"


def _ties(names: dict[str, str]) -> dict[str, str]:
    """Say of each name with which others it shares a tensor."""
    together: dict[str, list[str]] = {}
    for name, saved_as in names.items():
        together.setdefault(saved_as, []).append(name)
    shown = {
        saved_as: f"tied ({', '.join(sorted(members))})" if members[1:] else "not tied"
        for saved_as, members in together.items()
    }
    return {name: shown[saved_as] for name, saved_as in names.items()}


def _check_optimizer(path: Path, manifest: Manifest, whole: Whole) -> None:
    saved, own = manifest.optimizer, whole.optimizer
    assert own is not None
    kind = "no optimizer" if saved is None else saved["class"]
    if saved is None or kind != own["class"]:
        raise ValueError(
            f"{path} holds the state of {kind}, which {own['class']} cannot use; "
            f"resume with {kind}, or load the weights alone (optimizer=None)"
        )
    if len(saved["groups"]) != len(own["groups"]):
        raise ValueError(
            f"{path} holds an optimizer of {len(saved['groups'])} groups, here it has "
            f"{len(own['groups'])}; make it with the same groups"
        )
    place = {n: i for i, group in enumerate(saved["groups"]) for n in group}
    for number, group in enumerate(own["groups"]):
        for name in group:
            found = place.pop(manifest.names[name], None)
            if found != number:
                where = "no group" if found is None else f"group {found}"
                raise ValueError(
                    f"{path} holds another optimizer: {name} is in {where} there and "
                    f"in group {number} here; make it with the same groups"
                )
    for name, number in place.items():
        raise ValueError(
            f"{path} holds another optimizer: {name} is in group {number} there and in "
            "no group here; make it with the same groups"
        )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, dict) and "$tensor" in value


def _numbers(states: dict[str, dict[str, Any]], manifest: Manifest) -> set[str]:
    """Return the keys that hold one number, not one for each element.

    A parameter without dimensions does not tell them apart, but the others do.
    """
    shape = lambda name: manifest.tensors[name][1]
    return {"step"} | {
        key
        for name, state in states.items()
        for key, value in state.items()
        if _is_tensor(value) and shape(name) and not shape(value["$tensor"])
    }
