"""Collectives in place, for engines: start a transfer, compute, wait, read.

The partners of `collectives` with names that end in `_`. They write into memory of the
caller, carry no gradient and return a handle; until its `.wait()` has returned nobody
may read or change the tensors. Same rules: every rank of the axis calls the same
function in the same order, with the same shapes.

Chapter: parallelism/data_parallel. Reference: Thakur, Rabenseifner, Gropp 2005, IJHPCA
19(1):49-66.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes import transport
from labpkg.processes.collectives import check_op
from labpkg.processes.traffic import axis_of, start
from labpkg.processes.transport import Work


def all_reduce_(
    x: Tensor,
    mesh: DeviceMesh | None = None,
    *,
    op: str = "sum",
    deterministic: bool = False,
) -> Work:
    """Start reducing a contiguous `x` in place on all ranks; no gradient flows.

    Args:
        x: The tensor, of the same shape and dtype on every rank.
        mesh: The axis; None means all ranks.
        op: `sum`, `mean`, `max`, `min` or `product`.
        deterministic: Combine in rank order; see `all_reduce`.

    Returns:
        The transfer in flight; call `.wait()` before reading `x`.

    Raises:
        ValueError: For an unknown `op`, an integer mean, a complex `op` other than sum
            and mean, or a mesh of several axes.

    Communication: 2 (n - 1) / n of the bytes of `x` per rank.
    """
    axis = axis_of(mesh)
    check_op(op, x)
    _check_in_place(x)
    move = partial(transport.all_reduce, x, axis.group, op, ordered=deterministic)
    return start("all_reduce", axis, x.nbytes, move)


def broadcast_(x: Tensor, mesh: DeviceMesh | None = None, *, src: int = 0) -> Work:
    """Start copying a contiguous `x` of rank `src` into `x` of every rank.

    Args:
        x: The tensor, of the same shape and dtype on every rank.
        mesh: The axis; None means all ranks.
        src: The rank of the axis whose values win.

    Returns:
        The transfer in flight; call `.wait()` before reading `x`.

    Raises:
        ValueError: If `src` is not a rank of the axis.

    Communication: the root sends the tensor ceil(log2 n) times on gloo, once on NCCL.
    """
    axis = axis_of(mesh)
    axis.check_rank("src", src)
    _check_in_place(x)
    move = partial(transport.broadcast, x, axis.group, src)
    return start("broadcast", axis, x.nbytes, move)


def all_gather_(out: Tensor, x: Tensor, mesh: DeviceMesh | None = None) -> Work:
    """Start writing the flat `x` of all ranks into the flat `out`, in rank order.

    Args:
        out: Where the whole goes, n times as long as `x`.
        x: This rank's slice; it may be its place in `out`.
        mesh: The axis; None means all ranks.

    Returns:
        The transfer in flight; call `.wait()` before reading `out`.

    Raises:
        ValueError: If `out` is not n times as long as `x`, or for a mesh of several
            axes.

    Shape: x (K/n,) -> out (K,).

    Communication: (n - 1) / n of the bytes of `out` per rank.
    """
    axis = axis_of(mesh)
    _check_slices(out, x, axis.size)
    move = partial(transport.all_gather, out, x, axis.group)
    local = lambda: out.view(axis.size, -1).copy_(x.clone().expand(axis.size, -1))
    return start("all_gather", axis, out.nbytes, move, local)


def reduce_scatter_(
    out: Tensor,
    x: Tensor,
    mesh: DeviceMesh | None = None,
    *,
    op: str = "sum",
    deterministic: bool = False,
) -> Work:
    """Start reducing the flat `x` over the ranks; `out` gets this rank's slice.

    Args:
        out: Where the slice goes; it may be its place in `x`.
        x: The flat tensor, n times as long as `out`.
        mesh: The axis; None means all ranks.
        op: `sum`, `mean`, `max`, `min` or `product`.
        deterministic: Combine in rank order; see `collectives.all_reduce`.

    Returns:
        The transfer in flight; call `.wait()` before reading `out`.

    Raises:
        ValueError: If `x` is not n times as long as `out`; as `all_reduce_`.

    Shape: x (K,) -> out (K/n,).

    Communication: (n - 1) / n of the bytes of `x` per rank.
    """
    axis = axis_of(mesh)
    check_op(op, x)
    _check_slices(x, out, axis.size)
    move = partial(
        transport.reduce_scatter, out, x, axis.group, op, ordered=deterministic
    )
    local = lambda: out.copy_(x.view(axis.size, -1)[axis.rank].clone())
    return start("reduce_scatter", axis, x.nbytes, move, local)


def _check_slices(whole: Tensor, part: Tensor, n: int) -> None:
    _check_in_place(whole)
    _check_in_place(part)
    if whole.shape != (n * part.numel(),) or part.ndim != 1:
        raise ValueError(
            f"shapes {tuple(whole.shape)} and {tuple(part.shape)} are not flat with "
            f"one slice for each of {n} ranks; pad to a multiple of {n} elements"
        )


def _check_in_place(x: Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(
            f"a tensor of strides {x.stride()} is not contiguous and cannot be used in "
            "place; pass x.contiguous() and keep the result"
        )
