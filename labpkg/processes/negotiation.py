"""What the ranks of a pipeline agree on before a tensor moves.

Each rank knows its own stages only. At the start all tell each other which parameters
these have; before the first batch of a new shape, what each stage makes of what it
gets. A rank that finds something wrong tells the others, so that all of them raise the
same ValueError and none waits for a message that never comes.

Chapter: parallelism/pipeline.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from labpkg.planning.actions import Schedule
from labpkg.processes.collectives import all_gather
from labpkg.processes.mail import Spec, spec_of
from labpkg.processes.messages import all_gather_object
from labpkg.processes.replicas import require_dense, require_device
from labpkg.processes.stages import Stage
from labpkg.processes.traffic import always_on
from labpkg.processes.transport import control_device
from labpkg.processes.trials import undisturbed, without_gradients

T = TypeVar("T")


def agree(find: Callable[[], T], mesh: DeviceMesh) -> list[T]:
    """Return what each rank finds; raise on every rank what one of them raises.

    Args:
        find: Makes the value of this rank; it does not communicate.
        mesh: The axis.

    Raises:
        ValueError: If `find` raises one on some rank, with the text of the first.

    Communication: `all_gather_object`, also within `off`.
    """
    return _exchange(_attempt(find), mesh)


def agree_on_one(find: Callable[[], T], mesh: DeviceMesh) -> T:
    """Return what every rank finds, which has to be the same.

    Cheap, since it is done at each step: only ranks that differ tell each other how.

    Args:
        find: Makes the value of this rank; it does not communicate.
        mesh: The axis.

    Raises:
        ValueError: On every rank, if `find` raises one on some rank, or if values
            differ.

    Communication: `all_gather` of one number.
    """
    own = _attempt(find)
    device = control_device(mesh.get_group())
    number = torch.tensor([zlib.crc32(repr(own).encode())], device=device)
    value, problem = own
    if len(set(all_gather(number, mesh).tolist())) == 1 and problem is None:
        return value
    values = _exchange(own, mesh)
    rank = next(r for r, other in enumerate(values) if other != values[0])
    raise ValueError(
        f"rank {rank} of the pipeline calls with {values[rank]}, but rank 0 with "
        f"{values[0]}; make the same call with the same batch on every rank"
    )


def _attempt(find: Callable[[], T]) -> tuple[T, str | None]:
    """Return what `find` returns, or the text of its ValueError."""
    try:
        return find(), None
    except ValueError as error:
        return None, str(error)  # pyright: ignore[reportReturnType]


def _exchange(own: tuple[T, str | None], mesh: DeviceMesh) -> list[T]:
    with always_on():
        ranks = all_gather_object(own, mesh)
    for rank, (_, problem) in enumerate(ranks):
        if problem is not None:
            raise ValueError(f"rank {rank} of the pipeline: {problem}")
    return [value for value, _ in ranks]


class ParameterInfo(NamedTuple):
    """What other ranks know of a parameter."""

    number: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True, slots=True)
class StageInfo:
    """What other ranks know of a stage.

    Attributes:
        parameters: Its parameters by all of their names.
        part: Which units of a model it is, if `split_stages` made it.
    """

    parameters: dict[str, ParameterInfo]
    part: tuple[int, int, int] | None

    @property
    def trains(self) -> bool:
        """Whether some parameter needs a gradient."""
        return any(p.requires_grad for p in self.parameters.values())


def inner(module: nn.Module) -> nn.Module:
    """Return the stage inside a data-parallel wrapper, or the module itself.

    Args:
        module: What a rank runs as its stage.
    """
    inside = getattr(module, "module", None)
    if isinstance(inside, nn.Module) and hasattr(module, "no_sync"):
        return inside
    return module


def introduce(
    modules: list[nn.Module], schedule: Schedule, mesh: DeviceMesh
) -> dict[int, StageInfo]:
    """Tell all ranks about the stages of this one; return all stages.

    Args:
        modules: The stages of this rank, in the order of `schedule.stages_of`.
        schedule: Who does what; the same on every rank.
        mesh: The axis of the pipeline.

    Raises:
        ValueError: On every rank, if the schedule is one for another number of ranks or
            differs between ranks, if a rank has another number of stages, has them on
            another device, or has cut the model elsewhere.

    Communication: `all_gather_object` of about 100 bytes per parameter.
    """

    def find() -> tuple[str, dict[int, StageInfo]]:
        if schedule.num_ranks != mesh.size():
            raise ValueError(
                f"the schedule is one for {schedule.num_ranks} ranks, but the axis has "
                f"{mesh.size()}; make both of one size"
            )
        stages = schedule.stages_of(mesh.get_local_rank())
        if len(modules) != len(stages):
            raise ValueError(
                f"{len(modules)} modules for the stages {list(stages)} of this rank; "
                "pass [stages[s] for s in schedule.stages_of(rank)]"
            )
        for module in modules:
            require_device(module, mesh)
            require_dense(module)
        _check_objects(modules)
        infos = map(_info, modules)
        digest = hashlib.sha256(str(schedule.ranks).encode()).hexdigest()
        return digest, dict(zip(stages, infos, strict=True))

    ranks = agree(find, mesh)
    differing = [r for r, (digest, _) in enumerate(ranks) if digest != ranks[0][0]]
    if differing:
        raise ValueError(
            f"rank {differing[0]} of the pipeline has another schedule than rank 0; "
            "pass the same one on every rank"
        )
    stages = {stage: info for _, infos in ranks for stage, info in infos.items()}
    stages = dict(sorted(stages.items()))
    _check_cut(stages)
    _check_copies(stages)
    return stages


def _info(module: nn.Module) -> StageInfo:
    stage = inner(module)
    numbers = stage.numbers if isinstance(stage, Stage) else {}
    parameters = {
        name: ParameterInfo(numbers.get(name), tuple(p.shape), p.dtype, p.requires_grad)
        for name, p in module.named_parameters(remove_duplicate=False)
    }
    return StageInfo(parameters, stage.part if isinstance(stage, Stage) else None)


def _check_objects(modules: list[nn.Module]) -> None:
    """Refuse two tensors on one rank that are one parameter of the model."""
    copies: dict[int, tuple[str, Tensor]] = {}
    for module in modules:
        stage = inner(module)
        numbers = stage.numbers if isinstance(stage, Stage) else {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            number = numbers.get(name)
            if number is None:
                continue
            other, copy = copies.setdefault(number, (name, parameter))
            if copy is not parameter:
                raise ValueError(
                    f"{other} and {name} are one parameter of the model, but two "
                    "tensors on this rank; replace or copy its stages together"
                )


def _check_cut(stages: Mapping[int, StageInfo]) -> None:
    parts = {stage: info.part for stage, info in stages.items()}
    end, num_units = 0, (parts[0] or (0, 0, 0))[2]
    for stage, part in parts.items():
        if part is None:
            return
        end_here = part[2] if stage == len(parts) - 1 else part[1]
        if (part[0], part[1], part[2]) != (end, end_here, num_units):
            raise ValueError(
                f"stage {stage} holds the units {part[0]} to {part[1] - 1} of "
                f"{part[2]}, but the stage before ends with unit {end - 1}; pass stage "
                "s of one split_stages(model, num_stages) as stage s, cut alike on "
                "every rank"
            )
        end = part[1]


def _check_copies(stages: Mapping[int, StageInfo]) -> None:
    """Refuse tied copies that are not alike."""
    seen: dict[int, tuple[str, ParameterInfo]] = {}
    for info in stages.values():
        for name, parameter in info.parameters.items():
            if parameter.number is None:
                continue
            other, first = seen.setdefault(parameter.number, (name, parameter))
            if first != parameter:
                raise ValueError(
                    f"{other} {first.shape} and {name} {parameter.shape} are one "
                    "parameter of the model, but differ in shape, dtype or "
                    "requires_grad; treat both alike"
                )


class Call(NamedTuple):
    """What the ranks of a pipeline do next; the same on all of them.

    Attributes:
        x: The batch.
        y: Its targets, or None.
        autocast: The dtype of autocast, or None.
        training: Whether the modules are in training mode.
        backward: Whether gradients are wanted.
        record: Whether times are.
    """

    x: Spec
    y: Spec | None
    autocast: torch.dtype | None
    training: bool
    backward: bool
    record: bool


def check_batch(
    x: Tensor, y: Tensor | None, num_micro_batches: int, device: str, *, backward: bool
) -> None:
    """Refuse a batch that cannot be cut, or is not for this pipeline.

    Args:
        x: The batch.
        y: Its targets, or None.
        num_micro_batches: M.
        device: The kind of device that the mesh has.
        backward: Whether gradients are wanted.

    Raises:
        ValueError: If it is so.
    """
    if backward and not torch.is_grad_enabled():
        raise ValueError("a step needs gradients; call it outside torch.no_grad()")
    M = num_micro_batches
    for name, tensor in (("x", x), ("y", y)):
        if tensor is None:
            continue
        if tensor.dim() == 0 or not len(tensor) or len(tensor) % M:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} is not divisible into {M} "
                f"micro-batches; choose a batch that is a multiple of {M}"
            )
        if len(tensor) != len(x) or tensor.device.type != device:
            raise ValueError(
                f"{name} has {len(tensor)} rows on {tensor.device}, x has {len(x)} "
                f"and the mesh is one of {device}; let them match"
            )
        if backward and tensor.requires_grad:
            raise ValueError(
                f"{name} needs a gradient, which a step does not compute; pass "
                f"{name}.detach()"
            )


class Shapes(NamedTuple):
    """What passes between the stages for one shape of a batch.

    Attributes:
        inputs: What each stage takes, by its number.
        result: What the last one makes: the loss, or the output without one.
    """

    inputs: dict[int, Spec]
    result: Spec


def negotiate(
    modules: Mapping[int, nn.Module],
    num_stages: int,
    x: Tensor,
    finish: Callable[[Tensor], Tensor],
    mesh: DeviceMesh,
) -> Shapes:
    """Try each stage on what it will get, and tell all ranks what comes out.

    Stage after stage runs once without gradients; buffers and random numbers are given
    back. Only shapes and dtypes travel.

    Args:
        modules: The stages of this rank.
        num_stages: How many stages there are.
        x: A micro-batch.
        finish: Makes the loss from the output of the last stage.
        mesh: The axis of the pipeline.

    Raises:
        ValueError: On every rank, if a stage does not take what comes, does not return
            one tensor, or if the loss fails or is not one number.

    Communication: `all_gather_object` once per stage.
    """
    inputs, spec = {}, Spec(tuple(x.shape), x.dtype)
    for stage in range(num_stages):
        inputs[stage] = spec

        def find(stage: int = stage, spec: Spec = spec) -> Spec | None:
            if stage not in modules:
                return None
            with undisturbed([modules[stage]], x.device), without_gradients():
                # A copy, because a stage may change what it takes.
                trial = _sample(spec, x.device) if stage else x.clone()
                y = _try(modules[stage], stage, trial)
                return spec_of(y if stage < num_stages - 1 else _finish(finish, y))

        spec = next(found for found in agree(find, mesh) if found is not None)
    return Shapes(inputs, spec)


def _sample(spec: Spec, device: torch.device) -> Tensor:
    x = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
    return x.uniform_() if spec.dtype.is_floating_point else x


def _try(module: nn.Module, stage: int, x: Tensor) -> Tensor:
    try:
        y: Any = module(x)
    except Exception as error:
        source = f"stage {stage - 1} returns" if stage else "is a micro-batch"
        raise ValueError(
            f"stage {stage} does not take {spec_of(x)}, which {source}: "
            f"{type(error).__name__}: {error}; let the stages fit each other"
        ) from error
    if not isinstance(y, Tensor):
        raise ValueError(
            f"stage {stage} returns {type(y).__name__}; a stage takes one tensor and "
            "returns one"
        )
    return y


def _finish(finish: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    try:
        result: Any = finish(y)
    except Exception as error:
        raise ValueError(
            f"loss_fn does not take {spec_of(y)}, which the last stage returns: "
            f"{type(error).__name__}: {error}; check the targets and the last stage"
        ) from error
    if not isinstance(result, Tensor):
        raise ValueError(
            f"loss_fn returns {type(result).__name__}; it has to return a tensor that "
            "holds one number"
        )
    return result
