"""What a rank holds is a few boxes of the whole; all ranks together hold it once."""

import itertools
import math
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import nn

from labpkg.processes.cuts import Cut, mark_cut
from labpkg.processes.flat import ShardedBucket, mark_shard
from labpkg.processes.rectangles import boxes_of_range, overlap, rectangles


class Ranks(NamedTuple):
    """Stands for an axis: nothing is communicated."""

    n: int
    rank: int

    def size(self):
        return self.n

    def get_local_rank(self):
        return self.rank


def axis(n, rank) -> Any:
    return cast(Any, Ranks(n, rank))


@pytest.mark.parametrize(
    "shape", [(), (1,), (5,), (3, 4), (1, 5), (2, 3, 4), (2, 1, 3, 2), (3, 0, 2)]
)
def test_the_boxes_of_a_range_are_its_elements_in_order(shape):
    n = math.prod(shape)
    elements = torch.arange(n).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(n + 1), 2):
        boxes = list(boxes_of_range(shape, start, stop))
        found = [
            element
            for offsets, sizes in boxes
            for element in _box(elements, offsets, sizes).flatten().tolist()
        ]
        assert found == list(range(start, stop))
        assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_what_two_boxes_have_in_common():
    elements = torch.arange(12).view(3, 4)
    spans = [(a, n) for a in range(3) for n in range(1, 4 - a)]
    boxes = [((a, b), (m, n)) for a, m in spans for b, n in spans]
    for one, other in itertools.product(boxes, repeat=2):
        common = overlap(one, other)
        found = (
            set() if common is None else {*_box(elements, *common).flatten().tolist()}
        )
        sets = [{*_box(elements, *box).flatten().tolist()} for box in (one, other)]
        assert found == sets[0] & sets[1]
        assert bool(found) == (common is not None)
    assert overlap(((), ()), ((), ())) == ((), ())


def _box(tensor, offsets, sizes):
    for dim, (first, length) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, first, length)
    return tensor


def held_by(whole, cut, cut_rank, shards, shard_rank):
    """Return what a rank holds: cut along a dim, then sliced over another axis."""
    part, mark = whole, None
    if cut is not None:
        n, dim, blocks = cut
        mark = Cut(axis(n, cut_rank), dim, whole.shape, blocks)
        part = mark.take(whole)
    parameter = nn.Parameter(part)
    if shards > 1:  # in one bucket with another parameter
        bucket = ShardedBucket([torch.Size((3,)), part.shape], axis(shards, shard_rank))
        flat = torch.cat([torch.zeros(3), part.flatten()])
        shard = bucket.attach(flat[bucket.own], [True, True])[1]
        parameter = shard.local
        mark_shard(parameter, shard)
    mark_cut(parameter, mark)
    return parameter


@pytest.mark.parametrize("cut", [None, (2, 0, (8,)), (2, 0, (4, 2, 2)), (3, 1, (6,))])
@pytest.mark.parametrize("shards", [1, 2, 5, 40])
def test_all_ranks_together_hold_each_element_once(cut, shards):
    whole = torch.arange(8 * 6 * 2, dtype=torch.float32).view(8, 6, 2) + 1
    found = torch.zeros_like(whole)
    for cut_rank in range(1 if cut is None else cut[0]):
        for shard_rank in range(shards):
            held = held_by(whole, cut, cut_rank, shards, shard_rank)
            for offsets, sizes, local in rectangles(held, held, sliced=True):
                assert local.numel()
                _box(found, offsets, sizes).add_(local)
    assert torch.equal(found, whole)


def test_what_is_written_to_a_box_is_held():
    whole = torch.zeros(8, 6, 2)
    held = held_by(whole, (2, 0, (4, 4)), 1, 2, 1)
    for _, _, local in rectangles(held, held, sliced=True):
        local.fill_(7)
    assert held.detach().eq(7).all()


def test_parameters_of_stages_1_and_2_are_whole_and_their_state_is_not():
    parameter = nn.Parameter(torch.ones(4, 6))
    bucket = ShardedBucket([parameter.shape], axis(2, 1))
    shard = bucket.attach(parameter.detach().flatten()[bucket.own], [True])[0]
    mark_shard(parameter, shard)
    (box,) = rectangles(parameter, parameter, sliced=False)
    assert (box.offsets, box.sizes) == ((0, 0), (4, 6))
    (box,) = rectangles(parameter, torch.zeros(12), sliced=True)
    assert (box.offsets, box.sizes) == ((2, 0), (2, 6))
