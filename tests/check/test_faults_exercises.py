import math
import statistics
from typing import Any

import pytest

from labpkg import check
from labpkg.check import faults_exercises
from labpkg.runs.faults import LossSpike
from tests.check.laws import ExerciseLaws

EXERCISES: dict[str, Any] = {
    name: checker
    for name, checker in vars(check).items()
    if getattr(checker, "__module__", "") == "labpkg.check.faults_exercises"
}


def goodput(num_steps, every, step_s, save_s, down_s, faults):
    """Walk through the attempts."""
    total_s, start = 0.0, 0
    for end in [*faults, num_steps]:
        total_s += (end - start) * step_s + (end // every - start // every) * save_s
        start = end // every * every
    return num_steps * step_s / (total_s + len(faults) * down_s)


def agree_to_skip(norms):
    is_bad = any(math.isnan(norm) or math.isinf(norm) for norm in norms)
    return [is_bad for _ in norms]


def spikes(losses, factor, window):
    kept, found = [], []
    for step, loss in enumerate(losses):
        recent = kept[-window:]
        if len(kept) < 5 or loss <= factor * statistics.median(recent):
            kept.append(loss)
        else:
            found.append(step)
    return found


def find_stragglers(step_s, wait_s, factor):
    own = []
    for steps, waits in zip(step_s, wait_s, strict=True):
        work = [step - wait for step, wait in zip(steps, waits, strict=True)]
        own.append(statistics.median(work))
    found = []
    for rank, seconds in enumerate(own):
        others = own[:rank] + own[rank + 1 :]
        if seconds > factor * statistics.median(others):
            found.append(rank)
    return found


def stopped_rank(earlier, later, waits):
    for rank, beat in enumerate(later):
        if beat == earlier[rank]:
            return rank
    return waits.index(False) if False in waits else -1


RIGHT = [goodput, agree_to_skip, spikes, find_stragglers, stopped_rank]


@pytest.mark.parametrize("answer", RIGHT)
def test_right_answers_pass(answer):
    result = EXERCISES[answer.__name__](answer)
    assert result, result.message
    assert result.cases >= 10
    assert len(RIGHT) == len(EXERCISES)


WRONG = [
    ("goodput", lambda steps, *others: steps, "returns its argument"),
    (
        "goodput",
        lambda n, every, step_s, save_s, down_s, faults: goodput(
            n, every, step_s, save_s, down_s, [f - f % every for f in faults]
        ),
        "are done twice",
    ),
    (
        "goodput",
        lambda n, every, step_s, save_s, down_s, faults: goodput(
            n, every, step_s, 0.0, down_s, faults
        ),
        "takes save_s",
    ),
    ("goodput", lambda *case: 1 - goodput(*case), "the share that is lost"),
    ("agree_to_skip", lambda norms: norms, "returns its argument"),
    (
        "agree_to_skip",
        lambda norms: [not math.isfinite(norm) for norm in norms],
        "each rank for itself",
    ),
    ("agree_to_skip", lambda norms: agree_to_skip(norms)[0], "one answer for each"),
    (
        "agree_to_skip",
        lambda norms: [sum(norms) != sum(norms)] * len(norms),
        "inf is no number",
    ),
    ("spikes", lambda losses, factor, window: losses, "returns its argument"),
    ("spikes", lambda losses, factor, window: [], "return a list of 1"),
    (
        "spikes",
        lambda losses, factor, window: spikes(losses, factor, 10**6),
        "look back on the last window",
    ),
    ("find_stragglers", lambda step, wait, factor: step, "returns its argument"),
    ("find_stragglers", lambda step, wait, factor: [], "takes as long on every rank"),
    (
        "find_stragglers",
        lambda step, wait, factor: find_stragglers(
            wait, [[0] * len(w) for w in wait], factor
        ),
        "who waits most is the fastest",
    ),
    ("stopped_rank", lambda earlier, later, waits: earlier, "returns its argument"),
    (
        "stopped_rank",
        lambda earlier, later, waits: waits.index(False) if False in waits else -1,
        "is stopped writes no heartbeat",
    ),
    (
        "stopped_rank",
        lambda earlier, later, waits: later.index(min(later)),
        "the fewest heartbeats",
    ),
]


class TestLaws(ExerciseLaws):
    exercises, wrong = EXERCISES, WRONG


def test_the_library_leaves_out_the_same_steps():
    for losses, factor, _ in faults_exercises._SPIKES.cases:
        rule = LossSpike(factor=factor, window=25)  # it starts after a fifth
        left_out = [i for i, x in enumerate(losses) if rule._judge(x, 0.0)]
        assert left_out == spikes(losses, factor, 25)
