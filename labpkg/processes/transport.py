"""How bytes move: for each collective the fastest exact way that the backend offers.

NCCL's own kernels are used as they are. CPU ranks of one host reduce and gather through
shared memory (`shared_memory`). gloo's reduce-scatter is an all-reduce in disguise, so
CPU ranks of several hosts exchange slices directly, which sends half the bytes. Both
add in rank order: the result is bitwise that of a sequential sum. Point-to-point calls
of gloo know no GPU tensors; they are staged through the CPU. At the debug level DETAIL
torch compares the collectives of all ranks, but not messages: gloo's own run then.

Every function starts the transfer and returns a `Transfer`: a handle to wait on and the
bytes that this rank sends under the algorithm that runs. Slices are those of
`torch.tensor_split`: the first may have one element more. torch's own collectives take
equal slices only, so for them they are padded.

References: Thakur, Rabenseifner, Gropp 2005, IJHPCA 19(1); Patarasuk and Yuan 2009,
JPDC 69(2).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from labpkg.planning.cost import wire_bytes
from labpkg.processes.shared_memory import Channel, combine_in_order, open_channel

# Named *_single from torch 2.13 on, where the old names warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)
_REDUCE_OPS = {
    "sum": ReduceOp.SUM,
    "mean": ReduceOp.AVG,
    "max": ReduceOp.MAX,
    "min": ReduceOp.MIN,
    "product": ReduceOp.PRODUCT,
}
REDUCTIONS = tuple(_REDUCE_OPS)
_channels: weakref.WeakKeyDictionary[ProcessGroup, Channel | None] = (
    weakref.WeakKeyDictionary()
)


class Work(Protocol):
    """A transfer in flight."""

    def wait(self) -> object:
        """Return when the result may be read (on a GPU: by the current stream)."""
        ...


class Transfer(NamedTuple):
    """A started transfer.

    Attributes:
        work: The handle to wait on.
        wire_bytes: What this rank sends for it.
        is_exchange: A collective made of messages, which torch's records do not show.
    """

    work: Work
    wire_bytes: float
    is_exchange: bool = False


class Done:
    """A transfer that has already ended."""

    def wait(self) -> None:
        """Return at once."""


class _Then:
    """Wait for some transfers, then finish with a function; once."""

    def __init__(self, works: list[Work], finish: Callable[[], object]) -> None:
        self.works, self.steps = works, [finish]

    def wait(self) -> None:
        while self.works:
            self.works.pop(0).wait()
        while self.steps:
            self.steps.pop()()


def uses_gloo(group: ProcessGroup, device: torch.device) -> bool:
    """Whether gloo moves the tensors of a device: a group may have several backends."""
    return group._get_backend(device).name() == "gloo"


def control_device(group: ProcessGroup) -> torch.device:
    """Return the device for control traffic: the CPU, if the group serves it."""
    cpu = torch.device("cpu")
    if cpu in group._device_types:
        return cpu
    return torch.device("cuda", torch.cuda.current_device())


def _averages(group: ProcessGroup, device: torch.device) -> bool:
    """Whether the backend itself divides: gloo does so correctly from torch 2.12 on."""
    return not uses_gloo(group, device) or torch.__version__ >= "2.12"


def _exchanges(group: ProcessGroup, x: Tensor) -> bool:
    """Whether slices of `x` travel as messages instead of in a collective of torch."""
    is_checked = dist.get_debug_level() == dist.DebugLevel.DETAIL
    return not is_checked and not x.is_cuda and uses_gloo(group, x.device)


def _shared(group: ProcessGroup, x: Tensor) -> Channel | None:
    """Return the shared memory for a collective on `x`, opened at first use."""
    if group.size() == 1 or not _exchanges(group, x):
        return None
    if group not in _channels:
        channel = _channels[group] = _open_channel(group, x.device)
        if channel is not None:  # the group must not keep the memory: only the queue
            weakref.finalize(group, channel.tasks.put, None)
    return _channels[group]


def use_messages(group: ProcessGroup) -> None:
    """Keep a group from shared memory, as if its ranks were on several hosts.

    Every rank of the group calls it before the first collective.
    """
    _channels[group] = None


def _open_channel(group: ProcessGroup, device: torch.device) -> Channel | None:
    def swap(value: Any) -> list[Any]:
        values: list[Any] = [None] * group.size()
        dist.all_gather_object(values, value, group=group)
        return values

    limit = group._get_backend(device).options._timeout
    return open_channel(
        group.rank(), group.size(), swap=swap, timeout_s=limit.total_seconds()
    )


def all_reduce(
    x: Tensor, group: ProcessGroup, op: str, *, ordered: bool = False
) -> Transfer:
    """Reduce `x` in place on all ranks; a ring sends 2 (n - 1) / n of its bytes.

    With `ordered` the terms are combined in rank order, whatever the backend does.
    """
    n = group.size()
    sent = wire_bytes("all_reduce", x.nbytes, n)
    if channel := _shared(group, x):
        return Transfer(channel.all_reduce(x.view(-1), op), sent, is_exchange=True)
    if ordered and n > 1:
        return _ordered_all_reduce(x, group, op)
    if op == "mean" and not _averages(group, x.device):
        work = dist.all_reduce(x, group=group, async_op=True)
        return Transfer(_Then([_work(work)], lambda: x.div_(n)), sent)
    work = dist.all_reduce(x, op=_REDUCE_OPS[op], group=group, async_op=True)
    return Transfer(_work(work), sent)


def _ordered_all_reduce(x: Tensor, group: ProcessGroup, op: str) -> Transfer:
    flat = x.view(-1)
    part = torch.empty_like(flat.tensor_split(group.size())[group.rank()])
    scattered = reduce_scatter(part, flat, group, op, ordered=True)
    gather = lambda: all_gather(flat, part, group).work.wait()
    both = _Then([scattered.work], gather)
    return Transfer(both, 2 * scattered.wire_bytes, scattered.is_exchange)


def reduce(x: Tensor, group: ProcessGroup, dst: int, op: str) -> Transfer:
    """Reduce `x` in place on rank `dst` of the group; elsewhere `x` becomes scratch."""
    n = group.size()
    root = dist.get_global_rank(group, dst)
    base = "sum" if op == "mean" else op
    work = dist.reduce(x, root, op=_REDUCE_OPS[base], group=group, async_op=True)
    # gloo: a ring reduce-scatter, then everybody's slice to the root; NCCL: a chain.
    is_gloo = uses_gloo(group, x.device)
    at_root = wire_bytes("reduce_scatter", x.nbytes, n) if is_gloo else 0.0
    sent = at_root if group.rank() == dst else float(x.nbytes)
    finish = (lambda: x.div_(n)) if op == "mean" else (lambda: None)
    return Transfer(_Then([_work(work)], finish), sent)


def broadcast(x: Tensor, group: ProcessGroup, src: int) -> Transfer:
    """Copy `x` of rank `src` of the group into `x` of every rank."""
    root = dist.get_global_rank(group, src)
    work = dist.broadcast(x, root, group=group, async_op=True)
    n, place = group.size(), (group.rank() - src) % group.size()
    if uses_gloo(group, x.device):
        # Binomial tree: in round k, rank p < 2^k sends to p + 2^k.
        rounds = range((n - 1).bit_length())
        copies = sum(place < 2**k and place + 2**k < n for k in rounds)
    else:  # a chain: every rank but the last passes it on
        copies = int(place < n - 1)
    return Transfer(_work(work), float(copies * x.nbytes))


def all_gather(out: Tensor, x: Tensor, group: ProcessGroup) -> Transfer:
    """Write the flat slices `x` of all ranks into the flat `out`, in rank order."""
    n, rank = group.size(), group.rank()
    sent = wire_bytes("all_gather", out.nbytes, n)
    if channel := _shared(group, out):
        return Transfer(channel.all_gather(out, x), sent, is_exchange=True)
    if _exchanges(group, x):
        parts = out.tensor_split(n)
        if parts[rank].data_ptr() != x.data_ptr():
            parts[rank].copy_(x)
        peers = [(rank + j) % n for j in range(1, n)]
        works = _exchange(
            dict.fromkeys(peers, parts[rank]), {p: parts[p] for p in peers}, group
        )
        return Transfer(_Then(works, lambda: None), sent, is_exchange=True)
    if out.numel() % n:
        rows = _padded_rows(out, n)
        own = rows[rank].clone()
        own[: x.numel()] = x
        transfer = all_gather(rows.view(-1), own, group)
        finish = lambda: _write_rows(rows, out)
        return transfer._replace(work=_Then([transfer.work], finish))
    work = _all_gather(out, x, group=group, async_op=True)
    return Transfer(_work(work), sent)


def reduce_scatter(
    out: Tensor, x: Tensor, group: ProcessGroup, op: str, *, ordered: bool = False
) -> Transfer:
    """Reduce flat `x` over the ranks and write this rank's slice into the flat `out`.

    gloo ranks on the CPU add the slices in rank order, whatever the arrival order,
    unless torch checks collectives; with `ordered` all do.
    """
    n, rank = group.size(), group.rank()
    sent = wire_bytes("reduce_scatter", x.nbytes, n)
    if channel := _shared(group, x):
        task = channel.reduce_scatter(out, x, op)
        return Transfer(task, sent, is_exchange=True)
    if _exchanges(group, x):
        return Transfer(_by_messages(out, x, group, op), sent, is_exchange=True)
    if x.numel() % n:
        rows = _padded_rows(x, n)
        own = rows.new_empty(rows.shape[1])
        transfer = reduce_scatter(own, rows.view(-1), group, op, ordered=ordered)
        finish = lambda: out.copy_(own[: out.numel()])
        return transfer._replace(work=_Then([transfer.work], finish))
    if ordered and n > 1:
        received = torch.empty_like(x)
        work = all_to_all(received, x, group).work
        rows = received.view(n, out.numel()).unbind()
        return Transfer(_Then([work], lambda: combine_in_order(rows, op, out)), sent)
    if not uses_gloo(group, x.device):
        work = _reduce_scatter(out, x, op=_REDUCE_OPS[op], group=group, async_op=True)
        return Transfer(_work(work), sent)
    if x.is_cuda:
        whole = x.clone()
        transfer = all_reduce(whole, group, op)
        finish = lambda: out.copy_(whole.view(n, out.numel())[rank])
        return Transfer(_Then([transfer.work], finish), transfer.wire_bytes)
    base = ReduceOp.SUM if op == "mean" else _REDUCE_OPS[op]
    work = _reduce_scatter(out, x, op=base, group=group, async_op=True)
    finish = (lambda: out.div_(n)) if op == "mean" else (lambda: None)
    run = wire_bytes("all_reduce", x.nbytes, n)  # which is what gloo does
    return Transfer(_Then([_work(work)], finish), run)


def _by_messages(out: Tensor, x: Tensor, group: ProcessGroup, op: str) -> Work:
    n, rank = group.size(), group.rank()
    parts = x.tensor_split(n)
    mine = {p: parts[p] for p in range(n) if p != rank}
    theirs = {p: torch.empty_like(parts[rank]) for p in mine}
    works = _exchange(mine, theirs, group)

    def add_in_rank_order() -> None:
        versions = [theirs.get(p, parts[rank]) for p in range(n)]
        if n > 1:
            combine_in_order(versions, op, out)
        else:
            out.copy_(parts[0])

    return _Then(works, add_in_rank_order)


def _padded_rows(flat: Tensor, n: int) -> Tensor:
    """Return the slices of `flat` as rows of one length, for backends that need it."""
    rows = flat.new_zeros(n, -(-flat.numel() // n))
    for row, part in zip(rows, flat.tensor_split(n), strict=True):
        row[: part.numel()] = part
    return rows


def _write_rows(rows: Tensor, flat: Tensor) -> None:
    for row, part in zip(rows, flat.tensor_split(len(rows)), strict=True):
        part.copy_(row[: part.numel()])


def all_to_all(out: Tensor, x: Tensor, group: ProcessGroup) -> Transfer:
    """Send slice p of flat `x` to rank p; slice p of `out` is what rank p sent."""
    sent = wire_bytes("all_to_all", x.nbytes, group.size())
    if x.is_cuda and uses_gloo(group, x.device):
        host_out, host_x = torch.empty_like(out, device="cpu"), x.cpu()
        work = dist.all_to_all_single(host_out, host_x, group=group, async_op=True)
        return Transfer(_Then([_work(work)], lambda: out.copy_(host_out)), sent)
    work = dist.all_to_all_single(out, x, group=group, async_op=True)
    return Transfer(_work(work), sent)


def send(x: Tensor, group: ProcessGroup, dst: int, tag: int) -> Transfer:
    """Send `x` to rank `dst` of the group. gloo waits until the receive is posted."""
    host = x.cpu() if uses_gloo(group, x.device) else x
    work = dist.isend(host, group=group, group_dst=dst, tag=tag)
    # The copy on the host must outlive the transfer: the closure holds it.
    return Transfer(_Then([_work(work)], lambda: host), float(x.nbytes))


def recv(out: Tensor, group: ProcessGroup, src: int, tag: int) -> Transfer:
    """Receive into `out` from rank `src` of the group."""
    staged = out.is_cuda and uses_gloo(group, out.device)
    host = torch.empty_like(out, device="cpu") if staged else out
    work = dist.irecv(host, group=group, group_src=src, tag=tag)
    finish = (lambda: out.copy_(host)) if staged else (lambda: None)
    return Transfer(_Then([_work(work)], finish), 0.0)


def sendrecv(
    x: Tensor, out: Tensor, group: ProcessGroup, dst: int, src: int
) -> Transfer:
    """Send `x` to rank `dst` of the group while `out` is filled by rank `src`."""
    return exchange([(x, dst, 0)], [(out, src, 0)], group)


def exchange(
    outgoing: list[tuple[Tensor, int, int]],
    incoming: list[tuple[Tensor, int, int]],
    group: ProcessGroup,
) -> Transfer:
    """Move several messages (tensor, peer, tag) at once, none waiting for another.

    NCCL runs one kernel, without tags: both ends of a pair name theirs in one order.
    """
    sent = float(sum(x.nbytes for x, _, _ in outgoing))
    tensors = [x for x, _, _ in (*outgoing, *incoming)]
    if uses_gloo(group, tensors[0].device):
        works = [recv(out, group, src, tag).work for out, src, tag in incoming]
        works += [send(x, group, dst, tag).work for x, dst, tag in outgoing]
    else:
        make = partial(dist.P2POp, group=group)
        ops = [make(dist.isend, x, group_peer=dst) for x, dst, _ in outgoing]
        ops += [make(dist.irecv, out, group_peer=src) for out, src, _ in incoming]
        works = [_work(work) for work in dist.batch_isend_irecv(ops)]
    # The closure holds what NCCL still reads or writes.
    return Transfer(_Then(works, lambda: tensors), sent)


def by_torch(collective: str, x: Tensor) -> Tensor:
    """Run torch's own call on all ranks, uncounted: the base of benchmarks.

    Args:
        collective: `all_reduce` (in place), `reduce_scatter` or `all_gather`.
        x: The flat input of this rank.
    """
    n = dist.get_world_size()
    if collective == "all_reduce":
        dist.all_reduce(x)
        return x
    gathers = collective == "all_gather"
    out = x.new_empty(x.numel() * n if gathers else x.numel() // n)
    (_all_gather if gathers else _reduce_scatter)(out, x)
    return out


def _exchange(
    mine: dict[int, Tensor], theirs: dict[int, Tensor], group: ProcessGroup
) -> list[Work]:
    """Send to and receive from every peer; receives first: gloo's sends wait."""
    works = [
        dist.irecv(part, group=group, group_src=p)
        for p, part in theirs.items()
        if part.numel()
    ]
    works += [
        dist.isend(part, group=group, group_dst=p)
        for p, part in mine.items()
        if part.numel()
    ]
    return [_work(work) for work in works]


def _work(work: dist.Work | None) -> Work:
    """Narrow torch's `Work | None`; None means that this rank is not in the group."""
    if work is None:
        raise ValueError("this rank is not part of the mesh axis; pass its own axis")
    return work
