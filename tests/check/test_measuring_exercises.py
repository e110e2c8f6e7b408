import itertools
import math
import statistics

import pytest

from labpkg.check import measuring_exercises

from .laws import ExerciseLaws

NAMES = (
    "serial_fraction",
    "rotation",
    "quiet_ratio",
    "mfu_once",
    "mean_in_flight",
)


def serial_fraction(one_s, many_s, n):
    return (many_s / one_s - 1 / n) / (1 - 1 / n)


def rotation(names, num_rounds):
    size = len(names)
    return [names[(i + j) % size] for i in range(num_rounds) for j in range(size)]


def quiet_ratio(base, new, base_share, new_share, limit):
    rounds = zip(base, new, base_share, new_share, strict=True)
    ratios = [b / a for a, b, x, y in rounds if x <= limit and y <= limit]
    return statistics.median(ratios) if ratios else math.nan


def mfu_once(percent, num_parameters, num_layers, width, sequence_length, vocab_size):
    flops = 6 * num_parameters + 12 * num_layers * width * sequence_length
    return percent - percent * 6 * vocab_size * width / flops


def mean_in_flight(arrivals, departures, start, stop):
    """Walk along the steps of N(t)."""
    inside = [start, stop, *(t for t in arrivals + departures if start < t < stop)]
    inside.sort()
    area = 0.0
    for t, later in itertools.pairwise(inside):
        visits = zip(arrivals, departures, strict=True)
        area += (later - t) * sum(a <= t and later <= b for a, b in visits)
    return area / (stop - start)


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_pass(name):
    assert getattr(measuring_exercises, name)(globals()[name])


WRONG = [
    ("serial_fraction", lambda one, many, n: one, "returns its argument"),
    ("serial_fraction", lambda one, many, n: many / one, "take it off"),
    ("serial_fraction", lambda one, many, n: 1 - one / many / n, "1 - E"),
    ("serial_fraction", lambda one, many, n: many / one - 1 / n, "divide by 1 - 1/n"),
    ("rotation", lambda names, k: names, "returns its argument"),
    ("rotation", lambda names, k: names * k, "A is always the first"),
    ("rotation", lambda names, k: sorted(names * k), "hits B alone"),
    (
        "rotation",
        lambda names, k: [names[i % len(names) :] for i in range(k)],
        "return a list of 9",
    ),
    ("quiet_ratio", lambda a, b, x, y, limit: a, "returns its argument"),
    (
        "quiet_ratio",
        lambda a, b, x, y, limit: statistics.median(b) / statistics.median(a),
        "nobody disturbed",
    ),
    (
        "quiet_ratio",
        lambda a, b, x, y, limit: quiet_ratio(b, a, y, x, limit),
        "new by base",
    ),
    ("mfu_once", lambda p, N, L, D, T, V: p, "returns its argument"),
    ("mfu_once", lambda p, N, L, D, T, V: p * (1 - V * D / N), "a part of the FLOPs"),
    (
        "mfu_once",
        lambda p, N, L, D, T, V: mfu_once(p, N, L, D, T, V) / 100,
        "in percent",
    ),
    ("mean_in_flight", lambda a, b, start, stop: a, "returns its argument"),
    (
        "mean_in_flight",
        lambda a, b, start, stop: (
            sum(go - come for come, go in zip(a, b, strict=True)) / (stop - start)
        ),
        "only the time between",
    ),
    (
        "mean_in_flight",
        lambda a, b, start, stop: (
            mean_in_flight(a, b, start, stop) * (stop - start) / stop
        ),
        "not by stop",
    ),
]


class TestLaws(ExerciseLaws):
    exercises, wrong = (
        {name: getattr(measuring_exercises, name) for name in NAMES},
        WRONG,
    )
