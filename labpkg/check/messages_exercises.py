"""Checker of the last exercise of the chapter processes/communication_cost.

Ranks run programs of three kinds of actions: `("work", seconds)`, `("send", rank,
num_bytes)` and `("recv", rank)`. A message is a rendezvous: it starts when both ends
are there, and holds both for alpha + S beta seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from labpkg.check.result import CheckResult, Exercise

Action = tuple[Any, ...]
Programs = Sequence[Sequence[Action]]


def finish_times(fn: Callable[..., Any]) -> CheckResult:
    """Check `finish_times(programs, alpha_s, beta_s_per_byte)`: who ends when.

    `programs[r]` is the list of actions of rank r.

    Args:
        fn: your function; it returns one time in seconds for each rank, infinity for a
            rank that waits for ever.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _FINISH_TIMES.check(fn)


def _simulate(
    programs: Programs, alpha: float, beta: float, *, passes: float = math.inf
) -> list[float]:
    """Let ranks go on as long as anybody can."""
    clocks = [0.0] * len(programs)
    rest = [list(program) for program in programs]
    moved = True
    while moved and passes > 0:
        moved, passes = False, passes - 1
        for rank in range(len(programs)):
            while rest[rank] and _advance(rank, rest, clocks, alpha, beta):
                moved = True
    return [math.inf if rest[r] else clocks[r] for r in range(len(programs))]


def _advance(
    rank: int, rest: list[list[Action]], clocks: list[float], alpha: float, beta: float
) -> bool:
    kind, first, *more = rest[rank][0]
    if kind == "work":
        clocks[rank] += first
        rest[rank].pop(0)
        return True
    wanted = ("recv", rank) if kind == "send" else ("send", rank)
    if not rest[first] or rest[first][0][:2] != wanted:
        return False
    num_bytes = more[0] if kind == "send" else rest[first][0][2]
    end = max(clocks[rank], clocks[first]) + alpha + num_bytes * beta
    for one in (rank, first):
        clocks[one] = end
        rest[one].pop(0)
    return True


def _sizes(programs: Programs) -> dict[tuple[int, int], list[float]]:
    """Return the sizes of the messages from one rank to another, in order."""
    sizes: dict[tuple[int, int], list[float]] = {}
    for rank, program in enumerate(programs):
        for kind, *rest in program:
            if kind == "send":
                sizes.setdefault((rank, rest[0]), []).append(rest[1])
    return sizes


def _alone(programs: Programs, alpha: float, beta: float) -> list[float]:
    """Let every rank go through its program without waiting for the others."""
    sizes, totals = _sizes(programs), [0.0] * len(programs)
    for rank, program in enumerate(programs):
        for kind, *rest in program:
            if kind == "work":
                totals[rank] += rest[0]
            elif kind == "send":
                totals[rank] += alpha + rest[1] * beta
            else:
                size = sizes[rest[0], rank].pop(0)
                totals[rank] += alpha + size * beta
    return totals


def _posted(
    programs: Programs, alpha: float, beta: float, *, sender_pays: bool
) -> list[float]:
    """Let a sender go on at once, as with a letter box."""
    clocks, places = [0.0] * len(programs), [0] * len(programs)
    mail: dict[tuple[int, int], list[float]] = {}
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while places[rank] < len(program):
                kind, first, *more = program[places[rank]]
                if kind == "work":
                    clocks[rank] += first
                elif kind == "send":
                    arrival = clocks[rank] + alpha + more[0] * beta
                    clocks[rank] = arrival if sender_pays else clocks[rank]
                    mail.setdefault((rank, first), []).append(arrival)
                elif mail.get((first, rank)):
                    arrival = mail[first, rank].pop(0)
                    clocks[rank] = max(clocks[rank], arrival)
                else:
                    break
                places[rank] += 1
                moved = True
    stuck = [places[r] < len(program) for r, program in enumerate(programs)]
    return [math.inf if s else t for s, t in zip(stuck, clocks, strict=True)]


_LINK = (1e-3, 1e-8)
_CHAIN = [
    [("send", 1, 1e5)],
    [("recv", 0), ("send", 2, 1e5)],
    [("recv", 1), ("send", 3, 1e5)],
    [("recv", 2)],
]
_SWAP = [
    [("work", 0.5), ("send", 1, 1e6), ("recv", 1)],
    [("recv", 0), ("work", 0.25), ("send", 0, 2e6)],
]
_BOTH_SEND = [[("send", 1, 10), ("recv", 1)], [("send", 0, 10), ("recv", 0)]]
_LATE = [[("send", 1, 1e5), ("work", 1.0)], [("work", 2.0), ("recv", 0)]]
_TREE = [
    [("recv", 1), ("recv", 2), ("send", 2, 1e6), ("send", 1, 1e6)],
    [("send", 0, 1e6), ("recv", 0)],
    [("recv", 3), ("send", 0, 1e6), ("recv", 0), ("send", 3, 1e6)],
    [("send", 2, 1e6), ("recv", 2)],
]
_RING = [[("send", (r + 1) % 3, 1e3), ("recv", (r - 1) % 3)] for r in range(3)]
_ODD_FIRST = [
    [("recv", 2), ("send", 1, 1e6)],
    [("work", 0.1), ("recv", 0), ("send", 2, 1e6)],
    [("send", 0, 1e6), ("recv", 1)],
]

_FINISH_TIMES = Exercise(
    name="finish_times",
    arguments=("programs", "alpha_s", "beta_s_per_byte"),
    reference=_simulate,
    cases=[
        ([[("send", 1, 1e6)], [("recv", 0)]], *_LINK),
        ([[("work", 1.5)], []], *_LINK),
        (_LATE, *_LINK),
        (_SWAP, *_LINK),
        (_CHAIN, *_LINK),
        (_BOTH_SEND, *_LINK),
        (_TREE, *_LINK),
        (_RING, *_LINK),
        (_ODD_FIRST, *_LINK),
        ([*_BOTH_SEND, [("work", 3.0)]], *_LINK),
        ([[("send", 1, 8)], [("work", 1.0)]], *_LINK),
    ],
    mistakes={
        "a rank that waits for another one must be looked at again: go over all ranks "
        "until nobody moves": lambda p, a, b: _simulate(p, a, b, passes=1),
        "a message starts when both ends are there: take the later of the two clocks": (
            _alone
        ),
        "the sender cannot go on before the receiver has come: a send is a rendezvous, "
        "and its message ends for both at once": (
            lambda p, a, b: _posted(p, a, b, sender_pays=True)
        ),
        "the message holds the sender as well: both clocks become its end": (
            lambda p, a, b: _posted(p, a, b, sender_pays=False)
        ),
        "each message pays alpha besides its bytes": lambda p, a, b: _simulate(p, 0, b),
        "a rank that never gets on ends at infinity": (
            lambda p, a, b: [0.0 if t == math.inf else t for t in _simulate(p, a, b)]
        ),
        "return one time for each rank, not only the last": (
            lambda p, a, b: max(_simulate(p, a, b))
        ),
    },
    hint="while somebody can go on: work adds to the rank's clock; a send whose "
    "receiver waits for it sets both clocks to the later one + alpha + S beta",
)
