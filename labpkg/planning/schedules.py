"""The pipeline schedules of the papers, each as a few lines that make a value.

Contract: a function returns a `Schedule`, which is valid by construction, and its
docstring states two numbers that simulation confirms: the bubble, the idle share of all
ranks' time if F = I = W = 1 and B = 2 and communication is free, and the peak, how many
activations a rank keeps. One activation is a micro-batch on one stage, so with v stages
on each rank it has 1/v of the size.

Notation: P ranks, v stages on each rank, M micro-batches. Standard library only.

Chapter: parallelism/pipeline. References: Huang et al. 2019, arXiv:1811.06965 (GPipe);
Narayanan et al. 2021, arXiv:2006.09503 (1F1B) and arXiv:2104.04473 (interleaved); Qi et
al. 2024, arXiv:2401.10241 and arXiv:2405.15362 (zero bubble).
"""

from __future__ import annotations

from labpkg.planning.actions import Action, Schedule


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


def _require_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1")
