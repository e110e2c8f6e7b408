"""Initial values: memory for a model that was built and cut without any.

A model built under `torch.device("meta")` has shapes only, so it can be cut, dealt out
and sharded before anybody has memory for the whole. `materialize` then gives each rank
its pieces. Each parameter is drawn whole, by a generator that knows nothing but the
seed and the parameter's name in the whole model; of what was drawn a rank keeps its
piece. So values do not depend on the layout, and no more than one parameter, or one
layer, is whole at a time.

Chapter: planning/device_mesh. Reference: Zhao et al. 2023, PyTorch FSDP, PVLDB 16(12):
3848-3860, arXiv:2304.11277 (deferred initialisation).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from labpkg.processes.cuts import cut_of
from labpkg.processes.flat import is_empty, mark_empty, shard_of
from labpkg.processes.pieces import whole_shape
from labpkg.processes.stages import Origin, Stage, tensors_of
from labpkg.processes.units import put_parameter

_Model = TypeVar("_Model", bound=nn.Module)
_Places = dict[Tensor, dict[tuple[nn.Module, str], None]]


@dataclass(eq=False, slots=True)
class _Draw:
    """What is drawn together: one parameter, or all that one layer has.

    Attributes:
        layer: The module in which the tensors are called as in `wanted`.
        key: Name in the whole model, which gives the seed.
        init: Draws a tensor by its name; None for the layer's `reset_parameters`.
        wanted: What this rank lacks, and its name in the layer.
    """

    layer: nn.Module
    key: str
    init: Callable[[str, Tensor], object] | None
    wanted: dict[Tensor, str] = field(default_factory=dict)


def materialize(
    model: _Model, *, seed: int = 0, device: torch.device | str | None = None
) -> _Model:
    """Give initial values to all of a model that has none, in place.

    What lies on "meta", and slices that `fully_shard` made of that, gets memory and
    values; the rest stays as it is. A value depends on the seed and on the name of the
    parameter in the whole model, not on how the model is cut: all layouts start
    bitwise equal on one kind of device. Ties stay ties. Buffers are treated alike.

    Where values come from: modules around a parameter, the outermost first, may have a
    method `init_parameter(name, tensor) -> bool`, which fills the whole tensor in place
    or returns False; if none fills it, `reset_parameters()` of the layer that has the
    parameter, as all layers of torch have it. Values that `__init__` alone would give
    are lost::

        with torch.device("meta"):
            model = lab.GPT(config)
        lab.apply_tensor_parallel(model, mesh["tp"], plan)  # before it is split
        stage = lab.split_stages(model, 4)[mesh["pp"].get_local_rank()]
        lab.fully_shard(stage, mesh["dp"])
        lab.materialize(stage, seed=0)  # then the pipeline, the optimizer

    Args:
        model: A model, one of its stages, or several in a `nn.ModuleList`. Tensors on
            "meta" become others: make what keeps them, as an optimizer, afterwards.
        seed: Where random numbers begin; those drawn elsewhere do not change.
        device: Where it gets memory; by default torch's default device. Slices lie on
            their mesh already.

    Returns:
        The same model.

    Raises:
        ValueError: Before anything is changed: if the device is "meta", if a tensor
            there is neither parameter nor buffer, or if nothing tells the values of a
            parameter. Later, if a value is not given after all, or has another shape.
    """
    device = torch.device(device) if device is not None else torch.get_default_device()
    if device.type == "meta":
        raise ValueError("a model has no values on 'meta'; choose 'cpu' or 'cuda'")
    _require_registered(model)
    stages = [m for m in model.modules() if isinstance(m, Stage) and m.origin]
    draws: dict[tuple[int, str], _Draw] = {}
    places: _Places = {}
    for part in stages or [model]:
        origin = part.origin if isinstance(part, Stage) else None
        origin = origin or Origin.of(model)
        _plan(part, origin, draws)
        _note_places((*origin.model.modules(), *part.modules()), places)
    for draw in draws.values():
        _fill(draw, places, seed, device)
    for stage in stages:
        stage.origin = None
    _require_filled(model)
    return model


def _require_registered(model: nn.Module) -> None:
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise ValueError(
                    f"{type(module).__name__}.{name} lies on 'meta' and is no buffer, "
                    "so nothing gives it a value; use register_buffer(..., "
                    "persistent=False)"
                )


def _plan(part: nn.Module, origin: Origin, draws: dict[tuple[int, str], _Draw]) -> None:
    """Add how each tensor of a part gets its value, or refuse."""
    whole = origin.model
    for own_name, tensor in tensors_of(part):
        if not is_empty(tensor):
            continue
        name = origin.names.get(own_name)
        if name is None:
            raise ValueError(
                f"{own_name} came to its stage after split_stages and has no value; "
                "add it before, or build it with memory"
            )
        found = _filled_by(name, tensor, whole)
        if found is None:
            _require_reset(name, whole)
            path, _, last = name.rpartition(".")
            # A layer's own name has a dot less than those of its parameters.
            draw = _Draw(whole.get_submodule(path), path, None)
            draw = draws.setdefault((id(whole), f"{path}."), draw)
        else:
            module, last = found
            init: Any = module.init_parameter
            draw = draws.setdefault((id(whole), name), _Draw(module, name, init))
        draw.wanted[tensor] = last


def _filled_by(
    name: str, tensor: Tensor, whole: nn.Module
) -> tuple[nn.Module, str] | None:
    """Return the module that says it fills a tensor, and the name that it has there."""
    parts = name.split(".")
    for depth in range(len(parts)):
        module: Any = whole.get_submodule(".".join(parts[:depth]))
        if not hasattr(module, "init_parameter"):
            continue
        inner = ".".join(parts[depth:])
        trial = torch.empty(whole_shape(tensor), dtype=tensor.dtype, device="meta")
        with torch.no_grad(), torch.random.fork_rng([]):
            answer = module.init_parameter(inner, trial)
        if not isinstance(answer, bool):
            raise ValueError(
                f"{type(module).__name__}.init_parameter({inner!r}, ...) returns "
                f"{answer!r}; let it return True if it fills the tensor, or False to "
                "leave it to the modules inside"
            )
        if answer:
            return module, inner
    return None


def _require_reset(name: str, whole: nn.Module) -> None:
    """Refuse a parameter unless its layer, and nothing around it, tells its value."""
    *path, _ = name.split(".")
    around = [whole.get_submodule(".".join(path[:i])) for i in range(len(path) + 1)]
    layer = around.pop()
    remedy = (
        "give the model a method init_parameter(name, tensor) -> bool, or build it "
        "with memory, not on 'meta'"
    )
    if not hasattr(layer, "reset_parameters"):
        raise ValueError(
            f"nothing tells the initial value of {name}: {type(layer).__name__} has no "
            f"reset_parameters(), which fills what a layer itself has; {remedy}"
        )
    for outer in around:
        if hasattr(outer, "reset_parameters") or hasattr(outer, "_reset_parameters"):
            raise ValueError(
                f"{type(outer).__name__}, around {name}, may reset it, too, and only "
                f"layers are asked for what they have themselves; {remedy}"
            )


def _note_places(modules: Iterable[nn.Module], places: _Places) -> None:
    """Add which modules keep a tensor, and as what."""
    for module in modules:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                places.setdefault(tensor, {})[module, name] = None


def _fill(draw: _Draw, places: _Places, seed: int, device: torch.device) -> None:
    """Draw, and keep this rank's pieces."""
    slices = [t for t in draw.wanted if not t.is_meta]
    device = slices[0].device if slices else device
    with _drawing(f"{seed} {draw.key}", device):
        if draw.init is None:
            values = _reset(draw.layer, device)
        else:
            values = {name: _scratch(t, device) for t, name in draw.wanted.items()}
            for name, value in values.items():
                draw.init(name, value)
            values = {name: v for name, v in values.items() if _may_be_filled(v)}
    found = []
    for tensor, name in draw.wanted.items():
        full_name = f"{draw.key}.{name}".lstrip(".") if draw.init is None else draw.key
        found.append((_checked(full_name, values.get(name), tensor), tensor))
    for value, tensor in found:
        _keep(value, tensor, places[tensor])


@contextmanager
def _drawing(key: str, device: torch.device) -> Iterator[None]:
    """Draw from a generator of this key inside the block, and from no other."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if is_cuda else []), torch.no_grad(), device:
        torch.default_generator.manual_seed(number)
        if is_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(number)
        yield


def _scratch(tensor: Tensor, device: torch.device) -> Tensor:
    """Return memory of the whole shape; what is not filled later can be told."""
    is_number = tensor.is_floating_point() or tensor.is_complex()
    value = float("nan") if is_number else 0
    shape = whole_shape(tensor)
    return torch.full(shape, value, dtype=tensor.dtype, device=device)


def _may_be_filled(scratch: Tensor) -> bool:
    """Return False if nobody wrote what has no nan to tell that."""
    has_nan = scratch.is_floating_point() or scratch.is_complex()
    return has_nan or scratch._version > 0


def _reset(layer: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Let a layer fill whole tensors of its own; it keeps what it had."""
    parameters, buffers = dict(layer._parameters), dict(layer._buffers)
    modules = dict(layer._modules)
    try:
        layer._modules.clear()  # those are drawn by themselves
        for name, p in parameters.items():
            if p is not None:
                scratch = _scratch(p, device)
                layer._parameters[name] = nn.Parameter(scratch, p.requires_grad)
        for name, b in buffers.items():
            layer._buffers[name] = None if b is None else _scratch(b, device)
        given = layer._parameters | layer._buffers
        layer.reset_parameters()  # pyright: ignore[reportCallIssue]
        found = layer._parameters | layer._buffers
        return {
            name: t.detach()
            for name, t in found.items()
            if t is not None and (t is not given.get(name) or _may_be_filled(t))
        }
    except AttributeError as error:
        if not modules:
            raise
        raise ValueError(
            f"{type(layer).__name__}.reset_parameters() fails alone ({error}); let it "
            "fill the layer's own parameters only, or give the model "
            "init_parameter(name, tensor) -> bool"
        ) from error
    finally:
        layer._parameters.update(parameters)
        layer._buffers.update(buffers)
        layer._modules.update(modules)


def _checked(name: str, value: Tensor | None, tensor: Tensor) -> Tensor:
    """Return a value; refuse what was not filled, or is something else."""
    if value is None:
        raise _not_filled(name)
    given = (tuple(value.shape), value.dtype)
    wanted = (tuple(whole_shape(tensor)), tensor.dtype)
    if given != wanted or value.is_meta:
        raise ValueError(
            f"{name} got a value {given} on {value.device}, not {wanted}; fill the "
            "tensor in place"
        )
    if value.isnan().any():
        raise _not_filled(name)
    return value


def _not_filled(name: str) -> ValueError:
    return ValueError(
        f"{name} was not filled (or with nan); let init_parameter, or reset_parameters "
        "of the layer, give all of it a value, in place"
    )


def _keep(
    whole: Tensor, tensor: Tensor, places: Iterable[tuple[nn.Module, str]]
) -> None:
    """Keep this rank's piece: in the slice, or in a tensor that takes the place."""
    cut, shard = cut_of(tensor), shard_of(tensor)
    piece = whole if cut is None else cut.take(whole)
    if shard is not None:
        tensor.detach().copy_(piece.reshape(-1)[shard.start : shard.stop])
        mark_empty(tensor, False)
        return
    if not isinstance(tensor, nn.Parameter):
        for module, name in places:
            module._buffers[name] = piece
        return
    parameter = nn.Parameter(piece, requires_grad=tensor.requires_grad)
    vars(parameter).update(vars(tensor))  # how it is cut, and what users note there
    for module, name in places:
        put_parameter(module, name, parameter)


def _require_filled(model: nn.Module) -> None:
    for name, tensor in tensors_of(model):
        if is_empty(tensor):
            raise ValueError(
                f"{name} lies beside the stages, which alone got values; materialize "
                "it by itself"
            )
