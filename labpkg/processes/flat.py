"""Flat buckets: many tensors in one buffer, so that one collective moves them all.

A bucket is a flat tensor with a view for every parameter in it. Engines cut their
parameters into buckets in reverse order, because backward produces the gradients of the
last layers first. Tensors that differ in dtype or device never share a bucket.

Chapter: parallelism/data_parallel. Reference: Li et al. 2020, PVLDB 13(12):3005-3018,
arXiv:2006.15704.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def bucket_parameters(
    parameters: Iterable[Tensor], bucket_bytes: int
) -> list[list[Tensor]]:
    """Group parameters, last first, into buckets of about `bucket_bytes`.

    A bucket is closed by the parameter that reaches the limit, so a large parameter is
    never cut.

    Args:
        parameters: The parameters in the order of the forward pass.
        bucket_bytes: Size at which a bucket is closed, at least 1.

    Returns:
        Lists of parameters of one dtype and device each.
    """
    buckets: list[list[Tensor]] = []
    open_buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in reversed(list(parameters)):
        kind = (parameter.dtype, parameter.device)
        bucket = open_buckets.get(kind)
        if bucket is None:
            bucket = open_buckets[kind] = []
            buckets.append(bucket)
        bucket.append(parameter)
        if sum(p.nbytes for p in bucket) >= bucket_bytes:
            del open_buckets[kind]
    return buckets


def flat_views(flat: Tensor, like: Iterable[Tensor]) -> list[Tensor]:
    """Cut the front of a flat tensor into views shaped like other tensors, in order."""
    views, start = [], 0
    for tensor in like:
        views.append(flat[start : start + tensor.numel()].view(tensor.shape))
        start += tensor.numel()
    return views
