"""Schedules, action by action, against those of torch.distributed.pipelining."""

from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from labpkg.planning.actions import Action, Schedule
from labpkg.planning.schedules import interleaved, zero_bubble


def of_torch(name, *, num_ranks, num_micro_batches, num_virtual_stages):
    """Return torch's order, which it makes for each rank without communication."""
    rounds = max(1, num_micro_batches // num_ranks)
    made = getattr(torch_schedules, name)
    ranks = []
    for rank in range(num_ranks):
        sizes = SimpleNamespace(
            rank=rank,
            pp_group_size=num_ranks,
            num_stages=num_ranks * num_virtual_stages,
            n_local_stages=num_virtual_stages,
            _n_microbatches=num_micro_batches,
            number_of_rounds=rounds,
            microbatches_per_round=num_micro_batches // rounds,
        )
        steps = made._calculate_single_rank_operations(sizes, rank)
        ranks.append([Action.parse(str(step)) for step in steps if step is not None])
    return Schedule(ranks)


@pytest.mark.parametrize("P", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
def test_orders_are_those_of_torch(P, rounds):
    sizes = {"num_ranks": P, "num_micro_batches": rounds * P}
    for v in (2, 3):
        theirs = of_torch("ScheduleInterleaved1F1B", **sizes, num_virtual_stages=v)
        assert interleaved(P, rounds * P, num_virtual_stages=v) == theirs
    theirs = of_torch("ScheduleInterleavedZeroBubble", **sizes, num_virtual_stages=1)
    assert zero_bubble(P, rounds * P, variant="h1") == theirs
    theirs = of_torch("ScheduleZBVZeroBubble", **sizes, num_virtual_stages=2)
    assert zero_bubble(P, rounds * P, variant="v") == theirs


@pytest.mark.parametrize(("P", "M"), [(4, 3), (4, 10), (4, 5), (3, 8), (8, 18)])
def test_orders_are_those_of_torch_for_other_numbers_of_micro_batches(P, M):
    """Torch wants rounds of equal size; there the orders agree as well."""
    sizes = {"num_ranks": P, "num_micro_batches": M}
    theirs = of_torch("ScheduleInterleaved1F1B", **sizes, num_virtual_stages=2)
    assert interleaved(P, M, num_virtual_stages=2) == theirs
    theirs = of_torch("ScheduleZBVZeroBubble", **sizes, num_virtual_stages=2)
    assert zero_bubble(P, M, variant="v") == theirs
