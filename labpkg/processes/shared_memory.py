"""Collectives of CPU ranks on one host through shared memory, as NCCL does in a node.

Each rank owns a buffer that its peers can read, and a socket to each peer. A phase is:
write into the own buffer, tell every peer, hear from every peer, read. A reduce-scatter
is one phase (write the slices of the others, add all versions of the own slice in rank
order), an all-gather another, and an all-reduce is both, so each rank is read for
2 (n - 1) / n of the bytes, as on a ring. The order of addition makes the result bitwise
that of a sequential sum.

# Note [two halves]
Phases use the halves of the buffers in turn. Who has heard from a peer in phase k + 1
knows that it has read all of phase k, so in phase k + 2 that half may be overwritten.

Buffers are memory files without a name and sockets are abstract, so a killed rank
leaves nothing behind. A socket that closes means that a peer is gone. Linux only.

Chapter: processes/collectives. Reference: Thakur, Rabenseifner, Gropp 2005, IJHPCA
19(1):49-66.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import secrets
import socket
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_HALF_BYTES = 2 * 2**20  # small enough to stay in the cache; larger tensors in parts
_ALIGNMENT = 64
_LONGEST_MESSAGE = 256
_COMBINE = {
    "sum": torch.add,
    "mean": torch.add,
    "product": torch.mul,
    "max": torch.maximum,
    "min": torch.minimum,
}


def combine_in_order(versions: Sequence[Tensor], op: str, out: Tensor) -> None:
    """Reduce at least two versions from left to right into `out`, which may be one."""
    combine, total = _COMBINE[op], out
    if any(out.data_ptr() == version.data_ptr() for version in versions[2:]):
        total = torch.empty_like(out)  # that version is read after the first sum
    combine(versions[0], versions[1], out=total)
    for version in versions[2:]:
        combine(total, version, out=total)
    if op == "mean":
        total.div_(len(versions))
    if total is not out:
        out.copy_(total)


@cache
def _check_combines(op: str, dtype: torch.dtype) -> None:
    """Refuse before anything is sent: an error in the thread breaks the channel."""
    one, other, total = torch.zeros(3, 1, dtype=dtype, device="cpu").unbind()
    try:
        combine_in_order([one, other], op, total)
    except RuntimeError as error:
        raise ValueError(
            f"op={op!r} of {dtype} is not offered on the CPU; convert to another dtype "
            "first"
        ) from error


class MismatchError(RuntimeError):
    """Ranks of one axis called different collectives.

    Args:
        calls: What each rank called.
        call: What this rank called.
    """

    def __init__(self, calls: dict[int, str], call: str) -> None:
        said = ", ".join(f"{calls[rank]} on rank {rank}" for rank in sorted(calls))
        super().__init__(
            f"ranks of one axis called different collectives: {said}; all must make "
            "the same calls in the same order"
        )
        self.call = call


class Task:
    """A collective in flight: runs in the thread of its channel.

    Args:
        call: What the rank called.
        run: Does it, given the call.
    """

    def __init__(self, call: str, run: Callable[[str], None]) -> None:
        self.call = call
        self._run: Callable[[str], None] | None = run
        self._error: BaseException | None = None
        self._ended = threading.Event()

    def do(self, broken: BaseException | None) -> BaseException | None:
        """Run, unless an error has broken the channel; return the error, if any."""
        self._error = broken
        try:
            if broken is None and self._run is not None:
                self._run(self.call)
        except BaseException as error:
            self._error = error
        self._run = None  # it holds tensors, and a handle may be kept for long
        self._ended.set()
        return self._error

    def wait(self) -> None:
        """Return when the result may be read; raise what went wrong."""
        self._ended.wait()
        if self._error is not None:
            raise self._error


class Channel:
    """Shared memory and sockets between the ranks of a group on one host.

    Collectives run in a thread of the channel, in the order of their calls. Tensors are
    flat and on the CPU; every rank passes the same shapes.

    Args:
        rank: This rank's place in the group.
        peers: A connected socket for each other rank.
        buffers: Each rank's buffer as bytes, in rank order.

    Attributes:
        tasks: What the thread will do; None ends it and gives up the sockets.
        call: What the thread is doing, or "".
    """

    def __init__(
        self, rank: int, peers: dict[int, socket.socket], buffers: list[Tensor]
    ) -> None:
        self.rank, self.size = rank, len(buffers)
        self._peers, self._buffers = peers, buffers
        self._stride = _HALF_BYTES // self.size // _ALIGNMENT * _ALIGNMENT
        self._half = 0
        self.call, self._is_forked = "", False
        _channels.add(self)
        self.tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def all_reduce(self, x: Tensor, op: str) -> Task:
        """Reduce `x` in place on all ranks."""
        _check_combines(op, x.dtype)
        call = f"all_reduce {op} of {x.numel()} {x.dtype}"
        return self._submit(call, partial(self._all_reduce, x, op))

    def reduce_scatter(self, out: Tensor, x: Tensor, op: str) -> Task:
        """Reduce `x` over the ranks; write this rank's slice of it into `out`."""
        _check_combines(op, x.dtype)
        call = f"reduce_scatter {op} of {x.numel()} {x.dtype}"
        return self._submit(call, partial(self._reduce_scatter, out, x, op))

    def all_gather(self, out: Tensor, x: Tensor) -> Task:
        """Write the slices `x` of all ranks into `out`, in rank order."""
        call = f"all_gather of {out.numel()} {out.dtype}"
        return self._submit(call, partial(self._all_gather, out, x))

    def _submit(self, call: str, run: Callable[[str], None]) -> Task:
        if self._is_forked:
            raise RuntimeError(
                f"{call} in a fork of a rank, such as a worker of a DataLoader, which "
                "is no rank itself; call it in the rank"
            )
        task = Task(call, run)
        self.tasks.put(task)
        return task

    def _work(self) -> None:
        broken = None
        with torch.inference_mode():  # so that tensors of both modes can be written
            while (task := self.tasks.get()) is not None:
                self.call = task.call
                broken = task.do(broken) or broken
                self.call = ""
                if broken is not None:  # peers must not wait for this rank
                    self.hang_up()
        self.hang_up()

    def hang_up(self) -> None:
        """Close this process's ends of the sockets."""
        for peer in self._peers.values():
            peer.close()

    def leave_to_parent(self) -> None:
        """Be the channel of a process that is no rank: without sockets and thread."""
        self._is_forked = True
        self.hang_up()

    def _all_reduce(self, x: Tensor, op: str, call: str) -> None:
        for part in x.split(self._stride // x.element_size() * self.size):
            slices = part.tensor_split(self.size)
            own = slices[self.rank]
            versions = self._trade(slices, call)
            self._half ^= 1  # the sum goes where the peers will read it
            total = self._view(self.rank, 0, own)
            combine_in_order(versions, op, total)
            own.copy_(total)
            self._meet(call)
            for p in self._peers:
                slices[p].copy_(self._view(p, 0, slices[p]))
            self._half ^= 1

    def _reduce_scatter(self, out: Tensor, x: Tensor, op: str, call: str) -> None:
        for parts, now in self._parts(x, self._stride):
            combine_in_order(self._trade(parts, call), op, out[now])
            self._half ^= 1

    def _all_gather(self, out: Tensor, x: Tensor, call: str) -> None:
        out_of_place = x.data_ptr() != out.tensor_split(self.size)[self.rank].data_ptr()
        for parts, now in self._parts(out, _HALF_BYTES):
            self._view(self.rank, 0, x[now]).copy_(x[now])
            self._meet(call)
            if out_of_place:
                parts[self.rank].copy_(x[now])
            for p in self._peers:
                parts[p].copy_(self._view(p, 0, parts[p]))
            self._half ^= 1

    def _parts(self, x: Tensor, size: int) -> Iterator[tuple[list[Tensor], slice]]:
        """Yield a part of each rank's slice of `x`, and where it lies in the slice."""
        slices, step = x.tensor_split(self.size), size // x.element_size()
        for start in range(0, max(1, len(slices[0])), step):
            now = slice(start, start + step)
            yield [part[now] for part in slices], now

    def _trade(self, slices: Sequence[Tensor], call: str) -> list[Tensor]:
        """Offer each peer its slice; return all versions of the own one, by rank."""
        for p in self._peers:
            self._view(self.rank, p, slices[p]).copy_(slices[p])
        self._meet(call)
        own = slices[self.rank]
        return [
            own if p == self.rank else self._view(p, self.rank, own)
            for p in range(self.size)
        ]

    def _view(self, rank: int, place: int, like: Tensor) -> Tensor:
        """Return a place in the current half of a rank's buffer, as long as `like`."""
        start = self._half * _HALF_BYTES + place * self._stride
        return self._buffers[rank][start : start + like.nbytes].view(like.dtype)

    def _meet(self, call: str) -> None:
        """Tell every peer which call this is, then hear the same from every peer."""
        for peer in self._peers.values():
            with contextlib.suppress(ConnectionError):  # what it said is still there
                peer.send(call.encode())
        calls = {rank: self._hear(rank, call) for rank in self._peers}
        if any(heard != call for heard in calls.values()):
            raise MismatchError({self.rank: call, **calls}, call)

    def _hear(self, rank: int, call: str) -> str:
        peer = self._peers[rank]
        try:
            try:
                heard = peer.recv(_LONGEST_MESSAGE)
            except ConnectionResetError:  # it left without reading; its words come next
                heard = peer.recv(_LONGEST_MESSAGE)
        except TimeoutError:
            raise RuntimeError(
                f"rank {rank} did not join {call} within {peer.gettimeout():g} s"
            ) from None
        if not heard:
            raise RuntimeError(f"Connection closed by peer: rank {rank} has left")
        return heard.decode()


# A worker of a DataLoader is a fork of its rank. Did it keep the sockets open, peers
# would wait for a rank that has left.
_channels: weakref.WeakSet[Channel] = weakref.WeakSet()


def _leave_to_parent() -> None:
    for channel in list(_channels):
        channel.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def calls_in_flight() -> list[str]:
    """Return what the threads of this process's channels are doing."""
    return [call for channel in list(_channels) if (call := channel.call)]


def open_channel(
    rank: int, size: int, *, swap: Callable[[Any], list[Any]], timeout_s: float
) -> Channel | None:
    """Return a channel between the ranks of a group, which all call this at once.

    Args:
        rank: This rank's place in the group.
        size: Ranks in the group, at least two.
        swap: Returns the small values of all ranks, in rank order.
        timeout_s: How long to wait for a peer.

    Returns:
        The channel; on every rank None if the ranks are on several hosts or if the
        system offers no such memory.
    """
    own = _Offer.make(size, timeout_s)
    offers = swap(own and (own.host, own.address))
    hosts = {offer and offer[0] for offer in offers}
    if own is None:
        return None
    if len(hosts) > 1:
        own.withdraw()
        return None
    return own.accept(rank, [address for _, address in offers])


class _Offer:
    """This rank's buffer and the address at which it can be had."""

    def __init__(self, file: int, listener: socket.socket, host: str) -> None:
        self.file, self.listener, self.host = file, listener, host
        self.address = listener.getsockname().decode()

    @classmethod
    def make(cls, size: int, timeout_s: float) -> _Offer | None:
        if not sys.platform.startswith("linux"):
            return None
        try:
            file = os.memfd_create("labpkg-shared")
            os.ftruncate(file, 2 * _HALF_BYTES)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listener.settimeout(timeout_s)
            listener.bind(f"\0labpkg-{secrets.token_hex(16)}")
            listener.listen(size)
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            # Abstract names are per network.
            network = os.stat("/proc/self/ns/net").st_ino
        except OSError:
            return None
        return cls(file, listener, f"{boot} {network} {os.getuid()}")

    def withdraw(self) -> None:
        self.listener.close()
        os.close(self.file)

    def accept(self, rank: int, addresses: list[str]) -> Channel:
        """Connect to the ranks below, accept those above, swap files with all."""
        peers: dict[int, socket.socket] = {}
        files = {rank: self.file}
        for p in range(rank):
            peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            peer.settimeout(self.listener.gettimeout())
            peer.connect(addresses[p])
            peers[p], files[p] = peer, self._swap(peer, rank)[1]
        while len(files) < len(addresses):
            peer = self.listener.accept()[0]
            if _user_of(peer) != os.getuid():  # names of sockets are no secret
                peer.close()
                continue
            peer.settimeout(self.listener.gettimeout())
            p, file = self._swap(peer, rank)
            peers[p], files[p] = peer, file
        self.listener.close()
        buffers = [_mapped(files[p]) for p in range(len(addresses))]
        return Channel(rank, dict(sorted(peers.items())), buffers)

    def _swap(self, peer: socket.socket, rank: int) -> tuple[int, int]:
        socket.send_fds(peer, [str(rank).encode()], [self.file])
        message, files, _, _ = socket.recv_fds(peer, _LONGEST_MESSAGE, 1)
        if not files:
            raise RuntimeError("Connection closed by peer: a rank left while joining")
        return int(message), files[0]


def _user_of(peer: socket.socket) -> int:
    sizes = struct.Struct("iII")  # process, user, group
    data = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, sizes.size)
    return sizes.unpack(data)[1]


def _mapped(file: int) -> Tensor:
    memory = mmap.mmap(file, 2 * _HALF_BYTES)
    os.close(file)
    return torch.frombuffer(memory, dtype=torch.uint8)
