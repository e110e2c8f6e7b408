"""Messages between two ranks, and the control traffic of a job.

`send`, `recv` and `sendrecv` move a tensor between ranks of an axis; `barrier` waits;
`all_gather_object` lets ranks agree on small Python values. All of it is counted and
switchable like the collectives.

Chapter: processes/collectives.
"""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes import transport
from labpkg.processes.collectives import all_gather, all_reduce
from labpkg.processes.traffic import Axis, axis_of, start


def send(x: Tensor, dst: int, mesh: DeviceMesh | None = None, *, tag: int = 0) -> None:
    """Send `x` to rank `dst` of the axis and return when it may be changed again.

    On gloo this is a rendezvous: it returns only after the receiver has asked. Two
    ranks that both send first wait for ever. NCCL has no tags: order decides.

    Args:
        x: The tensor; the receiver must expect its shape and dtype.
        dst: The receiving rank of the axis.
        mesh: The axis; None means all ranks.
        tag: Matches one send with one recv.

    Raises:
        ValueError: If `dst` is this rank or none of the axis, or if `x` needs a
            gradient, which a send does not carry.

    Communication: the bytes of `x`.
    """
    axis = axis_of(mesh)
    _check_peer("dst", dst, axis)
    _check_no_grad(x)
    x = x.contiguous()
    move = partial(transport.send, x, axis.group, dst, tag)
    start("send", axis, x.nbytes, move).wait()


def recv(
    like: Tensor, src: int, mesh: DeviceMesh | None = None, *, tag: int = 0
) -> Tensor:
    """Return the tensor that rank `src` of the axis sends; see `send`.

    Args:
        like: A tensor of the expected shape, dtype and device; it is not changed.
        src: The sending rank of the axis.
        mesh: The axis; None means all ranks.
        tag: Matches one send with one recv.

    Returns:
        A new tensor, without gradient.

    Raises:
        ValueError: If `src` is this rank or none of the axis.

    Communication: nothing is sent.
    """
    axis = axis_of(mesh)
    _check_peer("src", src, axis)
    out = torch.empty_like(like, memory_format=torch.contiguous_format).detach()
    move = partial(transport.recv, out, axis.group, src, tag)
    start("recv", axis, 0, move, out.zero_).wait()
    return out


def sendrecv(
    x: Tensor, like: Tensor, *, dst: int, src: int, mesh: DeviceMesh | None = None
) -> Tensor:
    """Send `x` to rank `dst` of the axis while receiving from rank `src`.

    The receive is posted first, so rings and swaps of any length cannot deadlock.

    Args:
        x: The tensor to send.
        like: A tensor of the shape, dtype and device that `src` sends.
        dst: The receiving rank of the axis.
        src: The sending rank of the axis; it may be `dst`.
        mesh: The axis; None means all ranks.

    Returns:
        A new tensor, without gradient.

    Raises:
        ValueError: If `dst` or `src` is this rank or none of the axis, or if `x` needs
            a gradient.

    Communication: the bytes of `x`.
    """
    axis = axis_of(mesh)
    _check_peer("dst", dst, axis)
    _check_peer("src", src, axis)
    _check_no_grad(x)
    x = x.contiguous()
    out = torch.empty_like(like, memory_format=torch.contiguous_format).detach()
    move = partial(transport.sendrecv, x, out, axis.group, dst, src)
    start("sendrecv", axis, x.nbytes, move, out.zero_).wait()
    return out


def _check_no_grad(x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("a message carries no gradient; pass x.detach()")


def _check_peer(name: str, rank: int, axis: Axis) -> None:
    axis.check_rank(name, rank)
    if rank == axis.rank:
        raise ValueError(f"{name}={rank} is this rank itself; choose another one")


def barrier(mesh: DeviceMesh | None = None) -> None:
    """Return once every rank of the axis has called; it moves no data of yours.

    Args:
        mesh: The axis; None means all ranks.

    Communication: an all_reduce of one float.
    """
    axis = axis_of(mesh)
    device = transport.control_device(axis.group)
    all_reduce(torch.zeros(1, device=device), mesh).item()


def all_gather_object(obj: Any, mesh: DeviceMesh | None = None) -> list[Any]:
    """Return the picklable `obj` of every rank, in rank order, on every rank.

    Args:
        obj: Any picklable value; only the own ranks' pickles are loaded.
        mesh: The axis; None means all ranks.

    Returns:
        A list of n values.

    Communication: (n - 1) times the longest pickle per rank, and 8 bytes for lengths.
    """
    axis = axis_of(mesh)
    device = transport.control_device(axis.group)
    data = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8).to(device)
    lengths = all_gather(torch.tensor([len(data)], device=device), mesh).tolist()
    padded = data.new_zeros(max(lengths))
    padded[: len(data)] = data
    rows = all_gather(padded, mesh).view(axis.size, -1).cpu()
    return [
        pickle.loads(row[:n].numpy().tobytes())
        for row, n in zip(rows, lengths, strict=True)
    ]
