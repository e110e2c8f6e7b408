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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal, NamedTuple, cast

from labpkg.planning import dependencies

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


@dataclass(frozen=True, init=False, repr=False)
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
    _rank_of: dict[int, int] = field(compare=False)
    _ticks: tuple[tuple[int, ...], ...] = field(compare=False)

    def __init__(self, ranks: Iterable[Iterable[Action]]) -> None:
        put = partial(object.__setattr__, self)  # others cannot assign
        put("ranks", tuple(tuple(actions) for actions in ranks))
        for rank, actions in enumerate(self.ranks):
            for action in actions:
                _check_action(action, rank)
        put("_rank_of", dependencies.place_stages(self.ranks))
        for rank, actions in enumerate(self.ranks):
            dependencies.check_rank(rank, actions, self.num_micro_batches)
        starts = self._start_times(dict.fromkeys("FBIW", 1))
        put("_ticks", tuple(tuple(int(start) for start in own) for own in starts))

    def _start_times(self, last: Mapping[str, float]) -> list[list[float]]:
        """Return the starts if each kind lasts so long, and transfers take no time."""
        S = self.num_stages
        durations = {kind: [time] * S for kind, time in last.items()}
        return dependencies.start_times(self.ranks, self._rank_of, durations, [0] * S)

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
        return 1 + max(a.micro_batch for actions in self.ranks for a in actions)

    @cached_property
    def splits_backward(self) -> bool:
        """Whether some backward comes in two halves, I and W."""
        return any(action.kind == "I" for actions in self.ranks for action in actions)

    @property
    def bubble_fraction(self) -> float:
        """The idle share of all ranks' time, if F = I = W = 1 and B = 2.

        1 - busy / (P makespan), without communication: what the order alone costs.
        """
        last = {"F": 1, "B": 2, "I": 1, "W": 1}
        starts = self._start_times(last)
        makespan = max(
            own[-1] + last[actions[-1].kind]
            for own, actions in zip(starts, self.ranks, strict=True)
        )
        busy = 3 * self.num_stages * self.num_micro_batches
        available = self.num_ranks * makespan
        return (available - busy) / available

    @property
    def peak_in_flight(self) -> list[int]:
        """The most activations that each rank keeps at once.

        One is a micro-batch on one stage, alive from its F to the end of its B or W.
        Gradients that I leaves for W are not counted.
        """
        return [dependencies.peak_in_flight(actions) for actions in self.ranks]

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


def _check_action(action: object, rank: int) -> None:
    if isinstance(action, Action) and action.kind in ("F", "B", "I", "W"):
        numbers = (action.stage, action.micro_batch)
        if all(isinstance(number, int) and number >= 0 for number in numbers):
            return
    raise ValueError(
        f"{action!r} on rank {rank} is not an action; use Action(stage, kind, "
        "micro_batch) with numbers from 0 and kind F, B, I or W, or Action.parse('2F5')"
    )
