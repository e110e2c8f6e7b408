"""A pipeline schedule is a value: for each rank, the sequence of its actions.

Contract: an action is one stage working on one micro-batch, forward (F), backward (B),
or backward in its two halves, the gradient of the input (I) and of the weights (W). A
rank works through its sequence and waits where an input has not come yet. A `Schedule`
is checked when it is made, so whoever holds one can run it: nothing is missing, nothing
comes twice, and no rank waits for ever. It is printed, parsed, compared, drawn,
simulated and executed, and it is written once.

Notation: P ranks, v stages on each rank, M micro-batches; stage and micro-batch numbers
count from 0 over all ranks. `labpkg.planning.schedules` makes the schedules of the
papers, `labpkg.planning.simulator` gives them durations. Standard library only.

Chapter: parallelism/pipeline. Reference: Qi et al. 2024, Zero Bubble Pipeline
Parallelism, arXiv:2401.10241 (the halves of backward).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, cast

Kind = Literal["F", "B", "I", "W"]

_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")
_RANK = re.compile(r"\s*rank\s+(\d+)\s*\|")
_IDLE = "."


class Action(NamedTuple):
    """One stage at work on one micro-batch, written `2F5`.

    Attributes:
        stage: Number of the stage, counted over all ranks.
        kind: `F` forward, `B` backward; or the halves of backward, `I` for the gradient
            of the input, which the stage before waits for, and `W` for those of the
            weights, which nobody waits for.
        micro_batch: Number of the micro-batch.
    """

    stage: int
    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Return the action that a text such as `2F5` names.

        Args:
            text: Stage, kind and micro-batch, without spaces.

        Returns:
            The action.

        Raises:
            ValueError: If the text has another form.
        """
        match = _ACTION.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is not an action; write stage, kind (F, B, I or W) and "
                "micro-batch, such as 2F5"
            )
        stage, kind, micro_batch = match.groups()
        return cls(int(stage), cast(Kind, kind), int(micro_batch))


class Message(NamedTuple):
    """A tensor on its way between two ranks: activations after F, else a gradient.

    Attributes:
        tick: When it is made, if each action takes one unit of time.
        producer: The action that makes it.
        consumer: The action that waits for it, on the next stage or the one before.
        src: Rank that sends.
        dst: Rank that receives.
    """

    tick: int
    producer: Action
    consumer: Action
    src: int
    dst: int


@dataclass(frozen=True, repr=False)
class Schedule:
    """Who does what, in which order: for each rank, the sequence of its actions.

    A schedule is immutable and hashable, and always valid: each stage lives on one
    rank; each micro-batch passes each stage once forward and once backward, as B or as
    I and then W; and no rank waits for ever. `print` shows a grid of ranks and steps.

    Args:
        ranks: For each rank its actions, in order. Stages and micro-batches are
            numbered from 0 without a gap.

    Raises:
        ValueError: If an action is missing, comes twice or too early, or if ranks wait
            for each other in a cycle; the text names the actions and their ranks.
    """

    ranks: tuple[tuple[Action, ...], ...]

    def __init__(self, ranks: Iterable[Iterable[Action]]) -> None:
        object.__setattr__(self, "ranks", tuple(tuple(actions) for actions in ranks))
        _check_actions(self.ranks)
        _check_stages(self._rank_of)
        for actions in self.ranks:
            _check_rank(actions, self.num_micro_batches)
        self.ticks()

    @property
    def num_ranks(self) -> int:
        """P, the ranks of the pipeline."""
        return len(self.ranks)

    @property
    def num_stages(self) -> int:
        """The stages of all ranks, v P where each rank has v."""
        return len(self._rank_of)

    @cached_property
    def num_micro_batches(self) -> int:
        """M, the micro-batches of one step."""
        return 1 + max(action.micro_batch for action in self.ranks[0])

    @cached_property
    def splits_backward(self) -> bool:
        """Whether some backward comes in two halves, I and W."""
        return any(action.kind == "I" for actions in self.ranks for action in actions)

    @property
    def bubble_fraction(self) -> float:
        """The idle share of all ranks' time, if F = I = W = 1 and B = 2.

        1 - busy / (P makespan), without communication: what the order alone costs.
        """
        durations = {"F": 1, "B": 2, "I": 1, "W": 1}
        starts = start_times(
            self,
            {kind: [d] * self.num_stages for kind, d in durations.items()},
            [0] * self.num_stages,
        )
        ends = [
            own[-1] + durations[actions[-1].kind]
            for own, actions in zip(starts, self.ranks, strict=True)
        ]
        busy = 3 * self.num_stages * self.num_micro_batches
        available = self.num_ranks * max(ends)
        return (available - busy) / available

    @property
    def peak_in_flight(self) -> list[int]:
        """The most activations that each rank keeps at once.

        One is a micro-batch on one stage, alive from its F to the end of its B or W.
        """
        return [peak_in_flight(actions) for actions in self.ranks]

    @cached_property
    def _rank_of(self) -> dict[int, int]:
        places: dict[int, int] = {}
        for rank, actions in enumerate(self.ranks):
            for action in actions:
                if places.setdefault(action.stage, rank) != rank:
                    raise ValueError(
                        f"stage {action.stage} has actions on rank "
                        f"{places[action.stage]} and, {action}, on rank {rank}; the "
                        "weights of a stage live on one rank, so put all of them there"
                    )
        return places

    def rank_of(self, stage: int) -> int:
        """Return the rank on which a stage lives.

        Args:
            stage: Number of the stage.

        Returns:
            The rank.

        Raises:
            ValueError: If there is no such stage.
        """
        if stage not in self._rank_of:
            raise ValueError(
                f"stage={stage} is none of this schedule's stages 0 to "
                f"{self.num_stages - 1}"
            )
        return self._rank_of[stage]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages that live on a rank, in ascending order.

        Args:
            rank: Number of the rank.

        Returns:
            The stages.

        Raises:
            ValueError: If there is no such rank.
        """
        self._check_rank_number(rank)
        return tuple(sorted(s for s, place in self._rank_of.items() if place == rank))

    def _check_rank_number(self, rank: int) -> None:
        if not 0 <= rank < self.num_ranks:
            raise ValueError(
                f"rank={rank} is none of this schedule's ranks 0 to "
                f"{self.num_ranks - 1}"
            )

    def ticks(self) -> tuple[tuple[int, ...], ...]:
        """Return when each action runs, if each takes one unit of time.

        A message made in tick t is used in tick t + 1 or later. So ranks that exchange
        the messages of each tick after its actions never wait for each other in a
        cycle.

        Returns:
            For each rank the tick of each of its actions: the columns of the grid.
        """
        return self._ticks

    @cached_property
    def _ticks(self) -> tuple[tuple[int, ...], ...]:
        each = [1] * self.num_stages
        starts = start_times(self, dict.fromkeys("FBIW", each), [0] * self.num_stages)
        return tuple(tuple(int(start) for start in own) for own in starts)

    def messages(self, rank: int) -> tuple[Message, ...]:
        """Return what a rank sends and receives, in an order that both ends share.

        The order is that of the ticks in which messages are made, over all ranks the
        same. Neighbouring stages on one rank need no message.

        Args:
            rank: Number of the rank.

        Returns:
            The messages whose `src` or `dst` is this rank.

        Raises:
            ValueError: If there is no such rank.
        """
        self._check_rank_number(rank)
        return self._messages[rank]

    @cached_property
    def _messages(self) -> tuple[tuple[Message, ...], ...]:
        backward = {
            (action.stage, action.micro_batch): action
            for actions in self.ranks
            for action in actions
            if action.kind in "BI"
        }
        of_rank: list[list[Message]] = [[] for _ in self.ranks]
        for src, (actions, ticks) in enumerate(
            zip(self.ranks, self.ticks(), strict=True)
        ):
            for action, tick in zip(actions, ticks, strict=True):
                stage, kind, micro_batch = action
                after = stage + 1 if kind == "F" else stage - 1
                dst = self._rank_of.get(after, src)
                if kind == "W" or dst == src:
                    continue
                consumer = (
                    Action(after, "F", micro_batch)
                    if kind == "F"
                    else backward[after, micro_batch]
                )
                message = Message(tick, action, consumer, src, dst)
                of_rank[src].append(message)
                of_rank[dst].append(message)
        return tuple(tuple(sorted(messages)) for messages in of_rank)

    def __str__(self) -> str:
        width = max(len(str(action)) for actions in self.ranks for action in actions)
        number_width = len(str(self.num_ranks - 1))
        num_ticks = 1 + max(ticks[-1] for ticks in self.ticks())
        lines = []
        for rank, (actions, ticks) in enumerate(
            zip(self.ranks, self.ticks(), strict=True)
        ):
            cells = [_IDLE] * num_ticks
            for action, tick in zip(actions, ticks, strict=True):
                cells[tick] = str(action)
            row = " ".join(cell.ljust(width) for cell in cells)
            lines.append(f"rank {rank:>{number_width}} | {row}".rstrip())
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"<Schedule of {self.num_ranks} ranks, {self.num_stages} stages, "
            f"{self.num_micro_batches} micro-batches>"
        )

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Return the schedule that a grid shows; `parse(str(s)) == s`.

        Args:
            text: One line for each rank: actions, and dots for idle steps, which carry
                no meaning. `rank 0 |` may stand before them.

        Returns:
            The schedule.

        Raises:
            ValueError: If a word is no action, a line belongs to another rank, or the
                schedule is not valid.
        """
        ranks = []
        for line in filter(str.strip, text.splitlines()):
            label = _RANK.match(line)
            if label and int(label[1]) != len(ranks):
                raise ValueError(
                    f"a line says rank {label[1]}, but is that of rank {len(ranks)}; "
                    "write one line for each rank, in order"
                )
            words = (line[label.end() :] if label else line).split()
            ranks.append([Action.parse(word) for word in words if word != _IDLE])
        return cls(ranks)


def parse(text: str) -> Schedule:
    """Return the schedule that a grid shows, as `Schedule.parse` does.

    Args:
        text: One line for each rank: actions, and dots for idle steps.

    Returns:
        The schedule.

    Raises:
        ValueError: If a word is no action or the schedule is not valid.
    """
    return Schedule.parse(text)


def peak_in_flight(actions: Iterable[Action]) -> int:
    """Return how many activations one rank keeps at most.

    Args:
        actions: What the rank does, in order.

    Returns:
        The most micro-batches, counted for each stage, between F and B or W.
    """
    alive = peak = 0
    for action in actions:
        alive += {"F": 1, "I": 0}.get(action.kind, -1)
        peak = max(peak, alive)
    return peak


def start_times(
    schedule: Schedule,
    durations: Mapping[str, Sequence[float]],
    transfers: Sequence[float],
) -> list[list[float]]:
    """Return when each action starts, each as early as its rank and its input allow.

    Args:
        schedule: What the ranks do.
        durations: For each kind of action, how long it takes on each stage.
        transfers: For each stage, how long its result travels to another rank.

    Returns:
        For each rank the start of each of its actions; the first starts at 0.

    Raises:
        ValueError: If ranks wait for each other for ever.
    """
    ranks, rank_of, M = schedule.ranks, schedule._rank_of, schedule.num_micro_batches
    last = schedule.num_stages - 1
    # When the input of F (even places) and of backward (odd places) has arrived.
    arrived: list[float | None] = [None] * (2 * M * (last + 1))
    arrived[0 : 2 * M : 2] = arrived[2 * M * last + 1 :: 2] = [0] * M
    starts: list[list[float]] = [[] for _ in ranks]
    free_at: list[float] = [0] * len(ranks)
    missing = [-1] * len(ranks)  # the place in `arrived` that a rank waits for
    ready = list(range(len(ranks)))
    while ready:
        rank = ready.pop()
        actions, own, now = ranks[rank], starts[rank], free_at[rank]
        while len(own) < len(actions):
            stage, kind, micro_batch = actions[len(own)]
            place = 2 * (stage * M + micro_batch) + (kind != "F")
            if kind != "W":
                there = arrived[place]
                if there is None:
                    missing[rank] = place
                    break
                now = max(now, there)
            own.append(now)
            now += durations[kind][stage]
            after = stage + 1 if kind == "F" else stage - 1
            if kind != "W" and 0 <= after <= last:
                goal = rank_of[after]
                place += 2 * M * (after - stage)
                arrived[place] = now if goal == rank else now + transfers[stage]
                if missing[goal] == place:
                    missing[goal] = -1
                    ready.append(goal)
        free_at[rank] = now
    if any(place >= 0 for place in missing):
        raise ValueError(_deadlock(schedule, [len(own) for own in starts]))
    return starts


def _deadlock(schedule: Schedule, num_done: Sequence[int]) -> str:
    """Say who waits for whom, and which ranks form a cycle."""
    waits: dict[int, tuple[Action, str, int]] = {}
    for rank, (actions, done) in enumerate(zip(schedule.ranks, num_done, strict=True)):
        if done == len(actions):
            continue
        head = actions[done]
        before = head.stage - 1 if head.kind == "F" else head.stage + 1
        goal = schedule.rank_of(before)
        needed = next(
            action
            for action in schedule.ranks[goal]
            if (action.stage, action.micro_batch) == (before, head.micro_batch)
            and (action.kind == "F" if head.kind == "F" else action.kind in "BI")
        )
        blocker = schedule.ranks[goal][num_done[goal]]
        what = "activations" if head.kind == "F" else "gradient"
        waits[rank] = (
            needed,
            f"rank {rank} waits at step {done} ({head}) for the {what} of {needed} "
            f"from rank {goal}, which stands before {blocker}",
            goal,
        )
    cycle = [next(iter(waits))]
    while cycle.count(cycle[-1]) == 1:
        cycle.append(waits[cycle[-1]][2])
    cycle = cycle[cycle.index(cycle[-1]) :]
    needed, _, goal = waits[cycle[0]]
    blocker = schedule.ranks[goal][num_done[goal]]
    return (
        "this schedule never ends: "
        + "; ".join(text for _, text, _ in waits.values())
        + f". Cycle of ranks: {' -> '.join(map(str, cycle))}. Move {needed} before "
        f"{blocker} on rank {goal}"
    )


def _check_actions(ranks: tuple[tuple[Action, ...], ...]) -> None:
    if not ranks or not all(ranks):
        empty = ranks.index(()) if ranks else 0
        raise ValueError(
            f"rank {empty} of {len(ranks)} has no action; give each rank at least one "
            "stage"
        )
    for rank, actions in enumerate(ranks):
        for action in actions:
            if (
                not isinstance(action, Action)
                or action.kind not in ("F", "B", "I", "W")
                or not (isinstance(action.stage, int) and action.stage >= 0)
                or not (isinstance(action.micro_batch, int) and action.micro_batch >= 0)
            ):
                raise ValueError(
                    f"{action!r} on rank {rank} is not an action; use "
                    "Action(stage, kind, micro_batch) with numbers from 0 and kind F, "
                    "B, I or W, or Action.parse('2F5')"
                )


def _check_stages(rank_of: Mapping[int, int]) -> None:
    absent = set(range(max(rank_of) + 1)) - set(rank_of)
    if absent:
        raise ValueError(
            f"no rank has stage {min(absent)}, but rank {rank_of[max(rank_of)]} has "
            f"stage {max(rank_of)}; number the stages from 0 without a gap"
        )


def _check_rank(actions: tuple[Action, ...], num_micro_batches: int) -> None:
    """Check that one rank does everything once, and forward before backward."""
    step_of: dict[tuple[int, str, int], int] = {}
    for step, action in enumerate(actions):
        if step_of.setdefault(action, step) != step:
            raise ValueError(
                f"{action} comes twice on its rank, at steps {step_of[action]} and "
                f"{step}; each stage sees each micro-batch once"
            )
    numbers = range(max(num_micro_batches, 1 + max(a.micro_batch for a in actions)))
    for stage in {action.stage for action in actions}:
        for m in numbers:
            steps = {k: step_of.get((stage, k, m)) for k in "FBIW"}
            found = "".join(kind for kind, step in steps.items() if step is not None)
            if found not in ("FB", "FIW"):
                raise ValueError(
                    f"stage {stage} does {' and '.join(found) or 'nothing'} for "
                    f"micro-batch {m}, but each stage needs one F and either one B or "
                    f"one I and one W for each of the {len(numbers)} micro-batches"
                )
            order = [step_of[stage, kind, m] for kind in found]
            if order != sorted(order):
                names = [f"{stage}{kind}{m} at step {steps[kind]}" for kind in found]
                raise ValueError(
                    f"rank order {', '.join(names)} is impossible: backward uses what "
                    "forward kept, and W what I kept; put them in the order "
                    + " ".join(found)
                )
