"""All-reduce in three ways, from messages alone: the algorithms behind the collectives.

S is the bytes of the tensor, n the ranks of the axis. A ring sends the fewest bytes in
the most steps, recursive doubling the reverse; a tree lies between for its leaves and
loads its root. Which one is fastest depends on S: `labpkg.all_reduce_time` has the
formulas. They are for study and for networks where the library's choice is wrong;
`labpkg.all_reduce` takes what is fastest here.

Chapters: processes/collectives, processes/communication_cost. References: Thakur,
Rabenseifner, Gropp 2005, IJHPCA 19(1):49-66; Patarasuk and Yuan 2009, JPDC 69(2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes.collectives import differentiable_sum
from labpkg.processes.messages import recv, send, sendrecv
from labpkg.processes.traffic import axis_of


def ring_all_reduce(x: Tensor, mesh: DeviceMesh | None = None) -> Tensor:
    """Return the sum of `x` over the ranks, passed around a ring in n pieces.

    In step s rank r sends piece r - s to its right neighbour and adds what comes from
    the left: after n - 1 steps each rank holds one finished piece. In n - 1 more steps
    the finished pieces go round.

    Args:
        x: A tensor of the same shape and dtype on every rank; any number of elements.
        mesh: The axis; None means all ranks.

    Returns:
        A new tensor, bitwise equal on all ranks.

    Communication: 2 (n - 1) messages of S / n per rank, forward and backward.

    Reference: Patarasuk and Yuan 2009, JPDC 69(2):117-124.
    """
    return differentiable_sum(x, lambda t: _flat(t, lambda v: _ring(v, mesh)))


def tree_all_reduce(x: Tensor, mesh: DeviceMesh | None = None) -> Tensor:
    """Return the sum of `x` over the ranks: up a binomial tree to rank 0, and down.

    In round k the ranks that are odd multiples of 2^k send to the rank 2^k below and
    wait; then the sum goes back the same way.

    Args:
        x: A tensor of the same shape and dtype on every rank.
        mesh: The axis; None means all ranks.

    Returns:
        A new tensor, bitwise equal on all ranks.

    Communication: every rank but 0 sends S up; a rank sends S down to each child, rank
    0 to ceil(log2 n) of them. 2 ceil(log2 n) steps, forward and backward.

    Reference: Thakur, Rabenseifner, Gropp 2005, IJHPCA 19(1):49-66.
    """
    return differentiable_sum(x, lambda t: _flat(t, lambda v: _tree(v, mesh)))


def recursive_doubling_all_reduce(x: Tensor, mesh: DeviceMesh | None = None) -> Tensor:
    """Return the sum of `x` over the ranks, swapped with partners 1, 2, 4, ... away.

    After round k the ranks that agree in all bits but the lowest k + 1 hold one sum. If
    n is no power of two, the ranks from the largest power on first hand their tensor to
    a partner below, and get the sum from it in the end.

    Args:
        x: A tensor of the same shape and dtype on every rank.
        mesh: The axis; None means all ranks.

    Returns:
        A new tensor, bitwise equal on all ranks.

    Communication: log2 n messages of S per rank if n is a power of two, forward and
    backward.

    Reference: Thakur, Rabenseifner, Gropp 2005, IJHPCA 19(1):49-66.
    """
    return differentiable_sum(x, lambda t: _flat(t, lambda v: _doubling(v, mesh)))


def _flat(x: Tensor, reduce: Callable[[Tensor], None]) -> Tensor:
    """Reduce a copy of `x` as a vector."""
    copy = x.clone(memory_format=torch.contiguous_format)
    reduce(copy.view(-1))
    return copy


def _ring(x: Tensor, mesh: DeviceMesh | None) -> None:
    axis = axis_of(mesh)
    n, r = axis.size, axis.rank
    if n == 1:
        return
    pieces = x.tensor_split(n)  # views of x
    ends = {"dst": (r + 1) % n, "src": (r - 1) % n}
    for step in range(n - 1):  # reduce-scatter
        mine, theirs = pieces[(r - step) % n], pieces[(r - step - 1) % n]
        theirs += sendrecv(mine, theirs, mesh=mesh, **ends)
    for step in range(n - 1):  # all-gather
        mine, theirs = pieces[(r + 1 - step) % n], pieces[(r - step) % n]
        theirs.copy_(sendrecv(mine, theirs, mesh=mesh, **ends))


def _tree(x: Tensor, mesh: DeviceMesh | None) -> None:
    axis = axis_of(mesh)
    n, r = axis.size, axis.rank
    num_rounds = (n - 1).bit_length()
    # A rank sends up in the round of its lowest bit; until then it collects.
    my_round = (r & -r).bit_length() - 1 if r else num_rounds
    children = [r + 2**k for k in range(my_round) if r + 2**k < n]
    for child in children:
        x += recv(x, child, mesh)
    if r:
        parent = r - 2**my_round
        send(x, parent, mesh)
        x.copy_(recv(x, parent, mesh))
    for child in reversed(children):
        send(x, child, mesh)


def _doubling(x: Tensor, mesh: DeviceMesh | None) -> None:
    axis = axis_of(mesh)
    n, r = axis.size, axis.rank
    num_rounds = n.bit_length() - 1
    core = 2**num_rounds  # these ranks swap; the others have a partner among them
    if r >= core:
        send(x, r - core, mesh)
        x.copy_(recv(x, r - core, mesh))
        return
    if r + core < n:
        x += recv(x, r + core, mesh)
    for k in range(num_rounds):
        partner = r ^ 2**k
        # Both add the same two numbers, so they agree to the last bit.
        x += sendrecv(x, x, dst=partner, src=partner, mesh=mesh)
    if r + core < n:
        send(x, r + core, mesh)
