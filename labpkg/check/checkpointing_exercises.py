"""Checkers of the exercises of the chapter runs/checkpointing.

Notation: a box of a tensor is [offsets, sizes], two lists with a number for each dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from labpkg.check.result import CheckResult, Exercise


def overlap(fn: Callable[..., Any]) -> CheckResult:
    """Check `overlap(first, second)`: what two boxes of a tensor share.

    Args:
        fn: your function; it returns a box, or None if they share no element.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _OVERLAP.check(fn)


def range_boxes(fn: Callable[..., Any]) -> CheckResult:
    """Check `range_boxes(num_columns, start, stop)`: a flat range of a matrix.

    Args:
        fn: your function; it returns the boxes in the order of their elements, as few
            as possible, none of them empty.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _RANGE_BOXES.check(fn)


def lost_way(fn: Callable[..., Any]) -> CheckResult:
    """Check `lost_way(velocity, lr, momentum, num_steps)`: what a lost buffer costs.

    The gradients are taken to be the same with and without the buffer.

    Args:
        fn: your function; it returns a tensor of the shape of `velocity`: parameters
            with a buffer that starts at 0, less those with `velocity`, after the steps.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _LOST_WAY.check(fn)


def checkpoint_interval(fn: Callable[..., Any]) -> CheckResult:
    """Check `checkpoint_interval(save_s, node_mtbf_s, num_nodes)`: how often to save.

    Args:
        fn: your function; it returns the seconds between two saves that waste the
            least, to first order.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _CHECKPOINT_INTERVAL.check(fn)


def steps_to_remove(fn: Callable[..., Any]) -> CheckResult:
    """Check `steps_to_remove(steps, is_valid, keep)`: retention that loses nothing.

    Args:
        fn: your function; it gets the steps of all checkpoints, in any order, whether
            each is valid, and how many valid ones to keep, the newest. It returns the
            steps to remove, ascending: older valid ones, and damaged ones that are
            older than the newest valid one.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _STEPS_TO_REMOVE.check(fn)


Box = Sequence[Sequence[int]]


def _overlap(first: Box, second: Box) -> list[list[int]] | None:
    starts, sizes = [], []
    for a, n, b, m in zip(*first, *second, strict=True):
        start, end = max(a, b), min(a + n, b + m)
        if start >= end:
            return None
        starts.append(start)
        sizes.append(end - start)
    return [starts, sizes]


def _ends(first: Box, second: Box) -> list[list[int]] | None:
    found = _overlap(first, second)
    if found is None:
        return None
    return [found[0], [a + n for a, n in zip(*found, strict=True)]]


def _hull(first: Box, second: Box) -> list[list[int]]:
    quads = list(zip(*first, *second, strict=True))
    starts = [min(a, b) for a, _, b, _ in quads]
    ends = [max(a + n, b + m) for a, n, b, m in quads]
    return [starts, [end - start for start, end in zip(starts, ends, strict=True)]]


def _local(first: Box, second: Box) -> list[list[int]] | None:
    found = _overlap(first, second)
    if found is None:
        return None
    return [[a - b for a, b in zip(found[0], first[0], strict=True)], found[1]]


_OVERLAP = Exercise(
    name="overlap",
    arguments=("first", "second"),
    rtol=0.0,  # whole numbers
    reference=_overlap,
    cases=[
        ([[1, 2], [4, 4]], [[2, 0], [6, 5]]),
        ([[1], [3]], [[2], [5]]),
        ([[0, 0], [2, 2]], [[2, 0], [2, 2]]),
        ([[0, 4], [6, 2]], [[3, 0], [1, 8]]),
        ([[2, 2], [2, 2]], [[0, 0], [9, 9]]),
        ([[0, 0], [2, 8]], [[1, 9], [4, 3]]),
        ([[1, 2, 3], [4, 5, 6]], [[3, 0, 8], [1, 4, 2]]),
        ([[5], [1]], [[0], [5]]),
        ([[], []], [[], []]),
    ],
    mistakes={
        "the second list holds sizes, not ends": _ends,
        "this box surrounds both; they share where all dims do": _hull,
        "offsets count in the whole tensor, not within the first box": _local,
        "boxes that touch share nothing: return None where a size would be 0": (
            lambda first, second: (
                _overlap(first, second)
                or [
                    [max(a, b) for a, b in zip(first[0], second[0], strict=True)],
                    [
                        max(0, min(a + n, b + m) - max(a, b))
                        for a, n, b, m in zip(*first, *second, strict=True)
                    ],
                ]
            )
        ),
    },
    hint="in each dim from the larger offset to the smaller end",
)


def _range_boxes(columns: int, start: int, stop: int) -> list[list[list[int]]]:
    found: list[list[list[int]]] = []
    while start < stop:
        row, column = divmod(start, columns)
        if column == 0 and stop - start >= columns:
            height, width = (stop - start) // columns, columns
        else:
            height, width = 1, min(columns - column, stop - start)
        found.append([[row, column], [height, width]])
        start += height * width
    return found


def _row_by_row(columns: int, start: int, stop: int) -> list[list[list[int]]]:
    return [
        [[row + k, column], [1, width]]
        for (row, column), (height, width) in _range_boxes(columns, start, stop)
        for k in range(height)
    ]


def _three(columns: int, start: int, stop: int) -> list[list[list[int]]]:
    """Return the end of a row, rows and the beginning of one, empty or not."""
    first, last = -(-start // columns), stop // columns
    return [
        [[start // columns, start % columns], [1, -start % columns]],
        [[first, 0], [max(0, last - first), columns]],
        [[last, 0], [1, stop % columns]],
    ]


_RANGE_BOXES = Exercise(
    name="range_boxes",
    arguments=("num_columns", "start", "stop"),
    rtol=0.0,
    reference=_range_boxes,
    cases=[
        (5, 3, 18),
        (4, 4, 12),
        (4, 0, 6),
        (4, 2, 8),
        (8, 17, 21),
        (3, 2, 4),
        (6, 5, 5),
        (1, 2, 7),
        (1000, 1, 2999),
    ],
    mistakes={
        "join whole rows to one box": _row_by_row,
        "leave out boxes without elements, and a range may lie inside one row": _three,
        "the surrounding rows hold more than the range: begin and end inside a row": (
            lambda columns, start, stop: [
                [
                    [start // columns, 0],
                    [-(-stop // columns) - start // columns, columns],
                ]
            ]
        ),
        "these are ranges of the flat matrix; a box has a row and a column": (
            lambda columns, start, stop: [[[start], [stop - start]]]
        ),
        "each box is [offsets, sizes], not [sizes, offsets]": (
            lambda columns, start, stop: [
                box[::-1] for box in _range_boxes(columns, start, stop)
            ]
        ),
    },
    hint="the rest of a row, then whole rows, then the beginning of a row",
)


def _way(velocity: Tensor, lr: float, momentum: float, num_steps: int) -> Tensor:
    return lr * velocity * sum(momentum**k for k in range(1, num_steps + 1))


def _velocity(seed: int, num: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, generator=generator, dtype=torch.float64)


_LOST_WAY = Exercise(
    name="lost_way",
    arguments=("velocity", "lr", "momentum", "num_steps"),
    rtol=1e-9,
    reference=_way,
    cases=[
        (_velocity(0, 3), 0.1, 0.9, 2),
        (_velocity(1, 4), 0.1, 0.9, 1),
        (_velocity(2, 2), 0.5, 0.5, 20),
        (_velocity(3, 5), 1e-3, 0.99, 1000),
        (_velocity(4, 3), 0.1, 0.0, 5),
        (_velocity(5, 3), 0.1, 0.9, 0),
    ],
    mistakes={
        "the buffer is multiplied by the momentum before the first step": (
            lambda v, lr, mu, k: lr * v * sum(mu**i for i in range(k))
        ),
        "this is what the first step lacks; the later ones lack some, too": (
            lambda v, lr, mu, k: lr * mu * v
        ),
        "this is what the last step lacks; add what all of them lack": (
            lambda v, lr, mu, k: lr * mu**k * v
        ),
        "that is the sum over infinitely many steps": (
            lambda v, lr, mu, k: lr * mu / (1 - mu) * v
        ),
        "an update is subtracted: without the buffer the parameters have gone less far "
        "in the direction of -velocity": lambda v, lr, mu, k: -_way(v, lr, mu, k),
        "a step is lr times the buffer": lambda v, lr, mu, k: _way(v, 1.0, mu, k),
    },
    hint="step k lacks lr momentum^k velocity; add them up",
)


def _interval(save_s: float, node_mtbf_s: float, num_nodes: int) -> float:
    return math.sqrt(2 * save_s * node_mtbf_s / num_nodes)


_CHECKPOINT_INTERVAL = Exercise(
    name="checkpoint_interval",
    arguments=("save_s", "node_mtbf_s", "num_nodes"),
    reference=_interval,
    cases=[
        (30.0, 3e7, 100),
        (30.0, 3e7, 1),
        (1.0, 86_400.0, 4),
        (120.0, 2e7, 2000),
        (0.05, 1e6, 8),
    ],
    mistakes={
        "with n nodes the job fails n times as often": (
            lambda save_s, node_mtbf_s, num_nodes: _interval(save_s, node_mtbf_s, 1)
        ),
        "more nodes fail more often: divide by their number": (
            lambda save_s, node_mtbf_s, num_nodes: _interval(
                save_s, node_mtbf_s * num_nodes**2, num_nodes
            )
        ),
        "on average half an interval is lost, hence the 2": (
            lambda save_s, node_mtbf_s, num_nodes: math.sqrt(
                save_s * node_mtbf_s / num_nodes
            )
        ),
        "this is the time between failures; between saves it is shorter": (
            lambda save_s, node_mtbf_s, num_nodes: node_mtbf_s / num_nodes
        ),
        "this is the square of the interval": (
            lambda save_s, node_mtbf_s, num_nodes: 2 * save_s * node_mtbf_s / num_nodes
        ),
    },
    hint="the minimum of save_s / T + T / (2 M), with M = node_mtbf_s / num_nodes",
)


def _removed(steps: Sequence[int], is_valid: Sequence[bool], keep: int) -> list[int]:
    valid = sorted((s for s, ok in zip(steps, is_valid, strict=True) if ok))
    kept = set(valid[-keep:])
    newest = max(valid, default=-1)
    return sorted(s for s in steps if s not in kept and s < newest)


def _kept_of_all(steps: Sequence[int], is_valid: Any, keep: int) -> list[int]:
    return sorted(steps)[:-keep]


_STEPS_TO_REMOVE = Exercise(
    name="steps_to_remove",
    arguments=("steps", "is_valid", "keep"),
    rtol=0.0,
    reference=_removed,
    cases=[
        ([100, 200, 300, 400, 500], [True, True, False, True, False], 2),
        ([100, 200, 300], [True, True, True], 2),
        ([900, 1000, 1100], [True, True, True], 1),
        ([300, 100, 200], [True, True, True], 1),
        ([100, 200], [True, False], 1),
        ([100, 200], [False, False], 1),
        ([100], [True], 3),
        ([], [], 1),
    ],
    mistakes={
        "a damaged one is no checkpoint to keep: count valid ones": _kept_of_all,
        "these are the ones that stay": lambda steps, is_valid, keep: sorted(
            set(steps) - set(_removed(steps, is_valid, keep))
        ),
        "a damaged one that is newer than all valid ones may be a save that still goes "
        "on: leave it": lambda steps, is_valid, keep: sorted(
            {s for s, ok in zip(steps, is_valid, strict=True) if not ok}
            | set(_removed(steps, is_valid, keep))
        ),
        "damaged ones that are older than the newest valid one go, too": (
            lambda steps, is_valid, keep: [
                s
                for s in _removed(steps, is_valid, keep)
                if is_valid[list(steps).index(s)]
            ]
        ),
        "this keeps the oldest": lambda steps, is_valid, keep: sorted(
            s for s, ok in zip(steps, is_valid, strict=True) if ok
        )[keep:],
    },
    hint="the `keep` valid ones of the highest steps stay, and what is newer than all "
    "valid ones",
)
