"""Mail: the messages of a pipeline, moved while their ends compute.

A rank that walks through its actions takes a tensor before some of them and puts one
after some. `Mailbox` posts receives ahead of time, because a send of gloo waits for its
receive, and waits for no send until the schedule proves that it has arrived.
`OrderedMailbox` is for NCCL, whose messages meet in the order of the calls: the ranks
exchange the messages of each tick of the schedule in one batch, after its actions, so
they never wait for each other in a cycle.

Chapter: parallelism/pipeline. Reference: Narayanan et al. 2021, arXiv:2104.04473.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from labpkg.planning.actions import Action, Message, Schedule
from labpkg.processes.in_place import exchange_, irecv, isend
from labpkg.processes.transport import Work

_AHEAD = 8  # receives that are posted and not yet used


class Spec(NamedTuple):
    """What a tensor on its way looks like."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.shape} {str(self.dtype).removeprefix('torch.')}"

    def zeros(self, device: torch.device) -> Tensor:
        """Return such a tensor of zeros.

        Args:
            device: Where it lies.
        """
        return torch.zeros(self.shape, dtype=self.dtype, device=device)


def spec_of(x: Tensor) -> Spec:
    """Return what a tensor looks like."""
    return Spec(tuple(x.shape), x.dtype)


@dataclass(frozen=True, slots=True)
class Route:
    """What one rank sends and receives in one pass.

    Attributes:
        messages: The messages of this rank, by tick.
        incoming: Those that it receives, in the order of use.
        outgoing: Those that it sends, by the action that makes them.
        arrived: For each action that uses a message, those of this rank's earlier
            sends that must have arrived when it comes, in the form of their producers.
        ticks: When each action of this rank runs.
    """

    messages: tuple[Message, ...]
    incoming: tuple[Message, ...]
    outgoing: dict[Action, Message]
    arrived: dict[Action, list[Action]]
    ticks: dict[Action, int]


def route_of(
    schedule: Schedule, rank: int, carries: Callable[[Message], bool]
) -> Route:
    """Return what a rank sends and receives.

    Args:
        schedule: Who does what.
        rank: The rank.
        carries: Whether a message of the schedule is sent at all.
    """
    steps = [{a: i for i, a in enumerate(actions)} for actions in schedule.ranks]
    messages = tuple(filter(carries, schedule.messages(rank)))
    step_of = steps[rank]
    incoming = sorted(
        (m for m in messages if m.dst == rank), key=lambda m: step_of[m.consumer]
    )
    outgoing = {m.producer: m for m in messages if m.src == rank}
    arrived: dict[Action, list[Action]] = {}
    for sent in outgoing.values():
        # Who answers after using a message has received it.
        proof = next(
            (
                m.consumer
                for m in incoming
                if m.src == sent.dst
                and step_of[m.consumer] > step_of[sent.producer]
                and steps[sent.dst][m.producer] >= steps[sent.dst][sent.consumer]
            ),
            None,
        )
        if proof is not None:
            arrived.setdefault(proof, []).append(sent.producer)
    ticks = dict(zip(schedule.ranks[rank], schedule.ticks()[rank], strict=True))
    return Route(messages, tuple(incoming), outgoing, arrived, ticks)


class Mailbox:
    """Messages with tags: receives are posted early, sends left alone.

    Args:
        route: What this rank sends and receives.
        specs: What each stage takes, by its number.
        num_micro_batches: M.
        mesh: The axis of the pipeline.
        device: Where tensors are received.
    """

    def __init__(
        self,
        route: Route,
        specs: Mapping[int, Spec],
        num_micro_batches: int,
        mesh: DeviceMesh,
        device: torch.device,
    ) -> None:
        self._route, self._specs, self._M = route, specs, num_micro_batches
        self._mesh, self._device = mesh, device
        self._waiting = deque(route.incoming)
        self._posted: dict[Action, tuple[Tensor, Work]] = {}
        self._sends: dict[Action, Work] = {}
        for _ in range(_AHEAD):
            self._post()

    def _post(self) -> None:
        if self._waiting:
            message = self._waiting.popleft()
            out = _buffer(message, self._specs, self._device)
            tag = _tag(message, self._M)
            work = irecv(out, message.src, self._mesh, tag=tag)
            self._posted[message.consumer] = out, work

    def take(self, consumer: Action) -> Tensor:
        """Return the tensor that an action waits for.

        Args:
            consumer: The action.
        """
        self._post()
        out, work = self._posted.pop(consumer)
        work.wait()
        for producer in self._route.arrived.get(consumer, ()):
            self._sends.pop(producer).wait()
        return out

    def put(self, producer: Action, x: Tensor) -> None:
        """Send what an action has made.

        Args:
            producer: The action.
            x: A tensor that nobody changes any more.
        """
        message = self._route.outgoing[producer]
        tag = _tag(message, self._M)
        self._sends[producer] = isend(x.contiguous(), message.dst, self._mesh, tag=tag)

    def after(self, action: Action) -> None:
        """Nothing is left to do after an action.

        Args:
            action: The action that has ended.
        """

    def close(self) -> None:
        """Return when everything sent has arrived."""
        for work in self._sends.values():
            work.wait()


@dataclass(slots=True)
class _Batch:
    """The messages of one tick on one rank."""

    tick: int
    outgoing: list[Message] = field(default_factory=list)
    incoming: list[Message] = field(default_factory=list)


class OrderedMailbox:
    """Messages without tags: each tick's are exchanged in one batch, in one order.

    A rank posts the batches up to a tick once its own action of that tick is done; the
    messages that an action uses were made in earlier ticks.

    Args:
        route: What this rank sends and receives.
        specs: What each stage takes, by its number.
        num_micro_batches: M.
        mesh: The axis of the pipeline.
        device: Where tensors are received.
    """

    def __init__(
        self,
        route: Route,
        specs: Mapping[int, Spec],
        num_micro_batches: int,
        mesh: DeviceMesh,
        device: torch.device,
    ) -> None:
        self._route, self._specs, self._M = route, specs, num_micro_batches
        self._mesh, self._device = mesh, device
        self._batches = deque(batches_of(route))
        self._arrivals: dict[Action, tuple[Tensor, int]] = {}
        self._made: dict[Action, Tensor] = {}
        self._works: deque[tuple[int, Work]] = deque()

    def take(self, consumer: Action) -> Tensor:
        """Return the tensor that an action waits for.

        Args:
            consumer: The action.
        """
        self._post_before(self._route.ticks[consumer])
        out, tick = self._arrivals.pop(consumer)
        # Batches run one after the other: what is earlier has arrived, and is let go.
        while self._works and self._works[0][0] <= tick:
            self._works.popleft()[1].wait()
        return out

    def put(self, producer: Action, x: Tensor) -> None:
        """Send what an action has made, with the batch of its tick.

        Args:
            producer: The action.
            x: A tensor that nobody changes any more.
        """
        self._made[producer] = x.contiguous()

    def after(self, action: Action) -> None:
        """Start the batches up to the tick of an action that has ended.

        Args:
            action: The action.
        """
        self._post_before(self._route.ticks[action] + 1)

    def _post_before(self, tick: int) -> None:
        while self._batches and self._batches[0].tick < tick:
            batch = self._batches.popleft()
            outs = [_buffer(m, self._specs, self._device) for m in batch.incoming]
            outgoing = [
                (self._made.pop(m.producer), m.dst, _tag(m, self._M))
                for m in batch.outgoing
            ]
            incoming = [
                (out, m.src, _tag(m, self._M))
                for out, m in zip(outs, batch.incoming, strict=True)
            ]
            work = exchange_(outgoing, incoming, self._mesh)
            self._works.append((batch.tick, work))
            for out, m in zip(outs, batch.incoming, strict=True):
                self._arrivals[m.consumer] = out, batch.tick

    def close(self) -> None:
        """Return when everything sent has arrived."""
        self._post_before(1 + max((b.tick for b in self._batches), default=-1))
        for _, work in self._works:
            work.wait()


def batches_of(route: Route) -> list[_Batch]:
    """Return the messages of a rank by tick; both ends of a pair list them alike.

    Args:
        route: What the rank sends and receives.
    """
    batches: dict[int, _Batch] = {}
    for message in route.messages:
        batch = batches.setdefault(message.tick, _Batch(message.tick))
        is_sent = route.outgoing.get(message.producer) == message
        (batch.outgoing if is_sent else batch.incoming).append(message)
    return list(batches.values())


def _tag(message: Message, num_micro_batches: int) -> int:
    """Return a number that no other message of the pass has."""
    stage, kind, micro_batch = message.consumer
    return 1 + 2 * (stage * num_micro_batches + micro_batch) + (kind != "F")


def _buffer(
    message: Message, specs: Mapping[int, Spec], device: torch.device
) -> Tensor:
    """Return memory for a message: a gradient looks like what it belongs to."""
    made, used = message.producer.stage, message.consumer.stage
    spec = specs[max(made, used)]  # what enters the later stage
    return torch.empty(spec.shape, dtype=spec.dtype, device=device)
