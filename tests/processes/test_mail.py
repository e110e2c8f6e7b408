"""Messages of a pipeline: what proves that one has arrived, and batches of ticks."""

from typing import cast

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from labpkg.planning.actions import Schedule
from labpkg.planning.schedules import gpipe, interleaved, one_f_one_b, zero_bubble
from labpkg.processes import mail
from labpkg.processes.mail import batches_of, route_of
from labpkg.processes.transport import Done

SCHEDULES = {
    "gpipe": gpipe(4, 9),
    "1f1b": one_f_one_b(5, 9),
    "interleaved": interleaved(4, 8, num_virtual_stages=3),
    "h1": zero_bubble(4, 9, variant="h1"),
    "v": zero_bubble(3, 9, variant="v"),
    "one rank": zero_bubble(1, 3, variant="v"),
    "made by hand": Schedule.parse("0F0 0F1 2F1 2B1 2F0 2B0 0B1 0B0\n1F0 1F1 1B1 1B0"),
}


def routes(schedule, *, forward_only=False):
    carries = lambda m: m.producer.kind == "F" or not forward_only
    return [route_of(schedule, rank, carries) for rank in range(schedule.num_ranks)]


def actions_of(schedule, rank, *, forward_only=False):
    own = schedule.ranks[rank]
    return [action for action in own if action.kind == "F" or not forward_only]


@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_message_has_two_ends(name, forward_only):
    schedule = SCHEDULES[name]
    every = routes(schedule, forward_only=forward_only)
    sent = [m for route in every for m in route.outgoing.values()]
    received = [m for route in every for m in route.incoming]
    assert sorted(sent) == sorted(received)
    crossings = sum(
        schedule.rank_of(s) != schedule.rank_of(s + 1)
        for s in range(schedule.num_stages - 1)
    )
    directions = 1 if forward_only else 2
    assert len(sent) == directions * crossings * schedule.num_micro_batches
    for rank, route in enumerate(every):
        own = actions_of(schedule, rank, forward_only=forward_only)
        uses = [own.index(m.consumer) for m in route.incoming]
        assert uses == sorted(uses)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_send_that_counts_as_arrived_has_been_used(name):
    """Run the schedule; when a proof comes, the receiver has taken the message."""
    schedule = SCHEDULES[name]
    every = routes(schedule)
    made, used = set(), set()
    positions = [0] * schedule.num_ranks
    needs = {m.consumer: m for route in every for m in route.incoming}
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(schedule.ranks):
            if positions[rank] == len(actions):
                continue
            action = actions[positions[rank]]
            message = needs.get(action)
            if message is not None and message.producer not in made:
                continue
            for producer in every[rank].arrived.get(action, ()):
                assert every[rank].outgoing[producer].consumer in used
            used.add(action)
            made.add(action)
            positions[rank] += 1
            progress = True
    assert positions == [len(actions) for actions in schedule.ranks]


def test_few_sends_wait_for_the_end():
    """What is sent lives as long as the pipeline is deep, not as the step is long."""
    for num_micro_batches in (16, 64):
        schedule = one_f_one_b(4, num_micro_batches)
        for rank, route in enumerate(routes(schedule)):
            proven = [p for producers in route.arrived.values() for p in producers]
            assert len(set(proven)) == len(proven)
            assert len(route.outgoing) - len(proven) <= 4 - rank + 1
    for route in routes(gpipe(4, 16)):
        assert all(p.kind == "F" for ps in route.arrived.values() for p in ps)


@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_batches_in_the_order_of_ticks_never_block_each_other(name, forward_only):
    """Play NCCL: a rank's batches run one after the other, each with all its peers."""
    schedule = SCHEDULES[name]
    every = routes(schedule, forward_only=forward_only)
    batches = [batches_of(route) for route in every]
    for route, own in zip(every, batches, strict=True):
        assert [b.tick for b in own] == sorted({b.tick for b in own})
        for batch in own:  # both ends name the messages of a pair in one order
            for m in batch.outgoing:
                (there,) = [b for b in batches[m.dst] if b.tick == batch.tick]
                src = m.src
                mine = [o for o in batch.outgoing if o.dst == m.dst]
                assert mine == [i for i in there.incoming if i.src == src]
        assert sum(len(b.outgoing) for b in own) == len(route.outgoing)
    ended = [0] * schedule.num_ranks  # batches that have run, by rank
    done = [0] * schedule.num_ranks  # actions

    def posted(rank):
        """Return the tick before which the rank has posted its batches."""
        own = actions_of(schedule, rank, forward_only=forward_only)
        if done[rank] == len(own):
            return float("inf")
        return every[rank].ticks[own[done[rank]]]

    def current(rank):
        own = batches[rank]
        if ended[rank] == len(own) or own[ended[rank]].tick >= posted(rank):
            return None
        return own[ended[rank]]

    def has_begun(rank, tick):
        batch = current(rank)
        if batch is not None and batch.tick == tick:
            return True
        return ended[rank] > 0 and batches[rank][ended[rank] - 1].tick >= tick

    progress = True
    while progress:
        progress = False
        for rank in range(schedule.num_ranks):
            batch = current(rank)
            if batch is not None:
                peers = {m.dst for m in batch.outgoing} | {
                    m.src for m in batch.incoming
                }
                if all(has_begun(peer, batch.tick) for peer in peers):
                    ended[rank] += 1
                    progress = True
            own = actions_of(schedule, rank, forward_only=forward_only)
            if done[rank] < len(own):
                action = own[done[rank]]
                waits = [
                    i
                    for i, b in enumerate(batches[rank])
                    if any(m.consumer == action for m in b.incoming)
                ]
                if all(i < ended[rank] for i in waits):
                    done[rank] += 1
                    progress = True
    assert ended == [len(own) for own in batches]


def test_receives_are_posted_before_they_are_needed(monkeypatch):
    """gloo moves a message only once its receive is there."""
    posted = []
    monkeypatch.setattr(
        mail, "irecv", lambda *a, **k: posted.append(k["tag"]) or Done()
    )
    schedule = gpipe(2, 20)
    (_, route), cpu = routes(schedule), torch.device("cpu")
    specs = {1: mail.Spec((2,), torch.float32)}
    box = mail.Mailbox(route, specs, 20, cast(DeviceMesh, None), cpu)
    wanted = [1 + 2 * (20 + m) for m in range(20)]
    assert posted == wanted[:8]
    for message in route.incoming[:5]:
        assert box.take(message.consumer).shape == (2,)
    assert posted == wanted[:13]
