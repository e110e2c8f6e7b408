"""Units: modules whose parameters are whole only while they compute.

A `Unit` swaps, in its modules, this rank's slices of the parameters for whole ones and
back. Its memory comes in a `Group` for each dtype: a slice that stays, a flat buffer
that is gathered and freed, and gradients that are reduced into slices.

Chapter: parallelism/zero. Reference: Zhao et al. 2023, PyTorch FSDP, PVLDB 16(12):
3848-3860, arXiv:2304.11277.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

from labpkg.processes.flat import ShardedBucket, mark_empty, mark_shard, shard_of
from labpkg.processes.in_place import all_gather_, reduce_scatter_
from labpkg.processes.replicas import release, require_dense, require_device
from labpkg.processes.transport import Work

# The parameters of a unit, and where modules keep each: in several places if tied.
Members = dict[nn.Parameter, list[tuple[nn.Module, str]]]


class Group:
    """The parameters of a unit that travel together: of one dtype, all trained or none.

    Attributes:
        own: This rank's slice, which the optimizer updates in the pieces `sliced`.
        flat: The memory of the parameters `full`; of size 0 unless gathered.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        mesh: DeviceMesh,
        param_dtype: torch.dtype | None,
        reduce_dtype: torch.dtype | None,
    ) -> None:
        first = parameters[0]
        self.mesh, self.is_trained = mesh, first.requires_grad
        self.bucket = ShardedBucket([p.shape for p in parameters], mesh)
        device = mesh.device_type if first.is_meta else first.device
        if first.is_meta:  # memory for the slice, and values from `materialize`
            self.own = first.new_empty(self.bucket.slice_elements, device=device)
        else:
            self.own = self.bucket.take(parameters)
        shards = self.bucket.attach(self.own, [self.is_trained] * len(parameters))
        self.sliced = [shard.local for shard in shards]
        for parameter, shard in zip(parameters, shards, strict=True):
            vars(shard.local).update(vars(parameter))  # such as "no decay"
            mark_shard(shard.local, shard)
            mark_empty(shard.local, first.is_meta)
        self.memory = [memory_of(p) for p in self.sliced]
        cast = param_dtype if first.is_floating_point() else None
        self.flat = self.own.new_empty(self.bucket.num_elements, dtype=cast)
        # `.data` gives each a version of its own: autograd saves them in forward, and
        # must not take a later gathering of the same values for a change.
        self.full = [
            nn.Parameter(view.data, requires_grad=self.is_trained)
            for view in self.bucket.views(self.flat)
        ]
        self.reduce_dtype = reduce_dtype or self.flat.dtype
        self.work: Work | None = None
        self.free()

    def is_gathered(self) -> bool:
        """Whether the memory of the whole parameters exists."""
        return self.flat.untyped_storage().nbytes() > 0

    def start(self) -> None:
        """Start to gather the whole parameters, unless that was done."""
        if not self.is_gathered():
            self.flat.untyped_storage().resize_(self.flat.nbytes)
            own = self.own.to(self.flat.dtype)  # cast first: fewer bytes travel
            self.work = all_gather_(self.flat, own, self.mesh)

    def wait(self) -> None:
        """Return when they may be read."""
        if self.work is not None:
            self.work.wait()
            self.work = None

    def free(self) -> None:
        """Give up the memory of the whole parameters."""
        self.wait()
        self.flat.untyped_storage().resize_(0)

    def has_gradients(self) -> bool:
        """Whether backward has left any on the whole parameters."""
        return any(parameter.grad is not None for parameter in self.full)

    def reduce(self, *, deterministic: bool) -> Reduction:
        """Start to average the gradients; one that is missing here counts as 0.

        They stay where autograd made them until the unit's backward has ended: a bucket
        from the start would lie beside the unit's activations.
        """
        size, share = self.bucket.num_elements, 1 / self.mesh.size()
        whole = self.flat.new_empty(size, dtype=self.reduce_dtype)
        for parameter, view in zip(self.full, self.bucket.views(whole), strict=True):
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                view.zero_()
            else:
                torch.mul(gradient.detach().to(whole.dtype), share, out=view)
        return Reduction(self, whole, deterministic=deterministic)


class Reduction:
    """The gradients of a group on their way into this rank's slice."""

    def __init__(self, group: Group, whole: Tensor, *, deterministic: bool) -> None:
        self.group, self.own = group, whole[group.bucket.own]
        self.work = reduce_scatter_(
            self.own, whole, group.mesh, deterministic=deterministic
        )

    def wait(self) -> None:
        """Return when the slice may be read; the whole is given up."""
        self.work.wait()
        # Not before: a slice of its own would lie beside the whole on its way.
        self.own = self.own.to(self.group.own.dtype, copy=True)
        del self.work  # the handle holds the memory, too

    def deliver(self, used: set[nn.Parameter]) -> None:
        """Add the mean gradient to the slices of the parameters that any rank used."""
        pieces = self.group.bucket.cut(self.own)
        for parameter, piece in zip(self.group.sliced, pieces, strict=True):
            if parameter in used:
                before = parameter.grad
                parameter.grad = piece if before is None else before.add_(piece)


def memory_of(parameter: Tensor) -> tuple[int, torch.dtype, torch.device]:
    """Say where the elements of a parameter lie, and as what."""
    return parameter.data_ptr(), parameter.dtype, parameter.device


def put_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Let a module use another parameter under a name that it has."""
    if type(module).__setattr__ is nn.Module.__setattr__:
        module._parameters[name] = parameter
    else:  # such as that of nn.LSTM, which keeps a list of its weights
        setattr(module, name, parameter)


class _CutParameter(nn.Parameter):
    """What a parameter becomes that was cut: any use of it is a mistake."""

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            "this parameter was cut into slices and holds nothing any more; make the "
            "optimizer after fully_shard, from model.parameters()"
        )


# What may be asked of a parameter whose elements are elsewhere.
_SHAPE_METHODS = ("size", "dim", "numel", "element_size", "is_floating_point")


class _HiddenParameter(nn.Parameter):
    """What others see of a unit's parameter while the model computes: its shape."""

    place = ""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func.__name__ == "__get__" or func.__name__ in _SHAPE_METHODS:
            return Tensor.__torch_function__.__func__(cls, func, types, args, kwargs)
        places = [x.place for x in args if isinstance(x, cls)]
        raise RuntimeError(
            f"{max(places, default='') or 'a parameter'} is read outside of its unit "
            "of fully_shard, where it is not gathered; choose `units` so that one "
            "contains all that reads it, or leave it to the model itself"
        )


def _hidden(module: nn.Module, name: str, full: nn.Parameter) -> nn.Parameter:
    hidden = nn.Parameter(full.data, requires_grad=full.requires_grad)
    hidden.__class__ = _HiddenParameter
    vars(hidden)["place"] = f"{type(module).__name__}.{name}"
    return hidden


class Unit:
    """A module whose parameters are gathered around its computation."""

    def __init__(
        self,
        members: Members,
        mesh: DeviceMesh,
        param_dtype: torch.dtype | None,
        reduce_dtype: torch.dtype | None,
    ) -> None:
        kinds: dict[Any, list[nn.Parameter]] = {}
        for parameter in members:
            kind = (parameter.dtype, parameter.requires_grad)
            kinds.setdefault(kind, []).append(parameter)
        self.groups: list[Group] = []
        self.places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        for parameters in kinds.values():
            group = Group(parameters, mesh, param_dtype, reduce_dtype)
            self.groups.append(group)
            for old, sliced, full in zip(
                parameters, group.sliced, group.full, strict=True
            ):
                self.places += [(*place, sliced, full) for place in members[old]]
                old.grad, old.data = None, old.data.new_empty(0)
                old.__class__ = _CutParameter
        self.hidden = [_hidden(*place[:2], place[3]) for place in self.places]
        self.in_backward = False
        self.leave()

    def version(self) -> int:
        """Count the changes of the slices so far."""
        return sum(group.own._version for group in self.groups)

    def is_gathered(self) -> bool:
        """Whether all parameters have their memory."""
        return all(group.is_gathered() for group in self.groups)

    def start(self) -> None:
        """Start to gather what is not gathered."""
        for group in self.groups:
            group.start()

    def enter(self) -> None:
        """Wait for the whole parameters and put them where the modules look."""
        for group in self.groups:
            group.wait()
        for module, name, _, full in self.places:
            put_parameter(module, name, full)

    def leave(self) -> None:
        """Put the slices back; the whole parameters stay gathered."""
        for module, name, sliced, _ in self.places:
            put_parameter(module, name, sliced)

    def hide(self) -> None:
        """Put there what refuses to be read, while others compute."""
        for (module, name, _, _), hidden in zip(self.places, self.hidden, strict=True):
            put_parameter(module, name, hidden)

    def require_none_of(self, tensors: Iterable[Tensor]) -> None:
        """Refuse outputs that are whole parameters, or views of them."""
        own = {id(full) for _, _, _, full in self.places}
        if any(id(x) in own or id(x._base) in own for x in tensors):
            raise RuntimeError(
                "a unit of fully_shard returned a parameter, whose memory it frees "
                "when it ends; return what it computes, or a clone"
            )

    def require_intact(self) -> None:
        """Refuse slices that were changed in another way than by an optimizer."""
        for module, name, sliced, _ in self.places:
            if module._parameters.get(name) is not sliced:
                raise changed(name, "replaced")
        for group in self.groups:
            for sliced, full, memory in zip(
                group.sliced, group.full, group.memory, strict=True
            ):
                if memory_of(sliced) != memory:
                    raise changed("a parameter", "moved or converted")
                if sliced.requires_grad and not group.is_trained:
                    raise changed("a parameter", "unfrozen")
                full.requires_grad_(sliced.requires_grad)

    def free(self) -> None:
        """Give up the memory of the whole parameters."""
        for group in self.groups:
            group.free()


def default_units(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the elements of the outermost containers that have parameters."""
    holds_units = isinstance(module, nn.ModuleList | nn.Sequential)
    for child in module.children():
        # A list in a list is never called itself, and would not be gathered.
        if not holds_units or isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from default_units(child)
        elif next(child.parameters(), None) is not None:
            yield child


def checked_units(model: nn.Module, units: Iterable[nn.Module]) -> list[nn.Module]:
    """Refuse units that would never be gathered, or twice."""
    names = {module: name for name, module in model.named_modules() if name}
    checked: list[nn.Module] = []
    for i, unit in enumerate(units):
        if unit not in names:
            rule = "is no submodule of the model (which is always a unit itself)"
        elif unit in checked:
            rule = f"is {names[unit]} again"
        elif isinstance(unit, nn.ModuleList | nn.ModuleDict):
            rule = f"is {names[unit]}, a container that is never called"
        elif next(unit.parameters(), None) is None:
            rule = f"is {names[unit]}, which has no parameters"
        else:
            checked.append(unit)
            continue
        raise ValueError(
            f"units[{i}], a {type(unit).__name__}, {rule}; pass different submodules "
            "with parameters, such as the blocks of the model"
        )
    return checked


def members_of_units(
    model: nn.Module, units: Iterable[nn.Module]
) -> dict[nn.Module, Members]:
    """Give each parameter to the innermost unit in which all its places lie."""
    chosen = {model, *units}
    homes: dict[nn.Parameter, list[nn.Module]] = {}  # root, unit, unit inside it, ...
    places: Members = {}

    def visit(module: nn.Module, chain: list[nn.Module]) -> None:
        chain = [*chain, module] if module in chosen else chain
        for name, parameter in module._parameters.items():
            if parameter is not None:
                known = homes.setdefault(parameter, chain)
                shared = [a for a, b in zip(known, chain, strict=False) if a is b]
                homes[parameter] = shared
                found = places.setdefault(parameter, [])
                found += [(module, name)] if (module, name) not in found else []
        for child in module.children():
            visit(child, chain)

    visit(model, [])
    members: dict[nn.Module, Members] = {
        module: {} for module in model.modules() if module in chosen
    }
    for parameter, found in places.items():
        members[homes[parameter][-1]][parameter] = found
    return members


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield the tensors in an output, also those in objects of unknown classes."""
    seen = set() if seen is None else seen
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif id(leaf) not in seen and not isinstance(leaf, nn.Module | type):
            seen.add(id(leaf))
            if dataclasses.is_dataclass(leaf):  # it may have slots
                names = [field.name for field in dataclasses.fields(leaf)]
                yield from tensors_in([getattr(leaf, name) for name in names], seen)
            elif hasattr(leaf, "__dict__"):
                yield from tensors_in(dict(vars(leaf)), seen)


def require_shardable(model: nn.Module, mesh: DeviceMesh) -> None:
    """Refuse what cannot be sharded, before anything is sent."""
    require_device(model, mesh, allows_meta=True)
    named = dict(model.named_parameters())
    num_elements = sum(p.numel() for p in named.values())
    if num_elements < mesh.size():
        raise ValueError(
            f"the model has {num_elements} elements in {len(named)} parameters, fewer "
            f"than the axis has ranks ({mesh.size()}); use DataParallel, or a smaller "
            "axis"
        )
    require_dense(model)
    for name, parameter in named.items():
        if shard_of(parameter) is not None:
            raise ValueError(
                f"{name} is sharded already; shard a model once, as a whole"
            )
        release(name, parameter)


def require_plain_autograd() -> None:
    """Refuse to compute where no hook of autograd could gather a unit for backward."""
    is_inside = torch._C._functorch.maybe_current_level() is not None  # pyright: ignore
    if is_inside and torch.is_grad_enabled():
        raise RuntimeError(
            "a unit of fully_shard is called inside a transform of torch.func, which "
            "its backward pass would not notice; choose `units` so that the transform "
            "is inside one (units=[] makes the model a single unit)"
        )


def changed(name: str, what: str) -> ValueError:
    """Return the error for a model that was changed after it was cut."""
    return ValueError(
        f"{name} was {what} after fully_shard, which knows only the slices that it "
        "made; change the model first, then shard it"
    )
