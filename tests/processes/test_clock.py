"""The clocks of several ranks."""

import torch.distributed as dist

import labpkg as lab
from labpkg.planning.actions import Action
from labpkg.processes.clock import Clock


def note_once():
    rank = dist.get_rank()
    clock = Clock(lab.make_mesh(pp=2)["pp"])
    clock._start_s -= 100 * rank  # as if this rank had passed the barrier before
    clock.note(Action(rank, "F", 0), clock.now())
    return clock.timeline()


def test_ranks_of_one_machine_share_a_clock(world2):
    first, second = world2.run(note_once)
    assert first == second
    for rank, own in enumerate(first.spans):
        (span,) = own
        assert span.action == Action(rank, "F", 0)
        assert 99 <= span.start_s <= span.end_s < 199  # not 0
