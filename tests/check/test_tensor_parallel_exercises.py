"""The checkers of parallelism/tensor_parallel on cuts and costs: right and wrong."""

import math
from itertools import product
from typing import Any

import pytest
import torch

from labpkg import check
from labpkg.planning import cost
from tests.check.laws import ExerciseLaws

EXERCISES: dict[str, Any] = {
    name: checker
    for name, checker in vars(check).items()
    if getattr(checker, "__module__", "") == "labpkg.check.tensor_parallel_exercises"
}


def compute_bound_width(n, itemsize, flops_per_s, bytes_per_s):
    """Compare the two times at width 1: one grows with D^2, the other with D."""
    bytes_sent = cost.wire_bytes("all_reduce", itemsize, n)
    operations = 2 * (1 * 4 + 4 * 1) / n
    return (bytes_sent / bytes_per_s) / (operations / flops_per_s)


def feed_forward(x, ups, up_biases, downs, down_bias):
    """Join everything and run one process."""
    hidden = (x @ torch.cat(ups, -1) + torch.cat(up_biases)).relu()
    return hidden @ torch.cat(downs) + down_bias


def qkv_rows(num_heads, num_kv_heads, head_width, n, rank):
    """Let torch cut three blocks of row numbers."""
    heads = torch.tensor([num_heads, num_kv_heads, num_kv_heads])
    blocks = torch.arange(int(heads.sum()) * head_width).split(
        (heads * head_width).tolist()
    )
    return torch.cat([block.chunk(n)[rank] for block in blocks]).tolist()


def cheapest_cuts(widths, n):
    """Try every way: columns or rows, and what follows, for each layer."""
    share, best = (n - 1) / n, float("inf")
    for plan in product(("column", "all_reduce", "scatter"), repeat=len(widths) - 1):
        total, is_whole = 0.0, True
        for way, width_in, width_out in zip(plan, widths, widths[1:], strict=False):
            if way == "column" and not is_whole:
                total += share * width_in  # gather first; a slice costs nothing
            total += {"column": 0, "all_reduce": 2, "scatter": 1}[way] * (
                share * width_out
            )
            is_whole = way == "all_reduce"
        total += 0 if is_whole else share * widths[-1]
        best = min(best, total)
    return best


RIGHT = [
    ("compute_bound_width", compute_bound_width),
    ("feed_forward", feed_forward),
    ("qkv_rows", qkv_rows),
    ("cheapest_cuts", cheapest_cuts),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_pass(name, answer):
    result = EXERCISES[name](answer)
    assert result, result.message
    assert result.cases >= 8


def scaled(factor):
    """Return an answer that is wrong by a factor, a number or a function of n."""
    return lambda n, *rest: (
        compute_bound_width(n, *rest) * (factor(n) if callable(factor) else factor)
    )


def bias_on_each_rank(x, ups, up_biases, downs, down_bias):
    shards = zip(ups, up_biases, downs, strict=True)
    return sum((x @ up + a).relu() @ down + down_bias for up, a, down in shards)


def relu_at_the_end(x, ups, up_biases, downs, down_bias):
    shards = zip(ups, up_biases, downs, strict=True)
    return sum((x @ up + a) @ down for up, a, down in shards).relu() + down_bias


def first_rank(x, ups, up_biases, downs, down_bias):
    return feed_forward(x, ups[:1], up_biases[:1], downs[:1], down_bias)


def list_of_ranks(x, ups, up_biases, downs, down_bias):
    shards = zip(ups, up_biases, downs, strict=True)
    return [(x @ up + a).relu() @ down for up, a, down in shards]


def chunk_of_all(num_heads, num_kv_heads, head_width, n, rank):
    rows = (num_heads + 2 * num_kv_heads) * head_width
    return torch.arange(rows).chunk(n)[rank].tolist()


def equal_heads(num_heads, num_kv_heads, head_width, n, rank):
    return qkv_rows(num_heads, num_heads, head_width, n, rank)


def every_nth(num_heads, num_kv_heads, head_width, n, rank):
    rows = torch.arange((num_heads + 2 * num_kv_heads) * head_width)
    heads = rows.view(-1, head_width)
    blocks = heads.split([num_heads, num_kv_heads, num_kv_heads])
    return torch.cat([block[rank::n] for block in blocks]).flatten().tolist()


def values_on_keys(num_heads, num_kv_heads, head_width, n, rank):
    own = qkv_rows(num_heads, num_kv_heads, head_width, n, rank)
    width = num_kv_heads * head_width // n
    return own[:-width] + own[-2 * width : -width]


def values_after_as_many(num_heads, num_kv_heads, head_width, n, rank):
    own = qkv_rows(num_heads, num_kv_heads, head_width, n, rank)
    width = num_kv_heads * head_width // n
    missing = (num_heads - num_kv_heads) * head_width
    return own[:-width] + [row + missing for row in own[-width:]]


def queries_only(num_heads, num_kv_heads, head_width, n, rank):
    return qkv_rows(num_heads, num_kv_heads, head_width, n, rank)[
        : num_heads * head_width // n
    ]


def pairs(widths, n):
    share, total = (n - 1) / n, 0.0
    for layer, width in enumerate(widths[1:]):
        total += 2 * share * width if layer % 2 else 0
    return total + (share * widths[-1] if len(widths) % 2 == 0 else 0)


WRONG = [
    ("compute_bound_width", lambda n, *rest: n, "returns its argument"),
    ("compute_bound_width", scaled(4 / 3), "there is no attention"),
    ("compute_bound_width", scaled(2 / 3), "counts backward"),
    ("compute_bound_width", scaled(8 / 9), "in training"),
    ("compute_bound_width", scaled(2), "twice too much"),
    ("compute_bound_width", scaled(1 / 2), "which two collectives"),
    ("compute_bound_width", scaled(lambda n: 1 / n), "share the arithmetic"),
    ("compute_bound_width", scaled(lambda n: n / (n - 1)), "to itself"),
    ("compute_bound_width", lambda n, i, *rest: scaled(1)(n, 1, *rest), "counts numb"),
    ("compute_bound_width", lambda n, *rest: scaled(1)(2, *rest), "number of ranks"),
    ("compute_bound_width", scaled(lambda n: n / (2 * n - 2)), "is the payload"),
    ("compute_bound_width", lambda *c: int(scaled(1)(*c)), "not rounded down"),
    (
        "compute_bound_width",
        lambda *c: math.ceil(scaled(1)(*c) - 1e-9),
        "not rounded up",
    ),
    ("feed_forward", lambda x, *rest: x, "returns its argument"),
    ("feed_forward", lambda *c: feed_forward(*c).relu(), "behind the second layer"),
    ("feed_forward", bias_on_each_rank, "how often"),
    ("feed_forward", lambda *c: feed_forward(*c) - c[4], "bias of the second"),
    ("feed_forward", relu_at_the_end, "between the layers"),
    ("feed_forward", first_rank, "what rank 0 has"),
    ("feed_forward", list_of_ranks, "what is the output"),
    (
        "feed_forward",
        lambda *c: (feed_forward(*c) - c[4]) / len(c[1]) + c[4],
        "not the mean",
    ),
    ("qkv_rows", lambda *case: case[0], "returns its argument"),
    ("qkv_rows", chunk_of_all, "one slice"),
    ("qkv_rows", equal_heads, "fewer heads"),
    ("qkv_rows", every_nth, "next to each other"),
    ("qkv_rows", queries_only, "where are the keys"),
    ("qkv_rows", values_on_keys, "values begin where"),
    ("qkv_rows", values_after_as_many, "first row of values"),
    ("qkv_rows", lambda *case: [1 + row for row in qkv_rows(*case)], "from 0"),
    ("qkv_rows", lambda N, G, H, n, r: qkv_rows(N, G, 1, n, r), "has several rows"),
    ("cheapest_cuts", lambda widths, n: n, "returns its argument"),
    ("cheapest_cuts", pairs, "pairs of columns and rows"),
    ("cheapest_cuts", lambda w, n: (n - 1) / n * sum(w[1:]), "columns everywhere"),
    ("cheapest_cuts", lambda w, n: 2 * (n - 1) / n * sum(w[1:]), "rows everywhere"),
    ("cheapest_cuts", lambda w, n: cheapest_cuts(w, n) * n, "all ranks send"),
    (
        "cheapest_cuts",
        lambda w, n: cheapest_cuts(w, n) - w[-1] * (n - 1) / n,
        "whole on every rank",
    ),
    (
        "cheapest_cuts",
        lambda w, n: cheapest_cuts(w, n) + w[-1] * (n - 1) / n,
        "than an all-reduce",
    ),
]


class TestLaws(ExerciseLaws):
    exercises, wrong = EXERCISES, WRONG


def test_each_exercise_has_a_right_answer():
    assert {name for name, _ in RIGHT} == set(EXERCISES)
