"""Bucket layout: order, limits, dtypes, views, slices for ranks."""

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st

import labpkg as lab
from labpkg.processes.flat import ShardedBucket, bucket_parameters, flat_views


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(1, 400))
def test_buckets_hold_every_parameter_once_in_reverse(sizes, bucket_bytes):
    parameters = [torch.zeros(size) for size in sizes]
    buckets = bucket_parameters(parameters, bucket_bytes)
    flattened = [p for bucket in buckets for p in bucket]
    assert [id(p) for p in flattened] == [id(p) for p in reversed(parameters)]
    for bucket in buckets[:-1]:
        assert sum(p.nbytes for p in bucket) >= bucket_bytes
        assert sum(p.nbytes for p in bucket[:-1]) < bucket_bytes


def test_dtypes_do_not_share_a_bucket():
    half, single = torch.zeros(2, dtype=torch.float16), torch.zeros(2)
    buckets = bucket_parameters([half, single, half.clone()], 1000)
    assert [[p.dtype for p in b] for b in buckets] == [
        [torch.float16, torch.float16],
        [torch.float32],
    ]


def test_views_write_through():
    flat = torch.arange(8.0)
    matrix, scalar = flat_views(flat, [torch.Size([2, 3]), torch.Size([])])
    matrix[1, 2] = 50
    scalar.fill_(60)
    assert flat.tolist() == [0, 1, 2, 3, 4, 50, 60, 7]


@dataclass
class Axis:
    """The part of a mesh that the geometry needs."""

    num_ranks: int
    rank: int

    def size(self):
        return self.num_ranks

    def get_local_rank(self):
        return self.rank


SHAPES = st.lists(
    st.lists(st.integers(0, 5), max_size=3).map(torch.Size), min_size=1, max_size=8
)


@given(SHAPES, st.integers(1, 7))
def test_slices_differ_by_one_and_hold_every_element_once(shapes, n):
    numels = [shape.numel() for shape in shapes]
    flats = [torch.arange(1.0 + 100 * i, 1 + 100 * i + k) for i, k in enumerate(numels)]
    buckets = [ShardedBucket(shapes, Axis(n, rank)) for rank in range(n)]
    lengths = [b.slice_elements for b in buckets]
    assert max(lengths) - min(lengths) <= 1
    assert sum(lengths) == buckets[0].num_elements == sum(numels)
    whole = torch.cat([*flats, torch.zeros(0)])
    for i, view in enumerate(buckets[0].views(whole)):
        assert view.shape == shapes[i]
        parts = [b.cut(whole[b.own])[i] for b in buckets]
        assert torch.equal(torch.cat(parts), flats[i])
        for b, part in zip(buckets, parts, strict=True):
            start, stop = b.ranges[i]
            assert torch.equal(flats[i][start:stop], part)


def gathered():
    mesh = lab.make_mesh(dp=4)["dp"]
    bucket = ShardedBucket([torch.Size([2, 3]), torch.Size([3])], mesh)
    own = torch.arange(9.0, dtype=torch.float64)[bucket.own].clone()
    assert own.numel() == 2 + (mesh.get_local_rank() == 0)
    shards = bucket.attach(own, [True, False])
    own += 1  # the shards are views
    whole = bucket.gather(lambda shard: shard.local)
    half = bucket.gather(
        lambda shard: shard.local if shard.index else None, dtype=torch.float16
    )
    return whole, half, [s.local.requires_grad for s in shards]


def test_parameters_are_gathered_whole_from_their_shards(world4):
    for (matrix, vector), half, requires_grad in world4.run(gathered):
        assert matrix.tolist() == [[1, 2, 3], [4, 5, 6]]
        assert vector.tolist() == [7, 8, 9]
        assert half[0].dtype == torch.float16
        assert half[0].count_nonzero() == 0
        assert half[1].tolist() == [7, 8, 9]
        assert requires_grad == [True, False]
