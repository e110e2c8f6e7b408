"""The pipeline schedules of the papers, each as a few lines that make a value.

Contract: a function returns a `Schedule`, which is valid by construction, and its
docstring states two numbers that simulation confirms: the bubble, the idle share of all
ranks' time if F = I = W = 1 and B = 2 and communication is free, and the peak, how many
activations a rank keeps. One activation is a micro-batch on one stage, so with v stages
on each rank it has 1/v of the size.

Notation: P ranks, v stages on each rank, M micro-batches. Standard library only.

Chapter: parallelism/pipeline. References: Huang et al. 2019, arXiv:1811.06965 (GPipe);
Narayanan et al. 2021, arXiv:2006.09503 (1F1B) and arXiv:2104.04473 (interleaved); Qi et
al. 2024, arXiv:2401.10241 (zero bubble).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import count, islice, pairwise
from typing import Literal

from labpkg.planning.actions import Action, Kind, Schedule


def gpipe(num_stages: int, num_micro_batches: int) -> Schedule:
    """Return the GPipe schedule: all forwards, then all backwards.

    The bubble is (P - 1) / (M + P - 1), and every stage keeps all M micro-batches. With
    M = 1 it is the naive split, where one stage works at a time: (P - 1) / P.

    Args:
        num_stages: P >= 1, one stage on each rank.
        num_micro_batches: M >= 1.

    Returns:
        The schedule.

    Raises:
        ValueError: If either number is smaller than 1.

    Reference:
        Huang et al. 2019, GPipe: Efficient Training of Giant Neural Networks using
        Pipeline Parallelism, arXiv:1811.06965.
    """
    _require_positive(num_stages=num_stages, num_micro_batches=num_micro_batches)
    return Schedule(
        [
            Action(stage, kind, m)
            for kind in ("F", "B")
            for m in range(num_micro_batches)
        ]
        for stage in range(num_stages)
    )


def one_f_one_b(num_stages: int, num_micro_batches: int) -> Schedule:
    """Return the 1F1B schedule: a short warm-up, then one forward, one backward.

    The bubble equals GPipe's, (P - 1) / (M + P - 1), but stage s keeps only
    min(P - s, M) micro-batches alive instead of M.

    Args:
        num_stages: P >= 1, one stage on each rank.
        num_micro_batches: M >= 1.

    Returns:
        The schedule.

    Raises:
        ValueError: If either number is smaller than 1.

    Reference:
        Narayanan et al. 2021, Memory-Efficient Pipeline-Parallel DNN Training,
        arXiv:2006.09503.
    """
    _require_positive(num_stages=num_stages, num_micro_batches=num_micro_batches)
    stages = []
    for stage in range(num_stages):
        # Later stages start backward sooner.
        warmup = min(num_stages - 1 - stage, num_micro_batches)
        actions = [Action(stage, "F", m) for m in range(warmup)]
        for m in range(num_micro_batches):
            if warmup + m < num_micro_batches:
                actions.append(Action(stage, "F", warmup + m))
            actions.append(Action(stage, "B", m))
        stages.append(actions)
    return Schedule(stages)


def interleaved(
    num_ranks: int, num_micro_batches: int, *, num_virtual_stages: int
) -> Schedule:
    """Return the interleaved 1F1B schedule: v thin stages on each rank, dealt in turn.

    Rank r has the stages r, P + r, 2 P + r and so on. Micro-batches come in groups of
    at least P: a group passes the first stage of a rank, then its second, and so on.

    The bubble is (P - 1) / (v M + P - 1), because stages of 1/v of the layers fill and
    drain the pipeline v times faster. The price is v P - 1 transfers for each
    micro-batch instead of P - 1, and memory: rank r keeps
    min(v M, (v - 1) G + 2 (P - 1 - r) + 1) activations, where G is the size of the
    largest group, P if P divides M. On rank 0, from M = 2 P on, these are v P + P - 1
    of 1/v of the size: 1 + (P - 1) / (v P) times as much as 1F1B keeps there. With
    M < P, which is one group, each rank idles for another (v - 1) (P - M) forwards and
    backwards. With v = 1 this is 1F1B.

    Args:
        num_ranks: P >= 1.
        num_micro_batches: M >= 1, not necessarily a multiple of P.
        num_virtual_stages: v >= 1, stages on each rank.

    Returns:
        The schedule.

    Raises:
        ValueError: If a number is smaller than 1.

    Reference:
        Narayanan et al. 2021, Efficient Large-Scale Language Model Training on GPU
        Clusters Using Megatron-LM, arXiv:2104.04473, section 2.2 (for M a multiple of
        P).
    """
    P, M, v = num_ranks, num_micro_batches, num_virtual_stages
    _require_positive(num_ranks=P, num_micro_batches=M, num_virtual_stages=v)
    if v == 1:
        return one_f_one_b(P, M)
    groups = _groups(M, max(1, M // P))
    ranks = []
    for rank in range(P):
        stages = range(rank, v * P, P)
        forward = [(s, m) for group in groups for s in stages for m in group]
        backward = [(s, m) for group in groups for s in stages[::-1] for m in group]
        # The first group has passed all but the last stage of this rank, and then a
        # forward and its backward travel to the last rank and back.
        warmup = min((v - 1) * len(groups[0]) + 2 * (P - 1 - rank), v * M)
        actions = [Action(s, "F", m) for s, m in forward[:warmup]]
        later = iter(forward[warmup:])
        for s, m in backward:
            actions += [Action(stage, "F", n) for stage, n in islice(later, 1)]
            actions.append(Action(s, "B", m))
        ranks.append(actions)
    return Schedule(ranks)


def zero_bubble(
    num_ranks: int, num_micro_batches: int, *, variant: Literal["h1", "v"] = "h1"
) -> Schedule:
    """Return a zero-bubble schedule: backward in two halves, of which W fills gaps.

    Only I, the gradient of the input, is waited for; W can come at any later time.

    `h1` is 1F1B, one stage on each rank, where stage s does W s micro-batches after I.
    The bubble is (P - 1) / (3 M + P - 1), a third of the idle time of 1F1B. Every rank
    keeps min(P, M) activations, as many as rank 0 with 1F1B. With M < P each rank idles
    for another P - M forwards.

    `v` gives rank r the stages r and 2 P - 1 - r: a micro-batch goes down the ranks and
    up again, so its backward starts on the rank where its forward did. The bubble is
    (P - 1) / (6 M + P - 1), and it is none inside: if M >= 2 P - 1, rank r starts r
    steps late and then never waits, and it may start its next step early. Every rank
    keeps min(2 P, 2 M) activations, or fewer if M < 2 P - 1, each of half the size: as
    much as rank 0 with 1F1B. With 2 M < 3 P - 1 each rank idles for another
    3 P - 1 - 2 M forwards.

    All this holds where F, I and W take equal time. An activation is counted until its
    W, although I has freed a part of it; the gradients that wait with it for W are not
    counted.

    Args:
        num_ranks: P >= 1.
        num_micro_batches: M >= 1.
        variant: `h1` or `v`.

    Returns:
        The schedule.

    Raises:
        ValueError: If a number is smaller than 1, or for another variant.

    Reference:
        Qi et al. 2024, Zero Bubble Pipeline Parallelism, arXiv:2401.10241, sections 2
        (ZB-H1) and 6 (ZB-V).
    """
    P, M = num_ranks, num_micro_batches
    _require_positive(num_ranks=P, num_micro_batches=M)
    if variant not in ("h1", "v"):
        raise ValueError(
            f"variant={variant!r} is none of the zero-bubble schedules; choose 'h1' "
            "(one stage on each rank) or 'v' (two)"
        )
    make = _zero_bubble_h1 if variant == "h1" else _zero_bubble_v
    return Schedule(_numbered(make(P, M, rank), M) for rank in range(P))


def _zero_bubble_h1(P: int, M: int, rank: int) -> list[tuple[int, Kind]]:
    f, i, w = _halves(rank)
    return (
        [f] * (P - 1 - rank)
        + [f, i] * rank  # as many I come before the first W
        + [f, i, w] * (max(M, P) - P + 1)
        + [i, w] * (P - 1 - rank)
        + [w] * rank
    )


def _zero_bubble_v(P: int, M: int, rank: int) -> list[tuple[int, Kind]]:
    f, i, w = _halves(rank)  # on the way down the ranks
    f_up, i_up, w_up = _halves(2 * P - 1 - rank)
    return (
        [f] * (2 * (P - rank) - 1)  # until micro-batch 0 comes back up
        + [f_up, f] * rank
        + [f_up, i_up, w_up] * (P - rank)
        + [f, i, w, f_up, i_up, w_up] * (max(M, 2 * P - 1) - 2 * P + 1 + rank)
        + [i, w, f_up, i_up, w_up] * (P - 1 - rank)
        + [i, i_up] * rank  # others wait for these, so W comes later
        + [i, w] * (P - rank)
        + [w_up] * rank
        + [w] * rank
    )


def _halves(stage: int) -> tuple[tuple[int, Kind], tuple[int, Kind], tuple[int, Kind]]:
    return (stage, "F"), (stage, "I"), (stage, "W")


def _numbered(
    steps: Iterable[tuple[int, Kind]], num_micro_batches: int
) -> list[Action]:
    """Give each step of a stage the next micro-batch, and leave out those beyond M.

    A schedule stays valid without a micro-batch, since none waits for another.
    """
    numbers = defaultdict[tuple[int, Kind], Iterator[int]](count)
    actions = [Action(*step, next(numbers[step])) for step in steps]
    return [action for action in actions if action.micro_batch < num_micro_batches]


def _groups(num_micro_batches: int, num_groups: int) -> list[range]:
    """Cut the micro-batches into groups of almost equal sizes, larger ones first."""
    size, num_larger = divmod(num_micro_batches, num_groups)
    starts = [i * size + min(i, num_larger) for i in range(num_groups + 1)]
    return [range(start, end) for start, end in pairwise(starts)]


def _require_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}={number} must be an integer of at least 1")
