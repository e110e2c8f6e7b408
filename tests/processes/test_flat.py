"""Bucket layout: order, limits, dtypes, views."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from labpkg.processes.flat import bucket_parameters, flat_views


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
    matrix, scalar = flat_views(flat, [torch.zeros(2, 3), torch.tensor(0.0)])
    matrix[1, 2] = 50
    scalar.fill_(60)
    assert flat.tolist() == [0, 1, 2, 3, 4, 50, 60, 7]
