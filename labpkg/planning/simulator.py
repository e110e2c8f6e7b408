"""What a pipeline schedule takes in seconds, before it runs.

Contract: each rank does its actions in order, one at a time, and starts the next as
soon as its input is there. A message leaves when its action ends and arrives
`transfer_s` later; it travels while both ranks compute, and links never queue. A
measured step has the same form, a `Timeline`, so that the two can be laid over each
other. Memory is counted, not timed: activations between F and B or W.

Standard library only. Chapter: parallelism/pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from labpkg.planning import dependencies
from labpkg.planning.actions import Action, Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCost:
    """How long a stage works on one micro-batch.

    The defaults are those of a matrix product, whose gradients of input and weight cost
    as much as forward each. A stage of 1/v of the layers costs 1/v of it.

    Args:
        forward_s: Seconds of F.
        backward_s: Seconds of B.
        input_s: Seconds of I, the gradient of the input.
        weight_s: Seconds of W, the gradients of the weights.
        transfer_s: Seconds from the end of F, B or I until another rank has the result.

    Raises:
        ValueError: If a time is negative or not finite.
    """

    forward_s: float = 1.0
    backward_s: float = 2.0
    input_s: float = 1.0
    weight_s: float = 1.0
    transfer_s: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            time = getattr(self, name)
            if not (math.isfinite(time) and time >= 0):
                raise ValueError(
                    f"{name}={time} must be finite and at least 0; give seconds"
                )


class Span(NamedTuple):
    """When one action ran.

    Attributes:
        action: What ran.
        start_s: When it started, in seconds since the start of the step.
        end_s: When it ended.
    """

    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """When each rank did what, simulated or measured.

    Args:
        spans: For each rank its actions with their times, in order.

    Raises:
        ValueError: If a rank has no span, or one starts before the one before it ends.
    """

    spans: tuple[tuple[Span, ...], ...]

    def __init__(self, spans: Iterable[Iterable[Span]]) -> None:
        object.__setattr__(self, "spans", tuple(tuple(own) for own in spans))
        if not self.spans or not all(self.spans):
            raise ValueError("a timeline needs at least one span on each rank")
        for rank, own in enumerate(self.spans):
            free_at = -math.inf
            for action, start, end in own:
                if not free_at <= start <= end:
                    raise ValueError(
                        f"{action} on rank {rank} lasts from {start} to {end}, and the "
                        f"action before it until {free_at}; a rank does one action at "
                        "a time, in order"
                    )
                free_at = end

    @property
    def makespan_s(self) -> float:
        """Seconds from the first start to the last end, over all ranks."""
        first = min(own[0].start_s for own in self.spans)
        return max(own[-1].end_s for own in self.spans) - first

    @property
    def bubble_fraction(self) -> float:
        """The idle share of all ranks' time: 1 - busy / (P makespan)."""
        available = len(self.spans) * self.makespan_s
        busy = math.fsum(end - start for own in self.spans for _, start, end in own)
        return 1 - busy / available if available else 0.0

    @property
    def peak_in_flight(self) -> list[int]:
        """The most activations that each rank kept, as `Schedule.peak_in_flight`."""
        return [
            dependencies.peak_in_flight(span.action for span in own)
            for own in self.spans
        ]


def simulate(
    schedule: Schedule, cost: StageCost | Sequence[StageCost] = StageCost()
) -> Timeline:
    """Return when each action of a schedule runs.

    Args:
        schedule: Who does what, in which order.
        cost: Times of a stage: one for all stages, or one for each.

    Returns:
        The timeline; the first action starts at 0. It takes about a microsecond for
        each action.

    Raises:
        ValueError: If the costs are those of another number of stages.
    """
    S = schedule.num_stages
    costs = [cost] * S if isinstance(cost, StageCost) else list(cost)
    if len(costs) != S:
        raise ValueError(
            f"{len(costs)} costs for the {S} stages of {schedule!r}; give one "
            "StageCost for each stage, or one for all"
        )
    durations = {
        "F": [cost.forward_s for cost in costs],
        "B": [cost.backward_s for cost in costs],
        "I": [cost.input_s for cost in costs],
        "W": [cost.weight_s for cost in costs],
    }
    rank_of = {stage: schedule.rank_of(stage) for stage in range(S)}
    starts = dependencies.start_times(
        schedule.ranks, rank_of, durations, [cost.transfer_s for cost in costs]
    )
    return Timeline(
        [
            Span(action, start, start + durations[action.kind][action.stage])
            for action, start in zip(actions, own, strict=True)
        ]
        for actions, own in zip(schedule.ranks, starts, strict=True)
    )
