"""Collectives and messages in place, for engines: start, compute, wait, read.

The partners of `collectives` with names that end in `_`. They write into memory of the
caller, carry no gradient and return a handle; until its `.wait()` has returned nobody
may read or change the tensors. Same rules: every rank of the axis calls the same
function in the same order, with the same shapes.

Chapter: parallelism/data_parallel. Reference: Thakur, Rabenseifner, Gropp 2005, IJHPCA
19(1):49-66.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes import transport
from labpkg.processes.collectives import check_op
from labpkg.processes.traffic import Axis, axis_of, start
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
    """Start writing the flat slices `x` of all ranks into the flat `out`, in order.

    The slices are those of `torch.tensor_split(out, n)`: the first K mod n ranks have
    one element more. Where n does not divide K, NCCL needs them padded: a copy more.

    Args:
        out: Where the whole goes.
        x: This rank's slice; it may be its place in `out`.
        mesh: The axis; None means all ranks.

    Returns:
        The transfer in flight; call `.wait()` before reading `out`.

    Raises:
        ValueError: If `x` has not the length of this rank's slice, or for a mesh of
            several axes.

    Shape: x (K/n,) -> out (K,).

    Communication: (n - 1) / n of the bytes of `out` per rank.
    """
    axis = axis_of(mesh)
    _check_slices(out, x, axis)
    move = partial(transport.all_gather, out, x, axis.group)
    return start("all_gather", axis, out.nbytes, move, partial(_repeat, out, x, axis))


def reduce_scatter_(
    out: Tensor,
    x: Tensor,
    mesh: DeviceMesh | None = None,
    *,
    op: str = "sum",
    deterministic: bool = False,
) -> Work:
    """Start reducing the flat `x` over the ranks; `out` gets this rank's slice.

    The slices are those of `torch.tensor_split(x, n)`; see `all_gather_`.

    Args:
        out: Where the slice goes; it may be its place in `x`.
        x: The flat tensor.
        mesh: The axis; None means all ranks.
        op: `sum`, `mean`, `max`, `min` or `product`.
        deterministic: Combine in rank order; see `collectives.all_reduce`.

    Returns:
        The transfer in flight; call `.wait()` before reading `out`.

    Raises:
        ValueError: If `out` has not the length of this rank's slice; as `all_reduce_`.

    Shape: x (K,) -> out (K/n,).

    Communication: (n - 1) / n of the bytes of `x` per rank.
    """
    axis = axis_of(mesh)
    check_op(op, x)
    _check_slices(x, out, axis)
    move = partial(
        transport.reduce_scatter, out, x, axis.group, op, ordered=deterministic
    )
    local = lambda: out.copy_(x.tensor_split(axis.size)[axis.rank].clone())
    return start("reduce_scatter", axis, x.nbytes, move, local)


def isend(x: Tensor, dst: int, mesh: DeviceMesh | None = None, *, tag: int = 0) -> Work:
    """Start sending a contiguous `x` to rank `dst` of the axis; see `messages.send`.

    Args:
        x: The tensor; the receiver must expect its shape and dtype.
        dst: The receiving rank of the axis.
        mesh: The axis; None means all ranks.
        tag: Matches one send with one receive; NCCL has none.

    Returns:
        The transfer in flight; call `.wait()` before changing `x`.

    Communication: the bytes of `x`.
    """
    axis = axis_of(mesh)
    _check_in_place(x)
    move = partial(transport.send, x, axis.group, dst, tag)
    return start("send", axis, x.nbytes, move)


def irecv(
    out: Tensor, src: int, mesh: DeviceMesh | None = None, *, tag: int = 0
) -> Work:
    """Start receiving into a contiguous `out` from rank `src` of the axis.

    Args:
        out: Where the message goes; of the shape and dtype that `src` sends.
        src: The sending rank of the axis.
        mesh: The axis; None means all ranks.
        tag: Matches one send with one receive; NCCL has none.

    Returns:
        The transfer in flight; call `.wait()` before reading `out`.

    Communication: nothing is sent.
    """
    axis = axis_of(mesh)
    _check_in_place(out)
    move = partial(transport.recv, out, axis.group, src, tag)
    return start("recv", axis, 0, move, out.zero_)


def exchange_(
    outgoing: list[tuple[Tensor, int, int]],
    incoming: list[tuple[Tensor, int, int]],
    mesh: DeviceMesh | None = None,
) -> Work:
    """Start several messages at once, none of which waits for another.

    Each is a contiguous tensor, a rank of the axis and a tag. On NCCL, which has no
    tags, both ends of a pair name their messages in the same order.

    Args:
        outgoing: What to send, and to whom.
        incoming: Where messages go, and from whom they come.
        mesh: The axis; None means all ranks.

    Returns:
        The transfers in flight; call `.wait()` before touching any of the tensors.

    Communication: the bytes of what is sent.
    """
    axis = axis_of(mesh)
    for x, _, _ in (*outgoing, *incoming):
        _check_in_place(x)
    move = partial(transport.exchange, outgoing, incoming, axis.group)
    local = lambda: [out.zero_() for out, _, _ in incoming]
    num_bytes = sum(x.nbytes for x, _, _ in outgoing)
    return start("send", axis, num_bytes, move, local)


def slice_bounds(num_elements: int, n: int, rank: int) -> tuple[int, int]:
    """Return where the slice of a rank begins and ends, as `torch.tensor_split` cuts.

    Args:
        num_elements: Length of the flat tensor.
        n: Ranks.
        rank: The rank that owns the slice.
    """
    short, num_longer = divmod(num_elements, n)
    first = rank * short + min(rank, num_longer)
    return first, first + short + (rank < num_longer)


def _repeat(out: Tensor, x: Tensor, axis: Axis) -> None:
    own = torch.cat([x, x.new_zeros(1)])  # slices may be longer than the own one
    for part in out.tensor_split(axis.size):
        part.copy_(own[: part.numel()])


def _check_slices(whole: Tensor, part: Tensor, axis: Axis) -> None:
    _check_in_place(whole)
    _check_in_place(part)
    first, last = slice_bounds(whole.numel(), axis.size, axis.rank)
    if whole.ndim != 1 or part.shape != (last - first,):
        raise ValueError(
            f"shapes {tuple(whole.shape)} and {tuple(part.shape)} are not a flat "
            f"tensor and the slice of rank {axis.rank} of {axis.size}, "
            f"({last - first},); cut it as torch.tensor_split does"
        )


def _check_in_place(x: Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(
            f"a tensor of strides {x.stride()} is not contiguous and cannot be used in "
            "place; pass x.contiguous() and keep the result"
        )
