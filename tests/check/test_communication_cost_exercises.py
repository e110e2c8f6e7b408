import math
from typing import Any

import pytest
import torch

import labpkg as lab
from labpkg import check
from labpkg.check import communication_cost_exercises, messages_exercises
from tests.check.laws import ExerciseLaws


def exercises(module: str) -> dict[str, Any]:
    return {
        name: checker
        for name, checker in vars(check).items()
        if getattr(checker, "__module__", "") == f"labpkg.check.{module}"
    }


# ---- right answers, written otherwise than the references ---------------------------


def ring_time(num_bytes, n, alpha_s, beta_s_per_byte):
    link = lab.AlphaBeta(alpha_s, beta_s_per_byte)
    return lab.all_reduce_time(num_bytes, n, link)


def doubling_rounds(n):
    link = lab.AlphaBeta(1.0, 0.0)
    return lab.all_reduce_time(0, n, link, algorithm="recursive_doubling")


def ring_pays_from(n, alpha_s, beta_s_per_byte):
    return lab.crossover_bytes(n, lab.AlphaBeta(alpha_s, beta_s_per_byte))


def fit_alpha_beta(num_bytes, seconds):
    samples = zip(num_bytes.tolist(), seconds.tolist(), strict=True)
    link = lab.AlphaBeta.fit(samples)
    return link.alpha_s, link.beta_s_per_byte


def num_pieces(num_bytes, n, alpha_s, beta_s_per_byte):
    k = 1
    while k * (k + 1) * alpha_s < (n - 2) * num_bytes * beta_s_per_byte:
        k += 1  # one more piece gains more bytes than latency
    return k


def finish_times(programs, alpha_s, beta_s_per_byte):
    rest, clocks = [list(program) for program in programs], [0.0] * len(programs)
    while True:
        for rank, program in enumerate(rest):
            while program and program[0][0] == "work":
                clocks[rank] += program.pop(0)[1]
        pairs = [
            (rank, program[0][1])
            for rank, program in enumerate(rest)
            if program and program[0][0] == "send"
        ]
        met = [(src, dst) for src, dst in pairs if rest[dst][:1] == [("recv", src)]]
        if not met:
            return [
                math.inf if program else clock
                for program, clock in zip(rest, clocks, strict=True)
            ]
        for src, dst in met:
            (_, _, num_bytes), _ = rest[src].pop(0), rest[dst].pop(0)
            end = max(clocks[src], clocks[dst]) + alpha_s + num_bytes * beta_s_per_byte
            clocks[src] = clocks[dst] = end


@pytest.mark.parametrize(
    "answer",
    [
        ring_time,
        doubling_rounds,
        ring_pays_from,
        fit_alpha_beta,
        num_pieces,
        finish_times,
    ],
    ids=lambda answer: answer.__name__,
)
def test_right_answers_pass(answer):
    assert getattr(check, answer.__name__)(answer)


def test_a_list_is_a_pair():
    assert check.fit_alpha_beta(lambda S, t: list(fit_alpha_beta(S, t)))


def plain_fit(num_bytes, seconds):
    rows = torch.stack([torch.ones_like(num_bytes), num_bytes], 1)
    return tuple(torch.linalg.lstsq(rows, seconds[:, None]).solution[:, 0])


WRONG = [
    ("ring_time", lambda S, n, a, b: S, "returns its argument"),
    ("ring_time", lambda S, n, a, b: (n - 1) * (a + S / n * b), "this is half of it"),
    ("ring_time", lambda S, n, a, b: 2 * (n - 1) * (a + S * b), "one piece of n"),
    ("ring_time", lambda S, n, a, b: a + 2 * (n - 1) / n * S * b, "every round pays"),
    ("ring_time", lambda S, n, a, b: 2 * (n * a + S * b), "would bring it home"),
    ("doubling_rounds", lambda n: n, "returns its argument"),
    ("doubling_rounds", lambda n: int(math.log2(n)), "only for powers of two"),
    ("doubling_rounds", lambda n: math.ceil(math.log2(n)), "one round too few"),
    ("doubling_rounds", lambda n: int(math.log2(n)) + 2, "no extra rounds"),
    ("doubling_rounds", lambda n: math.log2(n), "rounds are whole"),
    ("ring_pays_from", lambda n, a, b: n, "returns its argument"),
    ("ring_pays_from", lambda n, a, b: a / b, "half latency"),
    ("ring_pays_from", lambda n, a, b: ring_pays_from(n, b, a), "alpha / beta"),
    (
        "ring_pays_from",
        lambda n, a, b: ring_pays_from(n, a, b) if n > 2 else 0.0,
        "it never pays",
    ),
    (
        "ring_pays_from",
        lambda n, a, b: a * (2 * n - 2 - math.log2(n)) / b / (math.log2(n) - 2 + 2 / n),
        "called as ring_pays_from(n, alpha_s",  # n = 2 divides by zero
    ),
    ("fit_alpha_beta", lambda S, t: S, "returns its argument"),
    ("fit_alpha_beta", plain_fit, "absolute errors"),
    ("fit_alpha_beta", lambda S, t: fit_alpha_beta(S, t)[::-1], "the order is"),
    (
        "fit_alpha_beta",
        lambda S, t: (fit_alpha_beta(S, t)[0], 1 / fit_alpha_beta(S, t)[1]),
        "seconds per byte",
    ),
    ("num_pieces", lambda S, n, a, b: S, "returns its argument"),
    ("num_pieces", lambda S, n, a, b: math.sqrt((n - 2) * S * b / a), "are whole"),
    (
        "num_pieces",
        lambda S, n, a, b: int(math.sqrt((n - 2) * S * b / a)),
        "at least one piece",
    ),
    (
        "num_pieces",
        lambda S, n, a, b: max(1, round(math.sqrt((n - 2) * S * b / a))),
        "the nearest whole number",
    ),
    (
        "num_pieces",
        lambda S, n, a, b: max(1, int(math.sqrt((n - 2) * S * b / a))),
        "rounding down",
    ),
    ("num_pieces", lambda S, n, a, b: num_pieces(S, n + 1, a, b), "n - 1 hops"),
]

WRONG_TIMES = [
    ("finish_times", lambda p, a, b: p, "returns its argument"),
    (
        "finish_times",
        lambda p, a, b: [
            math.fsum(
                first if kind == "work" else a + (more[0] if more else 1e6) * b
                for kind, first, *more in program
            )
            for program in p
        ],
        "while somebody can go on",
    ),
    ("finish_times", lambda p, a, b: finish_times(p, 0, b), "pays alpha"),
    ("finish_times", lambda p, a, b: max(finish_times(p, a, b)), "for each rank"),
    (
        "finish_times",
        lambda p, a, b: [min(t, 1e9) for t in finish_times(p, a, b)],
        "while somebody can go on",
    ),
]


class TestLaws(ExerciseLaws):
    exercises, wrong = exercises("communication_cost_exercises"), WRONG


class TestLawsOfMessages(ExerciseLaws):
    exercises, wrong = exercises("messages_exercises"), WRONG_TIMES


def test_each_exercise_has_cases_that_settle_its_corners():
    cases = communication_cost_exercises._RING_PAYS_FROM.cases
    assert any(n == 2 for n, *_ in cases)
    ends = [
        messages_exercises._simulate(*case)
        for case in messages_exercises._FINISH_TIMES.cases
    ]
    assert sum(math.inf in times for times in ends) >= 3  # deadlocks
    assert any(math.inf in times and min(times) < math.inf for times in ends)
