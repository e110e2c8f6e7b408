"""Checkers of the exercises of the chapter parallelism/tensor_parallel: cuts and costs.

What each of n ranks holds is given as a list, so that nothing is sent. Notation: B
samples, D width, F hidden width, N heads of width H.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from labpkg.check.result import CheckResult, Exercise


def compute_bound_width(fn: Callable[..., Any]) -> CheckResult:
    """Check `compute_bound_width(n, itemsize, flops_per_s, bytes_per_s)`.

    The smallest width D from which forward of a feed-forward part with F = 4 D, cut
    over n ranks, spends at least as much time on arithmetic as on its all-reduce.

    Args:
        fn: your function; it returns a number, not rounded.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _COMPUTE_BOUND_WIDTH.check(fn)


def feed_forward(fn: Callable[..., Any]) -> CheckResult:
    """Check `feed_forward(x, ups, up_biases, downs, down_bias)`: cut, with biases.

    relu(x U + u) W + w, where rank r holds a slice of the columns of U and of u, and of
    the rows of W.

    Shape:
        x (B, D), ups n x (D, F/n), up_biases n x (F/n,), downs n x (F/n, D),
        down_bias (D,) -> (B, D)

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _FEED_FORWARD.check(fn)


def qkv_rows(fn: Callable[..., Any]) -> CheckResult:
    """Check `qkv_rows(num_heads, num_kv_heads, head_width, n, rank)`.

    The rows of a fused matrix that a rank holds. Queries of all heads are stacked on
    keys and values, of which there may be fewer heads; a rank holds whole heads, next
    to each other, with the keys and values that they read.

    Args:
        fn: your function; it returns a list of row numbers, in ascending order.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _QKV_ROWS.check(fn)


def cheapest_cuts(fn: Callable[..., Any]) -> CheckResult:
    """Check `cheapest_cuts(widths, n)`: the least that a forward pass can send.

    Layers with an elementwise function between them; each matrix is cut, by columns or
    by rows; input and output are whole on every rank. Counted are the numbers that a
    rank sends for each sample, on rings.

    Args:
        fn: your function; it returns a number.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _CHEAPEST_CUTS.check(fn)


def _bound(flops: float, numbers: float) -> Callable[..., float]:
    """Return the bound for flops x D^2 / n operations and numbers x D to send.

    The numbers are those of a token, divided by (n - 1) / n.
    """
    return lambda n, itemsize, flops_per_s, bytes_per_s: (
        (n - 1) * numbers / flops * itemsize * flops_per_s / bytes_per_s
    )


_COMPUTE_BOUND_WIDTH = Exercise(
    name="compute_bound_width",
    arguments=("n", "itemsize", "flops_per_s", "bytes_per_s"),
    reference=_bound(16, 2),
    cases=[
        (6, 4, 8.0, 1.0),  # here each mistake gives another number
        (8, 2, 4e14, 4e11),
        (8, 2, 4e14, 5e10),
        (4, 4, 1e11, 2e9),
        (64, 1, 1e15, 1e11),
        (3, 2, 1e14, 1e11),
        (1, 2, 4e14, 5e10),
        (2, 4, 5e10, 4e9),
    ],
    mistakes={
        "that is the width for a whole layer; here there is no attention": (
            _bound(24, 4)
        ),
        "that counts backward as well; asked is forward": _bound(48, 4),
        "that is the width for a whole layer in training": _bound(72, 8),
        "an all-reduce sends more than that: which two collectives is it made of?": (
            _bound(16, 1)
        ),
        "twice too much: how many all-reduces are there, how many matrices, and how "
        "many operations in a multiplication with its addition?": _bound(8, 2),
        "how many ranks share the arithmetic?": lambda n, *rest: (
            _bound(16, 2)(n, *rest) / n
        ),
        "how does the answer depend on the number of ranks?": lambda n, *rest: _bound(
            16, 2
        )(2, *rest),
        "that is the payload; what does a rank send of it?": lambda n, *rest: _bound(
            16, 1
        )(n + 1, *rest),
        "a rank of a ring does not send its last piece to itself": lambda n, *rest: (
            _bound(16, 2)(n + 1, *rest)
        ),
        "that counts numbers, but the link has bytes per second": (
            lambda n, itemsize, *rest: _bound(16, 2)(n, 1, *rest)
        ),
        "from which width on, not from which 1 / width on": lambda *case: (
            1 / max(_bound(16, 2)(*case), 1e-30)
        ),
        "asked is the bound itself, not rounded up": lambda *case: math.ceil(
            _bound(16, 2)(*case)
        ),
        "asked is the bound itself, not rounded down": lambda *case: math.floor(
            _bound(16, 2)(*case)
        ),
    },
    hint="write down two times, each as a function of D and of the number of tokens, "
    "and see what cancels",
    atol=1e-9,
)


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(sum(shape) + 1000 * seed)
    return torch.randn(*shape, generator=generator, device="cpu")


Shards = Sequence[Tensor]


def _partial_sums(x: Tensor, ups: Shards, up_biases: Shards, downs: Shards) -> Tensor:
    shards = zip(ups, up_biases, downs, strict=True)
    parts = [(x @ up + bias).relu() @ down for up, bias, down in shards]
    return torch.stack(parts)


def _whole_output(x: Any, ups: Any, up_biases: Any, downs: Any, bias: Any) -> Tensor:
    return _partial_sums(x, ups, up_biases, downs).sum(0) + bias


def _relu_of_sum(x: Any, ups: Any, up_biases: Any, downs: Any, bias: Any) -> Tensor:
    linear = _no_relu(x, ups, up_biases, downs, 0.0)
    return linear.relu() + bias


def _no_relu(x: Any, ups: Any, up_biases: Any, downs: Any, bias: Any) -> Tensor:
    shards = zip(ups, up_biases, downs, strict=True)
    return sum((x @ up + b) @ down for up, b, down in shards) + bias


def _late_bias(x: Any, ups: Any, up_biases: Any, downs: Any, bias: Any) -> Tensor:
    shards = zip(ups, up_biases, downs, strict=True)
    return sum(((x @ up).relu() + b) @ down for up, b, down in shards) + bias


def _feed_forward_case(B: int, D: int, F: int, n: int, seed: int = 0) -> tuple:
    up, down = _random(D, F, seed=seed), _random(F, D, seed=seed + 1)
    biases = list(_random(F, seed=seed + 2).chunk(n))
    ups, downs = list(up.chunk(n, 1)), list(down.chunk(n, 0))
    return _random(B, D, seed=seed + 3), ups, biases, downs, _random(D, seed=seed + 4)


def _plain_case() -> tuple:
    """Return two ranks with one hidden unit each, to compute by hand."""
    x, *matrices = (
        torch.tensor([[value]], device="cpu") for value in (4.0, 1.0, -1.0, 2.0, 3.0)
    )
    biases = torch.tensor([1.0, 8.0, 1.0], device="cpu").split(1)
    return x, matrices[:2], list(biases[:2]), matrices[2:], biases[2]


_FEED_FORWARD = Exercise(
    name="feed_forward",
    arguments=("x", "ups", "up_biases", "downs", "down_bias"),
    reference=_whole_output,
    cases=[
        _plain_case(),
        _feed_forward_case(3, 4, 8, 2),
        _feed_forward_case(2, 2, 8, 4),
        _feed_forward_case(5, 3, 3, 3),
        _feed_forward_case(1, 6, 24, 8),
        _feed_forward_case(4, 2, 6, 1),
        _feed_forward_case(2, 8, 4, 4, seed=7),
        _feed_forward_case(7, 5, 10, 5, seed=9),
    ],
    mistakes={
        "how often is the bias of the second layer in your sum?": (
            lambda x, ups, biases, downs, b: _whole_output(
                x, ups, biases, downs, len(ups) * b
            )
        ),
        "where is the bias of the second layer?": lambda x, ups, biases, downs, _: (
            _whole_output(x, ups, biases, downs, 0.0)
        ),
        "where is the bias of the first layer?": lambda x, ups, _, downs, b: (
            _whole_output(x, ups, [0.0] * len(ups), downs, b)
        ),
        "the bias of the first layer stands inside relu": _late_bias,
        "relu belongs between the layers, on each slice": _relu_of_sum,
        "where is relu?": _no_relu,
        "nothing stands behind the second layer": lambda *case: _whole_output(
            *case
        ).relu(),
        "the whole product of rows is not the mean over ranks": lambda *case: (
            _partial_sums(*case[:4]).mean(0) + case[4]
        ),
        "this is what rank 0 has; the rest of the product lies on other ranks": (
            lambda *case: _partial_sums(*case[:4])[0] + case[4]
        ),
        "that is a list of what ranks have; what is the output?": lambda *case: list(
            _partial_sums(*case[:4])
        ),
    },
    hint="what can a rank compute from its own slices, and what do ranks then add up?",
)


def _heads(num: int, n: int, rank: int) -> range:
    return range(rank * num // n, (rank + 1) * num // n)


def _rows(heads: Sequence[int], head_width: int, offset: int = 0) -> list[int]:
    return [
        (offset + head) * head_width + i for head in heads for i in range(head_width)
    ]


def _own_rows(N: int, G: int, H: int, n: int, rank: int) -> list[int]:
    own, shared = _heads(N, n, rank), _heads(G, n, rank)
    return _rows(own, H) + _rows(shared, H, N) + _rows(shared, H, N + G)


def _one_slice(N: int, G: int, H: int, n: int, rank: int) -> list[int]:
    rows = (N + 2 * G) * H
    return list(range(rank * rows // n, (rank + 1) * rows // n))


def _as_many_keys(N: int, G: int, H: int, n: int, rank: int) -> list[int]:
    own = _heads(N, n, rank)
    return _rows(own, H) + _rows(own, H, N) + _rows(own, H, 2 * N)


def _every_nth_head(N: int, G: int, H: int, n: int, rank: int) -> list[int]:
    own, shared = range(rank, N, n), range(rank, G, n)
    return _rows(own, H) + _rows(shared, H, N) + _rows(shared, H, N + G)


def _all_keys(N: int, G: int, H: int, n: int, rank: int) -> list[int]:
    return _rows(_heads(N, n, rank), H) + _rows(range(2 * G), H, N)


def _far_values(N: int, G: int, H: int, n: int, rank: int) -> list[int]:
    """Values after as many heads of keys as there are heads of queries."""
    own, shared = _heads(N, n, rank), _heads(G, n, rank)
    return _rows(own, H) + _rows(shared, H, N) + _rows(shared, H, 2 * N)


_QKV_ROWS = Exercise(
    name="qkv_rows",
    arguments=("num_heads", "num_kv_heads", "head_width", "n", "rank"),
    reference=_own_rows,
    cases=[
        (2, 2, 2, 2, 0),
        (2, 2, 2, 2, 1),
        (4, 2, 1, 2, 1),
        (8, 2, 2, 2, 0),
        (4, 4, 3, 4, 2),
        (8, 4, 1, 4, 3),
        (6, 3, 2, 3, 1),
        (4, 2, 2, 1, 0),
    ],
    mistakes={
        "one slice of the stacked matrix: are there queries, keys and values in it?": (
            _one_slice
        ),
        "there may be fewer heads of keys and values than of queries": _as_many_keys,
        "heads of a rank lie next to each other": _every_nth_head,
        "keys and values that no head of this rank reads": _all_keys,
        "those are numbers of heads; a head has several rows": (
            lambda N, G, H, *rest: _own_rows(N, G, 1, *rest)
        ),
        "where are the keys and values?": lambda N, G, H, n, rank: _rows(
            _heads(N, n, rank), H
        ),
        "values begin where the keys end": lambda N, G, H, n, rank: (
            _rows(_heads(N, n, rank), H) + 2 * _rows(_heads(G, n, rank), H, N)
        ),
        "how many rows of keys lie before the first row of values?": _far_values,
        "rows are counted from 0": lambda *case: [row + 1 for row in _own_rows(*case)],
    },
    hint="three blocks lie on top of each other; which rows of each are needed?",
)


def _fewest(widths: Sequence[int], n: int) -> float:
    """Return the least cost of a chain, state by state."""
    share = (n - 1) / n
    whole, cut = 0.0, 0.0  # until here, if the activation is whole, or cut
    for width in widths[1:]:
        reduced = cut + share * width  # rows, then reduce-scatter
        cut = min(whole, reduced)  # or columns
        whole = cut + share * width  # all-gather; with reduced: all-reduce
    return whole


def _in_pairs(widths: Sequence[int], n: int) -> float:
    """Columns, rows, columns, rows; an odd last layer is gathered."""
    rows = sum(2 * width for width in widths[2::2])
    return (n - 1) / n * (rows + (widths[-1] if len(widths) % 2 == 0 else 0))


def _without_scatter(widths: Sequence[int], n: int) -> float:
    """Rows always end in an all-reduce."""
    share = (n - 1) / n
    whole, cut = 0.0, 0.0
    for width in widths[1:]:
        reduced = cut + 2 * share * width
        cut = min(whole, reduced)
        whole = min(reduced, cut + share * width)
    return whole


_CHEAPEST_CUTS = Exercise(
    name="cheapest_cuts",
    arguments=("widths", "n"),
    reference=_fewest,
    cases=[
        ([6, 32, 4], 4),
        ([4, 16, 64, 16, 4], 2),
        ([8, 8], 4),
        ([16, 4, 16], 2),
        ([10, 20, 30, 5], 5),
        ([64, 32, 16, 8, 4, 2], 2),
        ([4, 16, 4, 16, 4], 8),
        ([7, 3, 9, 3, 9, 3], 3),
        ([4, 16, 4], 1),
    ],
    mistakes={
        "pairs of columns and rows are not always best": _in_pairs,
        "columns everywhere: what would a cut by rows save?": lambda widths, n: (
            (n - 1) / n * sum(widths[1:])
        ),
        "rows everywhere: what would a cut by columns save?": lambda widths, n: (
            2 * (n - 1) / n * sum(widths[1:])
        ),
        "must a product of rows always end in an all-reduce?": _without_scatter,
        "the output is to be whole on every rank": lambda widths, n: (
            _fewest(widths, n) - (n - 1) / n * widths[-1]
        ),
        "the activation before the last layer is cut: is there a cheaper way to a "
        "whole output than an all-reduce?": lambda widths, n: (
            _fewest(widths, n) + (n - 1) / n * widths[-1]
        ),
        "a rank of a ring sends a part of the payload": lambda widths, n: (
            _fewest(widths, n) * n / max(n - 1, 1)
        ),
        "that is what all ranks send together; asked is one": lambda widths, n: (
            n * _fewest(widths, n)
        ),
        "the input is whole: does the first layer have to send anything?": (
            lambda widths, n: (
                _fewest(widths, n) + (n - 1) / n * min(widths[0], widths[1])
            )
        ),
        "that counts the way in; count each pair of neighbours": lambda widths, n: (
            (n - 1) / n * sum(min(pair) for pair in pairwise(widths))
        ),
    },
    hint="between two layers the activation is whole or cut; what does each layer cost "
    "from one to the other, and what is the cheapest way through?",
)
