"""Flat buckets: many tensors in one buffer, so that one collective moves them all.

A bucket is a flat tensor with a view for every parameter in it. Engines cut their
parameters into buckets in reverse order, because backward produces the gradients of the
last layers first. Tensors that differ in dtype or device never share a bucket.

`ShardedBucket` cuts a bucket into one slice for each rank; lengths differ by at most
one element. A slice begins and ends anywhere, so a parameter may lie on several ranks;
what one rank has of it is a `Shard`.

Chapters: parallelism/data_parallel, parallelism/zero. References: Li et al. 2020, PVLDB
13(12):3005-3018, arXiv:2006.15704; Rajbhandari et al. 2020, SC20, arXiv:1910.02054.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes.in_place import all_gather_, slice_bounds


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


def flat_views(flat: Tensor, shapes: Iterable[torch.Size]) -> list[Tensor]:
    """Cut the front of a flat tensor into views of these shapes, in order."""
    views, start = [], 0
    for shape in shapes:
        views.append(flat[start : start + shape.numel()].view(shape))
        start += shape.numel()
    return views


@dataclass(eq=False, slots=True)
class Shard:
    """What this rank holds of one parameter that is cut over an axis.

    Attributes:
        bucket: Where the parameter lies.
        index: Its place in the bucket.
        shape: Shape of the whole parameter.
        start: First element, of the flat parameter, that this rank owns.
        stop: One after the last; an empty shard has `start == stop`.
        local: The slice (stop - start,), which an optimizer updates; its `.grad` is the
            slice of the mean gradient, None if no rank used the parameter.
    """

    bucket: ShardedBucket
    index: int
    shape: torch.Size
    start: int
    stop: int
    local: nn.Parameter

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # a model that was saved lies on no mesh

    @property
    def mesh(self) -> DeviceMesh:
        """The axis over which the parameter is cut."""
        return self.bucket.mesh


class ShardedBucket:
    """The geometry of a bucket that is cut into slices, one for each rank.

    Args:
        shapes: Shapes of the parameters, in order.
        mesh: The axis.

    Attributes:
        num_elements: Elements of all slices.
        slice_elements: Elements of this rank's slice; ranks differ by at most one.
        own: Where this rank's slice lies in the flat bucket.
        ranges: First and last element of each flat parameter on this rank.
        shards: This rank's part of each parameter, once `attach` was called.
    """

    def __init__(self, shapes: Sequence[torch.Size], mesh: DeviceMesh) -> None:
        self.mesh, self.shapes = mesh, list(shapes)
        self.num_elements = sum(shape.numel() for shape in shapes)
        first, last = slice_bounds(
            self.num_elements, mesh.size(), mesh.get_local_rank()
        )
        self.own, self.slice_elements = slice(first, last), last - first
        self.ranges: list[tuple[int, int]] = []  # this rank's, of each flat parameter
        offset = 0
        for numel in (shape.numel() for shape in shapes):
            start, stop = (min(max(b - offset, 0), numel) for b in (first, last))
            self.ranges.append((start, stop))
            offset += numel
        self.shards: list[Shard] = []

    def views(self, flat: Tensor) -> list[Tensor]:
        """Cut a flat bucket (num_elements,) into views shaped like the parameters."""
        return flat_views(flat, self.shapes)

    def take(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return a copy of this rank's slice (slice_elements,) of whole parameters."""
        whole = parameters[0].detach().new_zeros(self.num_elements)
        for parameter, view in zip(parameters, self.views(whole), strict=True):
            view.copy_(parameter.detach())
        return whole[self.own].clone()

    def cut(self, own: Tensor) -> list[Tensor]:
        """Cut this rank's slice (slice_elements,) into its part of each parameter."""
        parts, start = [], 0
        for first, last in self.ranges:
            parts.append(own[start : start + last - first])
            start += last - first
        return parts

    def attach(self, own: Tensor, requires_grad: Sequence[bool]) -> list[Shard]:
        """Make a `Shard` of each parameter, its memory a view of this rank's slice."""
        self.shards = [
            Shard(
                bucket=self,
                index=i,
                shape=self.shapes[i],
                start=self.ranges[i][0],
                stop=self.ranges[i][1],
                local=nn.Parameter(part, requires_grad=requires_grad[i]),
            )
            for i, part in enumerate(self.cut(own.detach()))
        ]
        return self.shards

    def gather(
        self,
        value: Callable[[Shard], Tensor | None],
        *,
        dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """Return a tensor of each parameter whole, on every rank.

        Args:
            value: Gives the flat slice of this rank's shard; None counts as zeros.
            dtype: Of the result; by default that of the parameters.

        Communication: one all_gather of the bucket, (n - 1) / n of its bytes per rank.
        """
        like = self.shards[0].local
        whole = like.new_empty(self.num_elements, dtype=dtype)
        own = whole[self.own].zero_()
        for shard, part in zip(self.shards, self.cut(own), strict=True):
            piece = value(shard)
            if piece is not None:
                part.copy_(piece.detach().reshape(-1))
        all_gather_(whole, own, self.mesh).wait()
        return self.views(whole)


def shard_of(parameter: Tensor) -> Shard | None:
    """Return what this rank holds of a parameter that an engine has cut, or None."""
    return getattr(parameter, "_labpkg_shard", None)


def mark_shard(parameter: Tensor, shard: Shard | None) -> None:
    """Let `shard_of` find the shard of a parameter; None takes the mark away."""
    parameter._labpkg_shard = shard  # pyright: ignore[reportAttributeAccessIssue]


def is_empty(tensor: Tensor) -> bool:
    """Return whether a tensor of a model waits for its values: see `materialize`."""
    return tensor.is_meta or getattr(tensor, "_labpkg_is_empty", False)


def mark_empty(slice_: Tensor, empty: bool) -> None:
    """Note whether a slice of a parameter on "meta" waits for its values."""
    vars(slice_)["_labpkg_is_empty"] = empty
