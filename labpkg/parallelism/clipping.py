"""Clip the gradient to a norm that no cut of the model changes.

The norm of the whole gradient needs the sum of squares of all elements, each counted
once: what every rank has, locally, and what is divided over an axis, summed over it.

Chapters: parallelism/zero, parallelism/tensor_parallel, parallelism/pipeline.
Reference: Pascanu, Mikolov, Bengio 2013, On the difficulty of training recurrent neural
networks, arXiv:1211.5063.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes.collectives import all_reduce
from labpkg.processes.cuts import cut_of, place_of
from labpkg.processes.flat import shard_of
from labpkg.processes.pieces import owner_of

# Over which axes a parameter is sliced, cut and dealt out. The stages of a pipeline
# hold other parameters, so they may differ in their other axes: those come first.
_Axes = tuple[DeviceMesh | None, ...]
_WHOLE: _Axes = (None, None, None)


@torch.no_grad()
def clip_grad_norm(
    model_or_params: nn.Module | Tensor | Iterable[Tensor], max_norm: float
) -> Tensor:
    """Scale all gradients in place so that their joint L2 norm is at most `max_norm`.

    g <- g min(1, max_norm / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_` does in
    one process. Here the norm is that of the whole gradient under every engine, and of
    engines inside one another: a gradient that is there on every rank counts once, as
    `DataParallel` leaves it, or layers that tensor parallelism did not cut. One that
    `ZeroOptimizer` or `fully_shard` slices, or tensor parallelism cuts, is summed over
    its axis; stages of a pipeline are summed, a tied parameter once. Call it on every
    rank, between a synchronised backward and `step`; a rank without gradients too.

    Args:
        model_or_params: A model, or parameters, the same on every rank. Pass a
            `Pipeline` itself: one of its stages may have no parameters.
        max_norm: Above 0; `math.inf` measures without scaling.

    Returns:
        The norm before scaling, a scalar equal on all ranks, of float64 if a parameter
        is or under a pipeline, else of float32. It is inf or nan if an element is; the
        gradients are then of no use, so skip the step, on every rank.

    Raises:
        ValueError: If `max_norm` is not above 0, or without parameters.

    Communication: an all_reduce for each axis over which parameters are divided, of one
    float64 for each way of dividing them further.

    Reference:
        Pascanu et al. 2013, arXiv:1211.5063.
    """
    if not max_norm > 0:  # also refuses nan
        raise ValueError(f"max_norm={max_norm} must be above 0; choose e.g. 1.0")
    parameters = _parameters_of(model_or_params)
    stages = _stages_of(model_or_params, parameters)
    if not parameters and stages is None:
        raise ValueError(
            "there are no parameters, so there is no norm; pass the model, or a list: "
            "an iterator can be read only once"
        )
    counted: dict[_Axes, list[Tensor]] = {(None, None, stages): []}
    gradients: list[Tensor] = []
    for parameter in parameters:
        # Axes enter by parameters, not gradients, so every rank makes the same calls.
        found = counted.setdefault(_axes_of(parameter), [])
        gradient, place = owner_of(parameter).grad, place_of(parameter)
        if gradient is not None:
            gradients.append(gradient)
            if place is None or place.counts:
                found.append(gradient)
    device = parameters[0].device if parameters else stages and stages.device_type
    zero = torch.zeros((), dtype=torch.float64, device=device)
    norm = _total({a: _sum_of_squares(g, zero) for a, g in counted.items()}).sqrt()
    _scale(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    is_double = any(p.dtype in (torch.float64, torch.complex128) for p in parameters)
    # A stage does not know the dtypes of the others.
    return norm if is_double or stages is not None else norm.to(torch.float32)


def _parameters_of(model_or_params: nn.Module | Tensor | Iterable[Tensor]) -> list:
    if isinstance(model_or_params, nn.Module):
        model_or_params = model_or_params.parameters()
    one = isinstance(model_or_params, Tensor)
    return [model_or_params] if one else list(model_or_params)


def _stages_of(model_or_params: Any, parameters: list[Tensor]) -> DeviceMesh | None:
    """Return the axis over which a model is dealt out; perhaps none of it lies here."""
    is_model = isinstance(model_or_params, nn.Module)
    owners = [model_or_params, *parameters] if is_model else parameters
    return next((place.mesh for place in map(place_of, owners) if place), None)


def _axes_of(parameter: Tensor) -> _Axes:
    marks = shard_of(parameter), cut_of(parameter), place_of(parameter)
    shards, cuts, stages = (mark.mesh if mark else None for mark in marks)
    return shards, cuts, stages


def _total(sums: dict[_Axes, Tensor]) -> Tensor:
    """Add up what lies on the ranks of one kind of axis after the other."""
    for kind in range(len(_WHOLE)):
        for mesh in dict.fromkeys(axes[kind] for axes in sums):
            if mesh is None:
                continue
            members = [axes for axes in sums if axes[kind] == mesh]
            parts = all_reduce(torch.stack([sums.pop(axes) for axes in members]), mesh)
            for axes, part in zip(members, parts, strict=True):
                rest = *axes[:kind], None, *axes[kind + 1 :]
                sums[rest] = sums[rest] + part if rest in sums else part
    return sums[_WHOLE]


def _sum_of_squares(gradients: list[Tensor], like: Tensor) -> Tensor:
    """Return a scalar as `like`; the norms themselves are at least float32."""
    half = [g for g in gradients if g.dtype in (torch.float16, torch.bfloat16)]
    full = [g for g in gradients if g.dtype not in (torch.float16, torch.bfloat16)]
    norms: list[Tensor] = []
    if half:
        norms += torch._foreach_norm(half, dtype=torch.float32)
    if full:
        norms += torch._foreach_norm(full)
    if not norms:
        return torch.zeros_like(like)
    return torch.stack([n.to(like) for n in norms]).square().sum()


def _scale(gradients: list[Tensor], factor: Tensor) -> None:
    by_device: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        by_device.setdefault(gradient.device, []).append(gradient)
    for device, owned in by_device.items():
        torch._foreach_mul_(owned, factor.to(device))
