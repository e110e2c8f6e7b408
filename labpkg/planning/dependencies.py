"""What an action of a pipeline waits for: the rules, and the times that follow.

Contract: these functions take the ranks of a schedule, for each its actions in order,
as (stage, kind, micro-batch). A rank works in this order, on one action at a time, and
starts the next as soon as its input is there. F needs the activations of the stage
before. B and I need what F kept and the gradient from the stage after; W needs what I
kept. Nobody waits in order to send. So an order either runs, and always gives the same
times, or some ranks wait for each other in a cycle, which no timing can cure.

`labpkg.planning.actions` wraps this in a value. Standard library only.

Chapter: parallelism/pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

_Action = tuple[int, str, int]
_Ranks = Sequence[Sequence[_Action]]


def place_stages(ranks: _Ranks) -> dict[int, int]:
    """Return the rank of each stage.

    Args:
        ranks: For each rank its actions.

    Returns:
        The rank by number of the stage.

    Raises:
        ValueError: If a rank has no action, a stage is on two ranks, or a number
            between 0 and the last stage belongs to none.
    """
    rank_of: dict[int, int] = {}
    for rank, actions in enumerate(ranks):
        if not actions:
            raise ValueError(
                f"rank {rank} of {len(ranks)} has no action; give it a stage, or leave "
                "it out"
            )
        for action in actions:
            place = rank_of.setdefault(action[0], rank)
            if place != rank:
                raise ValueError(
                    f"stage {action[0]} is on rank {place}, but {action} is on rank "
                    f"{rank}; the weights of a stage live on one rank, so put all its "
                    "actions there"
                )
    if not rank_of:
        raise ValueError("a schedule of no ranks does nothing; give it at least one")
    absent = set(range(max(rank_of))) - set(rank_of)
    if absent:
        raise ValueError(
            f"no rank has stage {min(absent)}, but rank {rank_of[max(rank_of)]} has "
            f"stage {max(rank_of)}; number the stages from 0 without a gap"
        )
    return rank_of


def check_rank(rank: int, actions: Sequence[_Action], num_micro_batches: int) -> None:
    """Check that a rank does everything once, and forward before backward.

    Args:
        rank: Its number, for the message.
        actions: What it does, in order.
        num_micro_batches: M of the schedule.

    Raises:
        ValueError: If an action is missing, comes twice or before what it needs.
    """
    step_of: dict[_Action, int] = {}
    for step, action in enumerate(actions):
        if step_of.setdefault(action, step) != step:
            raise ValueError(
                f"{action} comes twice on rank {rank}, at steps {step_of[action]} and "
                f"{step}; each stage does each micro-batch once"
            )
    for stage in {action[0] for action in actions}:
        for m in range(num_micro_batches):
            steps = {kind: step_of.get((stage, kind, m)) for kind in "FBIW"}
            found = [kind for kind, step in steps.items() if step is not None]
            if found not in (["F", "B"], ["F", "I", "W"]):
                raise ValueError(
                    f"stage {stage} on rank {rank} does "
                    f"{' and '.join(found) or 'nothing'} for micro-batch {m}; it needs "
                    "F, and either B or both I and W, for each of the "
                    f"{num_micro_batches} micro-batches"
                )
            if found != sorted(found, key=lambda kind: step_of[stage, kind, m]):
                at = [f"{stage}{kind}{m} at step {steps[kind]}" for kind in found]
                raise ValueError(
                    f"rank {rank} has {', '.join(at)}; backward uses what F kept, and "
                    f"W what I kept: put them in the order {', '.join(found)}"
                )


def start_times(
    ranks: _Ranks,
    rank_of: Mapping[int, int],
    durations: Mapping[str, Sequence[float]],
    transfers: Sequence[float],
) -> list[list[float]]:
    """Return when each action starts, each as early as its rank and its input allow.

    Args:
        ranks: For each rank its actions, in order.
        rank_of: The rank of each stage.
        durations: For each kind of action, how long it takes on each stage.
        transfers: For each stage, how long its result travels to another rank.

    Returns:
        For each rank the start of each of its actions; the first starts at 0.

    Raises:
        ValueError: If ranks wait for each other for ever; the text says who waits for
            what.
    """
    M = 1 + max(action[2] for action in ranks[0])
    last = len(rank_of) - 1
    # When the input of F (even places) and of B or I (odd places) has arrived.
    arrived: list[float | None] = [None] * (2 * M * (last + 1))
    arrived[0 : 2 * M : 2] = arrived[2 * M * last + 1 :: 2] = [0] * M
    starts: list[list[float]] = [[] for _ in ranks]
    free_at: list[float] = [0] * len(ranks)
    missing = [-1] * len(ranks)  # the place in `arrived` for which a rank waits
    ready = list(range(len(ranks)))
    while ready:
        rank = ready.pop()
        actions, own, now = ranks[rank], starts[rank], free_at[rank]
        for step in range(len(own), len(actions)):
            stage, kind, micro_batch = actions[step]
            if kind == "W":
                own.append(now)
                now += durations[kind][stage]
                continue
            place = 2 * (stage * M + micro_batch) + (kind != "F")
            arrival = arrived[place]
            if arrival is None:
                missing[rank] = place
                break
            own.append(max(now, arrival))
            now = own[-1] + durations[kind][stage]
            after = stage + 1 if kind == "F" else stage - 1
            if 0 <= after <= last:
                goal = rank_of[after]
                place += 2 * M * (after - stage)
                arrived[place] = now if goal == rank else now + transfers[stage]
                if missing[goal] == place:
                    missing[goal] = -1
                    ready.append(goal)
        free_at[rank] = now
    if any(place >= 0 for place in missing):
        raise ValueError(_deadlock(ranks, rank_of, [len(own) for own in starts]))
    return starts


def _deadlock(
    ranks: _Ranks, rank_of: Mapping[int, int], num_done: Sequence[int]
) -> str:
    """Say which ranks wait, for what, and how to break the cycle."""
    waiting = {
        rank: actions[done:]
        for rank, (actions, done) in enumerate(zip(ranks, num_done, strict=True))
        if done < len(actions)
    }
    needs: dict[int, _Action] = {}
    lines = []
    for rank, (head, *_) in waiting.items():
        needs[rank] = needed = _input_of(head, ranks, rank_of)
        goal = rank_of[needed[0]]
        other = waiting[goal][0]
        there = "cannot start" if needed == other else f"does after {other}"
        lines.append(
            f"rank {rank} waits at step {num_done[rank]}, {head}, for the "
            f"{'activations' if needed[1] == 'F' else 'gradient'} of {needed}, which "
            f"rank {goal} {there}"
        )
    cycle = [min(needs)]
    while cycle.count(cycle[-1]) == 1:
        cycle.append(rank_of[needs[cycle[-1]][0]])
    cycle = cycle[cycle.index(cycle[-1]) :]
    # What some rank of the cycle puts too late. A forward can be moved alone, a
    # backward only with a forward that is not done yet.
    late = [n for n in map(needs.get, cycle) if n and n != waiting[rank_of[n[0]]][0]]
    stage, kind, micro_batch = min(late, key=lambda action: action[1] != "F")
    goal = rank_of[stage]
    moved = [
        f"{action}"
        for action in waiting[goal]
        if action[::2] == (stage, micro_batch) and action[1] in ("F", kind)
    ]
    return (
        f"this order never ends: {'; '.join(lines)}. "
        f"Cycle of ranks: {' -> '.join(map(str, cycle))}. "
        f"Put {' and '.join(moved)} before {waiting[goal][0]} on rank {goal}"
    )


def _input_of(action: _Action, ranks: _Ranks, rank_of: Mapping[int, int]) -> _Action:
    """Return the action on another stage whose result an F, B or I waits for."""
    stage, kind, micro_batch = action
    before = stage - 1 if kind == "F" else stage + 1
    kinds = "F" if kind == "F" else "BI"
    return next(
        other
        for other in ranks[rank_of[before]]
        if other[0] == before and other[2] == micro_batch and other[1] in kinds
    )


def peak_in_flight(actions: Iterable[_Action]) -> int:
    """Return how many activations a rank keeps at most.

    Args:
        actions: What it does, in order.

    Returns:
        The most micro-batches, counted for each stage, between F and B or W.
    """
    alive = peak = 0
    for _, kind, _ in actions:
        alive += {"F": 1, "I": 0}.get(kind, -1)
        peak = max(peak, alive)
    return peak
