"""Checkers of the exercises of the chapter parallelism/pipeline: schedules.

The exercises on a whole step are in `pipeline_step_exercises`. Notation: P stages, one
on each rank, M micro-batches, all numbered from 0; an action of a stage is a text such
as `F3`, forward of micro-batch 3; B is backward, I and W are its two halves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

from labpkg.check.result import CheckResult, Exercise


def fewest_micro_batches(fn: Callable[..., Any]) -> CheckResult:
    """Check `fewest_micro_batches(num_stages, max_bubble)`: the least M of 1F1B.

    The bubble is the idle share of all ranks' time, 0 < max_bubble < 1, and it may be
    equal to `max_bubble`.

    Args:
        fn: your function; it returns an int, at least 1.

    Returns:
        A `CheckResult`, false with a hint when a case fails.

    Reference:
        Huang et al. 2019, arXiv:1811.06965.
    """
    return _FEWEST_MICRO_BATCHES.check(fn)


def peak_in_flight(fn: Callable[..., Any]) -> CheckResult:
    """Check `peak_in_flight(actions)`: how many activations a stage keeps at most.

    `actions` is a list of texts such as `F3`. A micro-batch is in flight from its F to
    the end of its backward: of B, or of W, which comes after I.

    Args:
        fn: your function; it returns an int.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _PEAK_IN_FLIGHT.check(fn)


def one_f_one_b_order(fn: Callable[..., Any]) -> CheckResult:
    """Check `one_f_one_b_order(stage, num_stages, num_micro_batches)`: 1F1B by hand.

    Args:
        fn: your function; it returns the actions of one stage in order, a list of texts
            such as `F3`.

    Returns:
        A `CheckResult`, false with a hint when a case fails.

    Reference:
        Narayanan et al. 2021, arXiv:2006.09503.
    """
    return _ONE_F_ONE_B_ORDER.check(fn)


def best_cut(fn: Callable[..., Any]) -> CheckResult:
    """Check `best_cut(costs, num_stages)`: how slow the slowest stage must be.

    `costs[i]` is the time of layer i, a whole number. A stage is a run of neighbouring
    layers, at least one; each layer belongs to one stage.

    Args:
        fn: your function; it returns the time of the slowest stage in the cut in which
            that is least.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _BEST_CUT.check(fn)


def _fewest(num_stages: int, max_bubble: float) -> int:
    M = 1
    while num_stages - 1 > max_bubble * (M + num_stages - 1):
        M += 1
    return M


def _strict(num_stages: int, max_bubble: float) -> int:
    M = 1
    while num_stages - 1 >= max_bubble * (M + num_stages - 1):
        M += 1
    return M


def _rounded_down(num_stages: int, max_bubble: float) -> int:
    return max(1, int((num_stages - 1) * (1 / max_bubble - 1)))


def _beside_work(num_stages: int, max_bubble: float) -> int:
    """Compare idle time with working time instead of with all time."""
    M = 1
    while num_stages - 1 > max_bubble * M:
        M += 1
    return M


def _maybe_none(num_stages: int, max_bubble: float) -> int:
    return _fewest(num_stages, max_bubble) if num_stages > 1 else 0


def _busy(num_stages: int, max_bubble: float) -> int:
    return _fewest(num_stages, 1 - max_bubble)


_FEWEST_MICRO_BATCHES = Exercise(
    name="fewest_micro_batches",
    arguments=("num_stages", "max_bubble"),
    reference=_fewest,
    cases=[
        (5, 0.25),
        (4, 0.5),
        (3, 0.3),
        (5, 0.9),
        (2, 0.5),
        (1, 0.25),
        (8, 0.125),
        (6, 0.0625),
        (9, 0.125),
    ],
    mistakes={
        "micro-batches are whole: round up": lambda P, bubble: max(
            1, (P - 1) / bubble - P + 1
        ),
        "this bubble is still too large: round up": _rounded_down,
        "idle time is counted as a share of all time, not of the working time": (
            _beside_work
        ),
        "the pipeline fills in fewer steps than it has stages: the first stage starts "
        "at once": lambda P, bubble: _fewest(P + 1, bubble),
        "the bubble may be equal to max_bubble": _strict,
        "max_bubble is the share of idle time, not of work": _busy,
        "a step needs at least one micro-batch, also with one stage": _maybe_none,
    },
    hint="print the bubble of your M and of M - 1: the first must be small enough, "
    "the second too large",
)


def _peak(
    actions: Sequence[str], frees: str = "BW", *, after_backward: bool = False
) -> int:
    alive, seen = 0, [0]
    for action in actions:
        alive += (action[0] == "F") - (action[0] in frees)
        if not after_backward or action[0] in frees:
            seen.append(alive)
    return max(seen)


_LISTS = (
    "F0 F1 F2 B0 F3 B1 B2 F4 B3 B4",
    "F0 B0",
    "F0 F1 F2 F3 B0 B1 B2 B3",
    "F0 B0 F1 I1 W1 F2 I2 W2 F3 B3",
    "F0 F1 I0 W0 F2 F3 I1 W1 I2 W2 I3 W3",
    "F0 F1 I0 F2 I1 F3 I2 W0 I3 W1 W2 W3",
    "F0 F1 F2 B2 B1 B0",
    " ".join(f"F{m} B{m}" for m in range(12)),
    "F0 I0 W0 F1 F2 B2 I1 F3 W1 B3",
)

_PEAK_IN_FLIGHT = Exercise(
    name="peak_in_flight",
    arguments=("actions",),
    reference=_peak,
    cases=[(text.split(),) for text in _LISTS],
    mistakes={
        "this counts forwards; backward gives the memory back": lambda actions: sum(
            action[0] == "F" for action in actions
        ),
        "this is what is left in the end; the peak comes before": lambda actions: (
            _peak(actions) and 0
        ),
        "W needs the activations too, so I does not give them back": lambda actions: (
            _peak(actions, "BI")
        ),
        "I and W are two halves of one backward; only the second gives memory back": (
            lambda actions: _peak(actions, "BIW")
        ),
        "look at the count after each forward, where it is largest": lambda actions: (
            _peak(actions, after_backward=True)
        ),
        "where backward comes in halves, W ends it": lambda actions: _peak(
            actions, "B"
        ),
    },
    hint="write beside each action which micro-batches have begun and not ended after "
    "it; where are they most?",
)


def _order(stage: int, num_stages: int, num_micro_batches: int) -> list[str]:
    return _warmed_up(min(num_stages - stage, num_micro_batches), num_micro_batches)


def _warmed_up(ahead: int, num_micro_batches: int) -> list[str]:
    order = [f"F{m}" for m in range(ahead)]
    for m in range(num_micro_batches):
        order.append(f"B{m}")
        if ahead + m < num_micro_batches:
            order.append(f"F{ahead + m}")
    return order


def _gpipe(stage: int, num_stages: int, num_micro_batches: int) -> list[str]:
    return _warmed_up(num_micro_batches, num_micro_batches)


def _by_turns(stage: int, num_stages: int, num_micro_batches: int) -> list[str]:
    return _warmed_up(1, num_micro_batches)


def _with_stage(stage: int, num_stages: int, num_micro_batches: int) -> list[str]:
    order = _order(stage, num_stages, num_micro_batches)
    return [f"{stage}{action}" for action in order]


def _from_one(stage: int, num_stages: int, num_micro_batches: int) -> list[str]:
    order = _order(stage, num_stages, num_micro_batches)
    return [action[0] + str(int(action[1:]) + 1) for action in order]


def _from_wrong_end(stage: int, num_stages: int, num_micro_batches: int) -> list[str]:
    return _warmed_up(min(stage + 1, num_micro_batches), num_micro_batches)


def _all_stages_warm(stage: int, num_stages: int, num_micro_batches: int) -> list[str]:
    return _warmed_up(min(num_stages, num_micro_batches), num_micro_batches)


def _one_short(stage: int, num_stages: int, num_micro_batches: int) -> list[str]:
    return _warmed_up(min(num_stages - stage - 1, num_micro_batches), num_micro_batches)


def _not_capped(stage: int, num_stages: int, num_micro_batches: int) -> list[str]:
    return _warmed_up(num_stages - stage, num_micro_batches)


def _not_drained(stage: int, num_stages: int, num_micro_batches: int) -> list[str]:
    order = _order(stage, num_stages, num_micro_batches)
    last = order.index(f"F{num_micro_batches - 1}")
    return order[: last + 2]


def _newest_first(stage: int, num_stages: int, num_micro_batches: int) -> list[str]:
    order, alive = [], []
    for action in _order(stage, num_stages, num_micro_batches):
        if action[0] == "F":
            alive.append(action[1:])
            order.append(action)
        else:
            order.append("B" + alive.pop())
    return order


_ONE_F_ONE_B_ORDER = Exercise(
    name="one_f_one_b_order",
    arguments=("stage", "num_stages", "num_micro_batches"),
    reference=_order,
    cases=[
        (1, 5, 8),  # all mistakes differ here, so that the hint is the right one
        (0, 3, 5),
        (1, 4, 8),
        (2, 3, 5),
        (1, 3, 5),
        (0, 4, 8),
        (2, 4, 8),
        (0, 4, 2),
        (1, 4, 2),
        (0, 1, 3),
        (0, 8, 12),
        (7, 8, 12),
    ],
    mistakes={
        "this is GPipe: backward should begin before the last forward": _gpipe,
        "this waits for each gradient before the next forward: the stages after this "
        "one have nothing to do meanwhile": _by_turns,
        "the first stage has the longest way to the loss, not the last": (
            _from_wrong_end
        ),
        "later stages get their first gradient sooner: they need a shorter warm-up": (
            _all_stages_warm
        ),
        "the warm-up is one too short: the first gradient comes only after the last "
        "stage has had its forward": _one_short,
        "with few micro-batches the warm-up ends with them": _not_capped,
        "some micro-batches never come back: end with the backwards that are left": (
            _not_drained
        ),
        "the oldest micro-batch comes back first": _newest_first,
        "leave the stage away: the actions of one stage are such as F3": _with_stage,
        "micro-batches are numbered from 0": _from_one,
    },
    hint="write down what the last stage does, then the one before it; compare with "
    "the grid that printing `lab.one_f_one_b` shows",
)


def _least_slowest(costs: Sequence[int], num_stages: int) -> int:
    """Return the least bound under which filling stages greedily needs few enough."""
    bound = max(costs)
    while _num_filled(costs, bound) > num_stages:
        bound += 1
    return bound


def _num_filled(costs: Sequence[int], bound: int) -> int:
    filled, load = 1, 0
    for cost in costs:
        if load + cost > bound:
            filled, load = filled + 1, 0
        load += cost
    return filled


def _slowest(costs: Sequence[int], bounds: Sequence[int]) -> int:
    return max(sum(costs[a:b]) for a, b in pairwise(bounds))


def _equal_counts(costs: Sequence[int], num_stages: int) -> int:
    short, num_longer = divmod(len(costs), num_stages)
    lengths = [short + (stage < num_longer) for stage in range(num_stages)]
    return _slowest(costs, [0, *accumulate(lengths)])


def _any_layers(costs: Sequence[int], num_stages: int) -> int:
    """Give the longest layer that is left to the stage with the least work."""
    loads = [0] * num_stages
    for cost in sorted(costs, reverse=True):
        loads[loads.index(min(loads))] += cost
    return max(loads)


def _filled_to_the_mean(costs: Sequence[int], num_stages: int) -> int:
    bounds, load = [0], 0
    for i, cost in enumerate(costs):
        if load + cost > sum(costs) / num_stages and i > bounds[-1]:
            if len(bounds) == num_stages:
                break
            bounds.append(i)
            load = 0
        load += cost
    return _slowest(costs, [*bounds, len(costs)])


_BEST_CUT = Exercise(
    name="best_cut",
    arguments=("costs", "num_stages"),
    reference=_least_slowest,
    cases=[
        ([5, 6, 2, 4, 5, 1], 3),  # all mistakes differ here
        ([2, 2, 2, 2], 2),
        ([7, 1, 1, 1], 3),
        ([3, 1, 4, 1, 5, 9, 2, 6], 1),
        ([3, 1, 4, 1, 5, 9, 2, 6], 8),
        ([3, 1, 4, 1, 5, 9, 2, 6], 4),
        ([1, 9, 1, 9, 1, 9], 3),
        ([98, 2, 1, 1, 1, 1, 1, 2], 2),
        ([6, 4, 4, 4, 4, 4, 4, 9], 4),
    ],
    mistakes={
        "this is the time of all layers together": lambda costs, P: sum(costs),
        "this is the mean; a layer cannot be cut, and the slowest stage counts": (
            lambda costs, P: sum(costs) / P
        ),
        "this is the mean, rounded up; where the cuts are the slowest stage may need "
        "more": lambda costs, P: -(-sum(costs) // P),
        "layers take different times: equal numbers of them are no equal times": (
            _equal_counts
        ),
        "a stage is a run of neighbours; these layers do not lie together": _any_layers,
        "filling each stage up to the mean leaves too much for the last one": (
            _filled_to_the_mean
        ),
        "a stage may hold several layers, and then takes longer than each": (
            lambda costs, P: max(costs)
        ),
    },
    hint="write down all cuts of five layers into two stages, and how slow the slower "
    "one is: the least of these is asked for",
)
