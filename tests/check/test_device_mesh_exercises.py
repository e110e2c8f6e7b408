import math
from typing import Any

import pytest
import torch

from labpkg import check
from labpkg.check import device_mesh_exercises
from tests.check.laws import ExerciseLaws

EXERCISES: dict[str, Any] = {
    name: checker
    for name, checker in vars(device_mesh_exercises).items()
    if not name.startswith("_")
    and getattr(checker, "__module__", "") == device_mesh_exercises.__name__
}


# ---- right answers, written otherwise than the references ---------------------------


def coordinates(rank, sizes):
    ranks = torch.arange(math.prod(sizes)).reshape(sizes)
    return (ranks == rank).nonzero()[0].tolist()


def axis_groups(sizes, axis):
    ranks = torch.arange(math.prod(sizes)).reshape(sizes)
    return sorted(ranks.movedim(axis, -1).reshape(-1, sizes[axis]).tolist())


def mesh_grad_norm(cut, whole):
    _, dp, tp = cut.shape
    return (cut.sum() / dp + whole.sum() / (dp * tp)).sqrt()


def network_bytes(sizes, num_bytes, node_size):
    total = 0
    for axis, sent in enumerate(num_bytes):
        ends = ((group[0], group[-1]) for group in axis_groups(sizes, axis))
        total += sent * any(a // node_size != b // node_size for a, b in ends)
    return total


def possible_meshes(world_size, num_layers, num_heads, node_size):
    found = []
    for tp in range(1, math.gcd(num_heads, node_size) + 1):
        for pp in range(1, num_layers + 1):
            dp, rest = divmod(world_size, pp * tp)
            if math.gcd(num_heads, node_size) % tp == 0 and rest == 0:
                found.append([pp, dp, tp])
    return sorted(found)


ANSWERS = [coordinates, axis_groups, mesh_grad_norm, network_bytes, possible_meshes]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.__name__)
def test_right_answers_pass(answer):
    assert set(EXERCISES) == {answer.__name__ for answer in ANSWERS}
    assert getattr(check, answer.__name__)(answer)


def test_tuples_are_lists():
    assert check.coordinates(lambda rank, sizes: tuple(coordinates(rank, sizes)))


WRONG = [
    ("coordinates", lambda rank, sizes: rank, "returns its argument"),
    (
        "coordinates",
        lambda rank, sizes: coordinates(rank, sizes[::-1]),
        "the last axis runs first",
    ),
    (
        "coordinates",
        lambda rank, sizes: coordinates(rank, sizes)[::-1],
        "outer to inner",
    ),
    ("coordinates", lambda rank, sizes: [rank % n for n in sizes], "divide by"),
    ("axis_groups", lambda sizes, axis: sizes, "returns its argument"),
    (
        "axis_groups",
        lambda sizes, axis: (
            torch.arange(math.prod(sizes)).reshape(-1, sizes[axis]).tolist()
        ),
        "a stride apart",
    ),
    (
        "axis_groups",
        lambda sizes, axis: axis_groups(sizes, -1 - axis),
        "from the other end",
    ),
    ("axis_groups", lambda sizes, axis: axis_groups(sizes, axis)[:1], "all groups"),
    (
        "axis_groups",
        lambda sizes, axis: (
            torch.arange(math.prod(sizes))
            .reshape(sizes)
            .transpose(axis, -1)
            .reshape(-1, sizes[axis])
            .tolist()
        ),
        "sort the groups",
    ),
    ("mesh_grad_norm", lambda cut, whole: cut, "returns its argument"),
    (
        "mesh_grad_norm",
        lambda cut, whole: (cut[:, 0] + whole[:, 0]).sum().sqrt(),
        "copies count once",
    ),
    (
        "mesh_grad_norm",
        lambda cut, whole: (cut.sum() + whole[:, :, 0].sum()).sqrt(),
        "replicas hold the same gradient",
    ),
    (
        "mesh_grad_norm",
        lambda cut, whole: mesh_grad_norm(cut[:1], whole[:1]),
        "add over pp",
    ),
    ("mesh_grad_norm", lambda cut, whole: cut[:, 0].sqrt().sum(), "over pp add both"),
    ("network_bytes", lambda sizes, sent, node: sizes, "returns its argument"),
    ("network_bytes", lambda sizes, sent, node: sum(sent), "two machines send"),
    (
        "network_bytes",
        lambda sizes, sent, node: sum(
            s for axis, s in enumerate(sent) if math.prod(sizes[axis + 1 :]) >= node
        ),
        "begin on one machine",
    ),
    (
        "network_bytes",
        lambda sizes, sent, node: sum(
            s * len({rank // node for rank in group[1:]} - {group[0] // node})
            for axis, s in enumerate(sent)
            for group in axis_groups(sizes, axis)
        ),
        "count an axis once",
    ),
    (
        "network_bytes",
        lambda sizes, sent, node: sum(
            s for axis, s in enumerate(sent) if axis_groups(sizes, axis)[0][-1] >= node
        ),
        "not only at that of rank 0",
    ),
    (
        "network_bytes",
        lambda sizes, sent, node: network_bytes(sizes[::-1], sent[::-1], node),
        "from outer to inner",
    ),
    ("possible_meshes", lambda world, *rest: world, "returns its argument"),
    (
        "possible_meshes",
        lambda world, layers, heads, node: possible_meshes(world, world, heads, node),
        "a stage needs a layer",
    ),
    (
        "possible_meshes",
        lambda world, layers, heads, node: possible_meshes(world, layers, node, node),
        "heads are not cut",
    ),
    (
        "possible_meshes",
        lambda world, layers, heads, node: possible_meshes(world, layers, heads, heads),
        "inside a machine",
    ),
    (
        "possible_meshes",
        lambda *case: [mesh[::-1] for mesh in possible_meshes(*case)],
        "[pp, dp, tp]",
    ),
]


class TestDeviceMesh(ExerciseLaws):
    exercises = EXERCISES
    wrong = WRONG
