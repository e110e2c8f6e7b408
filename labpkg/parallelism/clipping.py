"""Clip the gradient to a norm that no cut of the model changes.

The norm of the whole gradient needs the sum of squares of all elements, each counted
once: what every rank has, locally, and what is cut over an axis, summed over it.

Chapter: parallelism/zero. Reference: Pascanu, Mikolov, Bengio 2013, On the difficulty
of training recurrent neural networks, arXiv:1211.5063.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes.collectives import all_reduce
from labpkg.processes.flat import shard_of


@torch.no_grad()
def clip_grad_norm(
    model_or_params: nn.Module | Tensor | Iterable[Tensor], max_norm: float
) -> Tensor:
    """Scale all gradients in place so that their joint L2 norm is at most `max_norm`.

    g <- g min(1, max_norm / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_` does in
    one process. Here the norm is that of the whole gradient under every engine: a
    gradient that `DataParallel` averaged is there on every rank and counts once, one
    that `ZeroOptimizer` or `fully_shard` cut is summed over its axis. Call it on every
    rank, between a synchronised backward and `step`; a rank without gradients too.

    Args:
        model_or_params: A model, or parameters, the same on every rank.
        max_norm: Above 0; `math.inf` measures without scaling.

    Returns:
        The norm before scaling, a scalar of float32 or float64, equal on all ranks. It
        is inf or nan if an element is; the gradients are then of no use, so skip the
        step, on every rank.

    Raises:
        ValueError: If `max_norm` is not above 0, or without parameters.

    Communication: an all_reduce of one float64 for each axis over which parameters are
    cut.

    Reference:
        Pascanu et al. 2013, arXiv:1211.5063.
    """
    if not max_norm > 0:  # also refuses nan
        raise ValueError(f"max_norm={max_norm} must be above 0; choose e.g. 1.0")
    parameters = _parameters_of(model_or_params)
    gradients: dict[DeviceMesh | None, list[Tensor]] = {}
    for parameter in parameters:
        shard = shard_of(parameter)
        axis, owner = (shard.mesh, shard.local) if shard else (None, parameter)
        # An axis enters by its parameters, so every rank makes the same calls.
        found = gradients.setdefault(axis, [])
        if owner.grad is not None:
            found.append(owner.grad)
    total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    for axis, owned in gradients.items():
        squares = _sum_of_squares(owned, total)
        total = total + (squares if axis is None else all_reduce(squares, axis))
    norm = total.sqrt()
    _scale(gradients.values(), (max_norm / (norm + 1e-6)).clamp(max=1.0))
    is_double = any(p.dtype in (torch.float64, torch.complex128) for p in parameters)
    return norm if is_double else norm.to(torch.float32)


def _parameters_of(model_or_params: nn.Module | Tensor | Iterable[Tensor]) -> list:
    if isinstance(model_or_params, nn.Module):
        model_or_params = model_or_params.parameters()
    one = isinstance(model_or_params, Tensor)
    parameters = [model_or_params] if one else list(model_or_params)
    if not parameters:
        raise ValueError(
            "there are no parameters, so there is no norm; pass the model, or a list: "
            "an iterator can be read only once"
        )
    return parameters


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


def _scale(gradients: Iterable[list[Tensor]], factor: Tensor) -> None:
    by_device: dict[torch.device, list[Tensor]] = {}
    for gradient in (g for owned in gradients for g in owned):
        by_device.setdefault(gradient.device, []).append(gradient)
    for device, owned in by_device.items():
        torch._foreach_mul_(owned, factor.to(device))
