"""Checkers of the exercises of the chapter planning/device_mesh.

Notation: `sizes` are those of the axes, outer to inner; the last coordinate runs first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from labpkg.check.result import CheckResult, Exercise


def coordinates(fn: Callable[..., Any]) -> CheckResult:
    """Check `coordinates(rank, sizes)`: where a rank lies on each axis.

    Args:
        fn: your function; it returns a list of whole numbers, outer to inner.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _COORDINATES.check(fn)


def axis_groups(fn: Callable[..., Any]) -> CheckResult:
    """Check `axis_groups(sizes, axis)`: who talks to whom.

    Args:
        fn: your function; it returns a list of groups, each a list of ascending ranks,
            sorted by their first rank.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _AXIS_GROUPS.check(fn)


def mesh_grad_norm(fn: Callable[..., Any]) -> CheckResult:
    """Check `mesh_grad_norm(cut, whole)`: the norm of all gradients on a mesh.

    Args:
        fn: your function; it gets two tensors (pp, dp, tp) with the sum of squares that
            each rank has: of parameters that tp cuts, and of those it copies.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _MESH_GRAD_NORM.check(fn)


def network_bytes(fn: Callable[..., Any]) -> CheckResult:
    """Check `network_bytes(sizes, num_bytes, node_size)`: what leaves the machines.

    Args:
        fn: your function; it returns the sum of `num_bytes` over the axes of which a
            group has ranks on two machines.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _NETWORK_BYTES.check(fn)


def possible_meshes(fn: Callable[..., Any]) -> CheckResult:
    """Check `possible_meshes(world_size, num_layers, num_heads, node_size)`.

    Args:
        fn: your function; it returns all [pp, dp, tp] with this product for which pp is
            at most the layers, tp divides the heads, and tp divides the ranks of a
            machine; sorted.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _POSSIBLE_MESHES.check(fn)


Sizes = Sequence[int]


def _coordinates(rank: int, sizes: Sizes) -> list[int]:
    found = []
    for size in reversed(sizes):
        rank, own = divmod(rank, size)
        found.append(own)
    return found[::-1]


_COORDINATES = Exercise(
    name="coordinates",
    arguments=("rank", "sizes"),
    rtol=0.0,  # whole numbers
    reference=_coordinates,
    cases=[
        (5, [2, 2, 2]),
        (6, [2, 2, 2]),
        (7, [4, 2]),
        (11, [2, 3, 4]),
        (23, [2, 3, 4]),
        (0, [3, 5]),
        (3, [1, 4, 1]),
        (2, [3]),
        (1023, [16, 8, 1, 8]),
    ],
    mistakes={
        "the last axis runs first: ranks 0 and 1 differ in the last coordinate": (
            lambda rank, sizes: _coordinates(rank, sizes[::-1])
        ),
        "the order of the coordinates is that of the sizes, outer to inner": (
            lambda rank, sizes: _coordinates(rank, sizes)[::-1]
        ),
        "divide by the sizes of the axes inside before you take the remainder": (
            lambda rank, sizes: [rank % size for size in sizes]
        ),
        "this is the index within all ranks inside; a coordinate is below the size of "
        "its axis: take the remainder": lambda rank, sizes: [
            rank // math.prod(sizes[i + 1 :]) for i in range(len(sizes))
        ],
    },
    hint="rank // (product of the sizes further inside) % size",
)


def _groups(sizes: Sizes, axis: int) -> list[list[int]]:
    stride = math.prod(sizes[axis + 1 :])
    first = [r for r in range(math.prod(sizes)) if r // stride % sizes[axis] == 0]
    return [[r + k * stride for k in range(sizes[axis])] for r in first]


_AXIS_GROUPS = Exercise(
    name="axis_groups",
    arguments=("sizes", "axis"),
    rtol=0.0,
    reference=_groups,
    cases=[
        ([2, 2, 2], 2),
        ([2, 2, 2], 1),
        ([2, 2, 2], 0),
        ([4, 2], 0),
        ([2, 3, 4], 1),
        ([2, 1, 3], 1),
        ([5], 0),
        ([2, 2, 1, 3], 1),
    ],
    mistakes={
        "these are the groups of the axis counted from the other end": (
            lambda sizes, axis: _groups(sizes, len(sizes) - 1 - axis)
        ),
        "neighbouring ranks share the innermost axis only; along the others ranks lie "
        "a stride apart": lambda sizes, axis: [
            list(range(r, r + sizes[axis]))
            for r in range(0, math.prod(sizes), sizes[axis])
        ],
        "these ranks share the coordinate; a group has those that differ in it and "
        "share all others": lambda sizes, axis: [
            [
                r
                for r in range(math.prod(sizes))
                if r // math.prod(sizes[axis + 1 :]) % sizes[axis] == own
            ]
            for own in range(sizes[axis])
        ],
        "return all groups of the axis, not only that of rank 0": (
            lambda sizes, axis: _groups(sizes, axis)[:1]
        ),
    },
    hint="ranks of a group lie a stride apart, the product of the sizes further "
    "inside; sort the groups by their first rank",
)


def _norm(cut: Tensor, whole: Tensor) -> Tensor:
    return (cut[:, 0].sum() + whole[:, 0, 0].sum()).sqrt()


def _squares(pp: int, dp: int, tp: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return what ranks hold after the mean over dp: copies along dp and tp agree."""
    generator = torch.Generator().manual_seed(seed)
    cut = torch.rand(pp, 1, tp, generator=generator, dtype=torch.float64) + 0.5
    whole = torch.rand(pp, 1, 1, generator=generator, dtype=torch.float64) + 0.5
    return cut.repeat(1, dp, 1), whole.repeat(1, dp, tp)


_MESH_GRAD_NORM = Exercise(
    name="mesh_grad_norm",
    arguments=("cut", "whole"),
    rtol=1e-9,
    reference=_norm,
    cases=[
        _squares(2, 2, 2, 3),
        _squares(1, 1, 2, 0),
        _squares(2, 1, 1, 1),
        _squares(1, 2, 1, 2),
        _squares(3, 4, 2, 4),
        _squares(1, 1, 1, 5),
    ],
    mistakes={
        "copies count once: take the squares of `whole` from one rank of tp": (
            lambda cut, whole: (cut[:, 0].sum() + whole[:, 0].sum()).sqrt()
        ),
        "replicas hold the same gradient, which counts once: take one index of dp": (
            lambda cut, whole: (cut.sum() + whole[:, :, 0].sum()).sqrt()
        ),
        "neither replicas nor copies count twice": (
            lambda cut, whole: (cut.sum() + whole.sum()).sqrt()
        ),
        "the stages hold different parameters: add over pp": (
            lambda cut, whole: (cut[0, 0].sum() + whole[0, 0, 0]).sqrt()
        ),
        "these are squares: the norm is the root of their sum": (
            lambda cut, whole: _norm(cut, whole) ** 2
        ),
        "add squares, not norms, and take the root once": (
            lambda cut, whole: cut[:, 0].sqrt().sum() + whole[:, 0, 0].sqrt().sum()
        ),
        "slices of one parameter add up over tp": (
            lambda cut, whole: (cut[:, 0, 0].sum() + whole[:, 0, 0].sum()).sqrt()
        ),
    },
    hint="over pp add both; over tp add `cut` and take `whole` once; over dp take one",
)


def _crossing(sizes: Sizes, num_bytes: Sizes, node_size: int) -> float:
    return sum(
        sent
        for axis, sent in enumerate(num_bytes)
        if any(
            len({rank // node_size for rank in ranks}) > 1
            for ranks in _groups(sizes, axis)
        )
    )


def _by_extent(sizes: Sizes, num_bytes: Sizes, node_size: int) -> float:
    extents = [math.prod(sizes[axis:]) for axis in range(len(sizes))]
    pairs = zip(extents, num_bytes, strict=True)
    return sum(sent for extent, sent in pairs if extent > node_size)


def _by_stride(sizes: Sizes, num_bytes: Sizes, node_size: int) -> float:
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    pairs = zip(strides, num_bytes, strict=True)
    return sum(sent for stride, sent in pairs if stride >= node_size)


_NETWORK_BYTES = Exercise(
    name="network_bytes",
    arguments=("sizes", "num_bytes", "node_size"),
    reference=_crossing,
    cases=[
        ([2, 2, 2], [3, 20, 100], 4),
        ([2, 2, 2], [100, 20, 3], 2),
        ([4, 2], [7, 5], 4),
        ([2, 8], [7, 5], 4),
        ([2, 4, 2], [3, 20, 100], 8),
        ([2, 2, 3], [3, 20, 100], 4),
        ([1, 8], [3, 20], 8),
        ([4, 1, 4], [3, 20, 100], 2),
        ([8], [9], 8),
    ],
    mistakes={
        "look at all groups of an axis, not only at that of rank 0": (
            lambda sizes, num_bytes, node_size: sum(
                sent
                for axis, sent in enumerate(num_bytes)
                if len({rank // node_size for rank in _groups(sizes, axis)[0]}) > 1
            )
        ),
        "a group may begin on one machine and end on the next: look at all its ranks": (
            _by_stride
        ),
        "that the axis and those inside fill more than a machine is not enough: with "
        "machines of an odd size, or an axis of size 1, look at the ranks": _by_extent,
        "count an axis once, not once for each of its groups": (
            lambda sizes, num_bytes, node_size: sum(
                sent
                for axis, sent in enumerate(num_bytes)
                for ranks in _groups(sizes, axis)
                if len({rank // node_size for rank in ranks}) > 1
            )
        ),
        "these axes stay inside a machine; count the others": (
            lambda sizes, num_bytes, node_size: (
                sum(num_bytes) - _crossing(sizes, num_bytes, node_size)
            )
        ),
        "only the axes with a group on two machines send over the network": (
            lambda sizes, num_bytes, node_size: sum(num_bytes)
        ),
        "the sizes go from outer to inner: the last axis has neighbouring ranks": (
            lambda sizes, num_bytes, node_size: _crossing(
                sizes[::-1], num_bytes[::-1], node_size
            )
        ),
    },
    hint="rank r is on machine r // node_size; count an axis if a group has two "
    "machines",
)


def _meshes(world: int, layers: int, heads: int, node: int) -> list[list[int]]:
    return [
        [pp, dp, tp]
        for pp, dp, tp in itertools.product(range(1, world + 1), repeat=3)
        if pp * dp * tp == world and pp <= layers and heads % tp == 0 and node % tp == 0
    ]


def _all_meshes(world: int, layers: int, heads: int, node: int) -> list[list[int]]:
    return _meshes(world, world, math.lcm(*range(1, world + 1)), 0)


_POSSIBLE_MESHES = Exercise(
    name="possible_meshes",
    arguments=("world_size", "num_layers", "num_heads", "node_size"),
    rtol=0.0,
    reference=_meshes,
    cases=[
        (4, 8, 8, 4),
        (8, 2, 12, 8),
        (8, 32, 3, 4),
        (12, 32, 6, 4),
        (16, 3, 32, 8),
        (1, 1, 1, 8),
        (7, 2, 8, 8),
        (24, 6, 24, 6),
    ],
    mistakes={
        "layers, heads and machines are not looked at": _all_meshes,
        "a stage needs a layer: pp is at most num_layers": (
            lambda world, layers, heads, node: _meshes(world, world, heads, node)
        ),
        "heads are not cut: tp divides num_heads": (
            lambda world, layers, heads, node: _meshes(world, layers, 0, node)
        ),
        "tp stays inside a machine: it divides node_size": (
            lambda world, layers, heads, node: _meshes(world, layers, heads, 0)
        ),
        "the order of the sizes is [pp, dp, tp]": (
            lambda world, layers, heads, node: [
                mesh[::-1] for mesh in _meshes(world, layers, heads, node)
            ]
        ),
        "sort the list: smaller pp first, then smaller dp": (
            lambda world, layers, heads, node: _meshes(world, layers, heads, node)[::-1]
        ),
        "stages may have different numbers of layers: pp need not divide num_layers": (
            lambda world, layers, heads, node: [
                mesh
                for mesh in _meshes(world, layers, heads, node)
                if layers % mesh[0] == 0
            ]
        ),
    },
    hint="try all triples with pp dp tp = world_size and keep those that meet the "
    "three conditions",
)
