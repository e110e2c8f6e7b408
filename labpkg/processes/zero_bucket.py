"""A bucket of parameters of which every rank trains one slice.

Gradients come in whole, are reduced to this rank's slice, and leave as the gradients of
`Shard`s, which an optimizer updates in place; the weights of the other slices are then
gathered. The engine says when; it calls `take`, `launch`, `collect`, `publish` in
backward and `gather` after the step.

Chapter: parallelism/zero. Reference: Rajbhandari et al. 2020, SC20, arXiv:1910.02054.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes.flat import ShardedBucket, bucket_parameters, mark_shard
from labpkg.processes.in_place import all_gather_, reduce_scatter_
from labpkg.processes.replicas import release, require_device, require_same_model
from labpkg.processes.transport import Work

Groups = list[dict[str, Any]]
Trainable = list[tuple[int, float, Tensor]]


class ZeroBucket:
    """Parameters of one dtype: flat weights, and gradients on their way.

    Args:
        parameters: Whole parameters; their memory moves into one flat buffer.
        mesh: The axis.
        keeps_gradient: Keep the buffer of whole gradients for the next backward.

    Attributes:
        weights: All weights, flat; the parameters are views of it.
        shards: What this rank trains of each parameter.
        ready: The parameters whose gradients have come in this backward pass.
    """

    def __init__(
        self, parameters: list[Tensor], mesh: DeviceMesh, *, keeps_gradient: bool
    ) -> None:
        self.parameters, self.mesh, self.share = parameters, mesh, 1 / mesh.size()
        self.keeps_gradient = keeps_gradient
        self.layout = ShardedBucket([p.shape for p in parameters], mesh)
        self.weights = parameters[0].new_empty(self.layout.num_elements)
        self.views = self.layout.views(self.weights)
        with torch.no_grad():
            for p, view in zip(parameters, self.views, strict=True):
                view.copy_(p)
                p.data = view
        own = self.weights[self.layout.own]
        self.shards = self.layout.attach(own, [True] * len(parameters))
        for p, shard in zip(parameters, self.shards, strict=True):
            mark_shard(p, shard)
        # Or `clip_grad_norm` would find the gradients of an engine that is gone.
        weakref.finalize(self, _unmark, parameters)
        self.gradient: Tensor | None = None  # of all slices, while backward runs
        self.gradient_views: list[Tensor] = []
        self.slice: Tensor | None = None  # this rank's mean gradient
        self.earlier: Tensor | None = None  # what it was before this backward
        self.ready: set[int] = set()
        self.is_open = False
        self.work: Work | None = None

    def _open(self) -> None:
        """Get the buffer for a backward pass; keep what an earlier one left."""
        self.is_open = True
        has_gradient = any(shard.local.grad is not None for shard in self.shards)
        if self.slice is not None and has_gradient:
            self.earlier = self.slice.clone() if self.keeps_gradient else self.slice
        if self.gradient is None:
            self.gradient = torch.empty_like(self.weights)
            self.gradient_views = self.layout.views(self.gradient)

    def take(self, i: int) -> None:
        """Move the gradient of parameter i into the bucket, divided by the ranks."""
        if not self.is_open:
            self._open()
        self.ready.add(i)
        gradient = self.parameters[i].grad
        assert gradient is not None
        if gradient.layout != torch.strided:
            raise ValueError(
                "a sparse gradient has no place in a bucket; build the embedding with "
                "sparse=False"
            )
        torch.mul(gradient.detach(), self.share, out=self.gradient_views[i])
        self.parameters[i].grad = None

    def launch(self, deterministic: bool) -> None:
        """Start reducing; a parameter without a gradient counts as zero."""
        if not self.is_open:
            self._open()
        for i, p in enumerate(self.parameters):
            if i in self.ready:
                continue
            if p.grad is not None:  # accumulated under `no_sync`, and not used since
                self.take(i)
            else:
                self.gradient_views[i].zero_()
        assert self.gradient is not None
        out = own = self.gradient[self.layout.own]
        if not self.keeps_gradient and self.earlier is None:
            out = self.slice = (
                torch.empty_like(own) if self.slice is None else self.slice
            )
        self.work = reduce_scatter_(
            out, self.gradient, self.mesh, deterministic=deterministic
        )

    def collect(self) -> None:
        """Wait for this rank's slice; at stage 2 free the others."""
        if self.work is None or self.gradient is None:
            return
        self.work.wait()
        own = self.gradient[self.layout.own]
        if self.keeps_gradient:
            self.slice = own if self.earlier is None else own.add_(self.earlier)
        else:
            if self.earlier is not None:  # the slice itself
                self.earlier.add_(own)
            self.gradient, self.gradient_views = None, []
        self.work = self.earlier = None

    def publish(self, used: list[bool]) -> None:
        """Give each shard that some rank used its part of the mean gradient."""
        assert self.slice is not None
        parts = self.layout.cut(self.slice)
        for shard, part, was_used in zip(self.shards, parts, used, strict=True):
            if was_used:
                shard.local.grad = part
        self.ready.clear()
        self.is_open = False

    def gather(self) -> Work:
        """Start fetching the slices of the other ranks."""
        return all_gather_(self.weights, self.weights[self.layout.own], self.mesh)

    def require_intact(self) -> None:
        """Refuse a step that would leave something out.

        Raises:
            RuntimeError: If a gradient was accumulated but never reduced.
            ValueError: If somebody gave a parameter other memory, which has no gather.
        """
        for p, view in zip(self.parameters, self.views, strict=True):
            if p.grad is not None:
                raise RuntimeError(
                    "gradients were accumulated under no_sync and not reduced; the "
                    "last backward before a step belongs outside of it, or call "
                    "reduce_gradients()"
                )
            if p.data_ptr() != view.data_ptr():
                raise ValueError(
                    "a parameter was moved, cast or replaced after ZeroOptimizer was "
                    "made; do that first, and load weights without assign=True"
                )


def _unmark(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        mark_shard(parameter, None)


def trainable_in(groups: Groups) -> Trainable:
    """Return (group, relative place in the group, parameter) of the trainable ones."""
    return [
        (number, i / len(group["params"]), p)
        for number, group in enumerate(groups)
        for i, p in enumerate(group["params"])
        if p.requires_grad
    ]


def require_trainable(groups: Groups, mesh: DeviceMesh) -> Trainable:
    """Return the trainable parameters; refuse what cannot be cut, on every rank."""
    holder = nn.Module()  # to check parameters as those of a model
    for g, group in enumerate(groups):
        for i, p in enumerate(group["params"]):
            holder.register_parameter(f"parameter {i} of group {g}", p)
    num_given = sum(len(group["params"]) for group in groups)
    if len(list(holder.parameters())) < num_given:
        raise ValueError(
            "a parameter is given twice and would be updated twice; pass tied "
            "parameters once, as model.parameters() yields them"
        )
    require_device(holder, mesh)
    trainable = trainable_in(groups)
    num_elements = sum(p.numel() for _, _, p in trainable)
    if num_elements < mesh.size():
        raise ValueError(
            f"{num_elements} trainable elements cannot be cut over {mesh.size()} "
            "ranks; use fewer ranks or DataParallel"
        )
    for name, p in holder.named_parameters():
        if p.requires_grad:
            release(name, p)
    require_same_model(holder, mesh)
    return trainable


def buckets_in_order(
    trainable: Trainable, bucket_bytes: int
) -> list[tuple[list[Tensor], int]]:
    """Return (parameters, group), the buckets that backward fills first in front.

    Groups are taken to be in the order of the forward pass, each by itself.
    """
    place = {p: at for _, at, p in trainable}
    buckets = []
    for number in sorted({group for group, _, _ in trainable}):
        members = [p for group, _, p in trainable if group == number]
        for parameters in bucket_parameters(members, bucket_bytes):
            buckets.append((parameters, number))
    return sorted(buckets, key=lambda b: -min(place[p] for p in b[0]))
