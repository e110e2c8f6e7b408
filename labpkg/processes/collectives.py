"""Collectives: functions over one mesh axis, differentiable, counted, switchable.

Every rank of the axis calls the same function in the same order. These return new
tensors and carry gradients; their partners in `in_place`, whose names end in `_`, are
what engines use. A mesh is a one-dimensional `DeviceMesh` such as
`mesh["dp"]`, None means all ranks; `src` and `dst` are ranks of that axis.

All communication of the library passes through here, so that one place counts bytes
(`count_comms`), names profiler ranges, and can be switched off (`off`) to prove that a
test needs it.

# Note [adjoint]
Backward treats the job as one program whose loss is the sum of all ranks' losses. Then
the gradient of a linear collective is its transpose: all_reduce <-> all_reduce,
broadcast <-> reduce, all_gather <-> reduce_scatter, all_to_all <-> all_to_all.

Chapter: processes/collectives. Reference: Thakur, Rabenseifner, Gropp 2005, IJHPCA
19(1):49-66.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes import transport
from labpkg.processes.traffic import Axis, axis_of, count_comms, off, start

__all__ = ["count_comms", "off"]


def check_op(op: str, x: Tensor) -> None:
    """Refuse a reduction that no backend does exactly."""
    if op not in transport.REDUCTIONS:
        known = ", ".join(transport.REDUCTIONS)
        raise ValueError(f"op={op!r} is unknown; choose one of {known}")
    if op == "mean" and not (x.is_floating_point() or x.is_complex()):
        raise ValueError(
            f"op='mean' of {x.dtype} is not exact; convert to a float first"
        )
    if x.is_complex() and op not in ("sum", "mean"):
        raise ValueError(
            f"op={op!r} of {x.dtype}: no backend offers it; choose sum or mean"
        )


def _check_no_grad(op: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"op={op!r} carries no gradient; pass x.detach()")


def _check_dim(x: Tensor, dim: int, parts: int = 1) -> int:
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(
            f"dim={dim} does not exist in shape {tuple(x.shape)}; choose one that does "
            "(a scalar becomes a vector by x.reshape(1))"
        )
    if x.shape[dim] % parts:
        raise ValueError(
            f"dim {dim} has {x.shape[dim]} elements, not divisible by the {parts} "
            f"ranks of the axis; choose a multiple of {parts}"
        )
    return dim % x.ndim


class _Linear(torch.autograd.Function):
    """A collective and its transpose; see Note [adjoint]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable, transpose: Callable) -> Tensor:
        ctx.transpose = transpose
        return forward(x.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        return ctx.transpose(*grads), None, None


def differentiable_sum(x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply an all-reduce by sum, which is its own transpose; see Note [adjoint]."""
    return _Linear.apply(x, run, run)


def _all_reduce(x: Tensor, axis: Axis, op: str, ordered: bool) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    move = partial(transport.all_reduce, y, axis.group, op, ordered=ordered)
    start("all_reduce", axis, y.nbytes, move).wait()
    return y


def _reduce(x: Tensor, axis: Axis, dst: int, op: str) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    move = partial(transport.reduce, y, axis.group, dst, op)
    start("reduce", axis, y.nbytes, move).wait()
    return y if axis.rank == dst else y.zero_()


def _broadcast(x: Tensor, axis: Axis, src: int) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    move = partial(transport.broadcast, y, axis.group, src)
    start("broadcast", axis, y.nbytes, move).wait()
    return y


def _all_gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    part = x.movedim(dim, 0).contiguous()  # (K/n, ...)
    out = part.new_empty((axis.size * part.shape[0], *part.shape[1:]))  # (K, ...)
    flat, mine = out.view(-1), part.view(-1)
    move = partial(transport.all_gather, flat, mine, axis.group)
    local = lambda: flat.view(axis.size, -1).copy_(mine.expand(axis.size, -1))
    start("all_gather", axis, out.nbytes, move, local).wait()
    return out.movedim(0, dim)


def _reduce_scatter(
    x: Tensor, axis: Axis, dim: int, op: str, ordered: bool = False
) -> Tensor:
    whole = x.movedim(dim, 0).contiguous()  # (K, ...)
    out = whole.new_empty((whole.shape[0] // axis.size, *whole.shape[1:]))  # (K/n, ...)
    flat, mine = whole.view(-1), out.view(-1)
    move = partial(
        transport.reduce_scatter, mine, flat, axis.group, op, ordered=ordered
    )
    local = lambda: mine.copy_(flat.view(axis.size, -1)[axis.rank])
    start("reduce_scatter", axis, whole.nbytes, move, local).wait()
    return out.movedim(0, dim)


def _all_to_all(x: Tensor, axis: Axis, dim: int) -> Tensor:
    whole = x.movedim(dim, 0).contiguous()
    out = torch.empty_like(whole)
    move = partial(transport.all_to_all, out.view(-1), whole.view(-1), axis.group)
    start("all_to_all", axis, whole.nbytes, move, lambda: out.copy_(whole)).wait()
    return out.movedim(0, dim)


def all_reduce(
    x: Tensor,
    mesh: DeviceMesh | None = None,
    *,
    op: str = "sum",
    deterministic: bool = False,
) -> Tensor:
    """Return the reduction of `x` over the ranks of the axis, on every rank.

    With `deterministic` the terms are combined in rank order, ((x0 + x1) + x2) + ...:
    bitwise the result of one process that adds them one after the other, on every
    backend. Shared memory does so anyway; rings do not.

    Args:
        x: A tensor of the same shape and dtype on every rank.
        mesh: The axis; None means all ranks.
        op: `sum` or `mean` (differentiable), `max`, `min` or `product`.
        deterministic: Combine in rank order.

    Returns:
        A new tensor of the shape of `x`.

    Raises:
        ValueError: For an unknown `op`, an integer mean, a complex `op` other than sum
            and mean, a mesh of several axes, or a gradient through `max`, `min` or
            `product`.

    Communication: 2 (n - 1) / n of the bytes of `x` per rank forward, the same
    backward.

    Reference: Patarasuk and Yuan 2009, JPDC 69(2):117-124.
    """
    axis = axis_of(mesh)
    check_op(op, x)
    run = lambda t: _all_reduce(t, axis, op, deterministic)
    if op in ("sum", "mean"):
        return _Linear.apply(x, run, run)
    _check_no_grad(op, x)
    return run(x)


def reduce(
    x: Tensor, mesh: DeviceMesh | None = None, *, dst: int = 0, op: str = "sum"
) -> Tensor:
    """Return the reduction of `x` on rank `dst` of the axis, zeros on the others.

    Args:
        x: A tensor of the same shape and dtype on every rank.
        mesh: The axis; None means all ranks.
        dst: The rank of the axis that gets the result.
        op: `sum` or `mean` (differentiable), `max`, `min` or `product`.

    Returns:
        A new tensor of the shape of `x`.

    Raises:
        ValueError: As `all_reduce`; also if `dst` is not a rank of the axis.

    Communication: the bytes of `x` per rank; backward is a broadcast.
    """
    axis = axis_of(mesh)
    check_op(op, x)
    axis.check_rank("dst", dst)
    scale = axis.size if op == "mean" else 1
    if op in ("sum", "mean"):
        forward = lambda t: _reduce(t, axis, dst, op)
        return _Linear.apply(x, forward, lambda g: _broadcast(g, axis, dst) / scale)
    _check_no_grad(op, x)
    return _reduce(x, axis, dst, op)


def broadcast(x: Tensor, mesh: DeviceMesh | None = None, *, src: int = 0) -> Tensor:
    """Return on every rank the `x` of rank `src` of the axis.

    Args:
        x: A tensor of the same shape and dtype on every rank.
        mesh: The axis; None means all ranks.
        src: The rank of the axis whose values are returned.

    Returns:
        A new tensor of the shape of `x`.

    Raises:
        ValueError: If `src` is not a rank of the axis.

    Communication: the root sends `x` ceil(log2 n) times on gloo, once on NCCL;
    backward is a reduction to `src`.
    """
    axis = axis_of(mesh)
    axis.check_rank("src", src)
    forward = lambda t: _broadcast(t, axis, src)
    return _Linear.apply(x, forward, lambda g: _reduce(g, axis, src, "sum"))


def all_gather(x: Tensor, mesh: DeviceMesh | None = None, *, dim: int = 0) -> Tensor:
    """Concatenate the `x` of all ranks along `dim`, in rank order.

    Args:
        x: This rank's shard; the same shape and dtype on every rank.
        mesh: The axis; None means all ranks.
        dim: The dim to concatenate along.

    Returns:
        A new tensor; `dim` is n times as long.

    Raises:
        ValueError: If `dim` does not exist.

    Shape: x (..., K/n, ...) -> (..., K, ...).

    Communication: (n - 1) / n of the result's bytes per rank; backward is
    `reduce_scatter`.
    """
    axis = axis_of(mesh)
    dim = _check_dim(x, dim)
    forward = lambda t: _all_gather(t, axis, dim)
    return _Linear.apply(x, forward, lambda g: _reduce_scatter(g, axis, dim, "sum"))


def reduce_scatter(
    x: Tensor,
    mesh: DeviceMesh | None = None,
    *,
    dim: int = 0,
    op: str = "sum",
    deterministic: bool = False,
) -> Tensor:
    """Reduce `x` over the ranks and return this rank's slice along `dim`.

    With `deterministic` the slices are combined in rank order, as in `all_reduce`.
    Ranks on the CPU add in this order anyway (not in a `World` with `check=True`).

    Args:
        x: A tensor of the same shape and dtype on every rank.
        mesh: The axis; None means all ranks.
        dim: The dim to cut.
        op: `sum` or `mean` (differentiable), `max`, `min` or `product`.
        deterministic: Combine in rank order.

    Returns:
        A new tensor; `dim` is 1/n as long.

    Raises:
        ValueError: If `dim` is not divisible by the number of ranks; as `all_reduce`.

    Shape: x (..., K, ...) -> (..., K/n, ...).

    Communication: (n - 1) / n of the bytes of `x` per rank; backward is `all_gather`.
    """
    axis = axis_of(mesh)
    check_op(op, x)
    dim = _check_dim(x, dim, axis.size)
    scale = axis.size if op == "mean" else 1
    forward = lambda t: _reduce_scatter(t, axis, dim, op, deterministic)
    if op in ("sum", "mean"):
        return _Linear.apply(x, forward, lambda g: _all_gather(g, axis, dim) / scale)
    _check_no_grad(op, x)
    return forward(x)


def all_to_all(x: Tensor, mesh: DeviceMesh | None = None, *, dim: int = 0) -> Tensor:
    """Send slice p of `x` along `dim` to rank p; return the slices received, in order.

    Args:
        x: A tensor of the same shape and dtype on every rank.
        mesh: The axis; None means all ranks.
        dim: The dim that is cut into n slices.

    Returns:
        A new tensor of the shape of `x`.

    Raises:
        ValueError: If `dim` is not divisible by the number of ranks.

    Communication: (n - 1) / n of the bytes of `x` per rank, forward and backward.
    """
    axis = axis_of(mesh)
    dim = _check_dim(x, dim, axis.size)
    run = lambda t: _all_to_all(t, axis, dim)
    return _Linear.apply(x, run, run)
