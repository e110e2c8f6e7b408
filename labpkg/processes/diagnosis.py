"""Which rank is to blame, said in words.

When one rank of a job fails, the others fail too: they lose a connection, or wait for
ever. The first error by the clock is often a victim's. So every rank reports what
happened to it (`Failure`) or where it is (`Where`), and `diagnose` names the earliest
failure that is no lost connection. After a hang nobody has failed, and the blame is an
inference: a stopped rank, else one whose calls differ from those of the others, else
one outside collectives (one that has returned, if all others wait), else the one that
has issued the fewest, because the others wait for it.

Ranks must make the same calls in the same order. Where calls differ, who is in the
minority is to blame, if there is one.

Chapter: processes/ranks, runs/debugging.
"""

from __future__ import annotations

import linecache
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

# What faulthandler says about a crash besides the frames of the function.
_NOISE = re.compile(
    r'^( *File "([^"]*labpkg/processes/(rank|fork_server)\.py|<string>)", line \d+ in'
    r"|Extension modules:).*\n?",
    re.MULTILINE,
)

# Calls that two ranks make differently.
_MESSAGES = ("send", "recv", "sendrecv", "isend", "irecv")


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a rank returned no value.

    Attributes:
        time_s: When, on the monotonic clock, which all processes of a machine share.
        summary: The error in one line.
        traceback: The traceback, or else what the rank printed last.
        is_victim: The rank lost a connection, so another rank must have failed first.
        has_aborted: gloo ended the process, as it does when calls do not match.
        call: What the rank called when it learned that others called something else.
    """

    time_s: float
    summary: str
    traceback: str = ""
    is_victim: bool = False
    has_aborted: bool = False
    call: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """What a rank is doing.

    Attributes:
        stack: The Python stack of the function.
        collective: The collective or message that it waits in, or "".
        num_issued: Collectives that it has issued so far; None if it did not answer.
        is_stopped: The process is stopped by a signal or a debugger.
        calls: The latest collectives of the library: group and number in it -> which.
        record: The same of torch.
    """

    stack: str
    collective: str = ""
    num_issued: int | None = None
    is_stopped: bool = False
    calls: dict[tuple[str, int], str] = field(default_factory=dict)
    record: dict[tuple[str, int], str] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.is_stopped:
            return "was stopped"
        if self.collective:
            return f"waited in {self.collective}"
        return "ran outside collectives"


class RankError(RuntimeError):
    """A rank failed, or the run did not end in time.

    `rank`, `traceback` and `others` are attributes too.

    Args:
        rank: The rank that failed first; after a hang the one that is suspected.
        summary: Its error in one line.
        traceback: Its traceback, or the stacks of all ranks after a hang.
        others: What each other rank was doing, by rank.
    """

    def __init__(
        self, rank: int, summary: str, traceback: str, others: dict[int, str]
    ) -> None:
        super().__init__(rank, summary, traceback, others)
        self.rank, self.traceback, self.others = rank, traceback, others
        self._summary = summary

    def __str__(self) -> str:
        others = [f"  (rank {r}: {self.others[r]})" for r in sorted(self.others)]
        lines = [f"rank {self.rank}: {self._summary}", *others, "", self.traceback]
        return "\n".join(lines).rstrip()


def diagnose(
    *,
    returned: Iterable[int],
    failures: dict[int, Failure],
    where: dict[int, Where],
    limit_s: float,
) -> RankError:
    """Return the error of a run that did not end well; every rank is in one argument.

    Args:
        returned: The ranks that returned a value.
        failures: The ranks that failed.
        where: Where the ranks are that live, also those that returned or failed.
        limit_s: The time limit of the run, in seconds.
    """
    returned = sorted(returned)
    running = {r: where[r] for r in where if r not in {*returned, *failures}}
    others = dict.fromkeys(returned, "had returned")
    others |= {rank: str(place) for rank, place in running.items()}
    for rank, failure in failures.items():
        how = "lost a connection" if failure.is_victim else "failed too"
        others[rank] = f"{how}: {failure.summary}"
    calls = _first_difference({rank: it.calls for rank, it in where.items()})
    calls = calls or _first_difference({rank: it.record for rank, it in where.items()})
    if not calls and not returned:
        calls = _different_waits(running)
    if failures:
        guilty, summary, text = _first_failure(failures, calls)
    else:
        guilty, reason = suspect(running, returned, calls)
        summary = (
            f"the run did not end within {limit_s:g} s; this rank is suspected (an "
            f"inference) because it {reason}"
        )
        if calls:
            summary += f"; the calls do not match: {_listed(calls)}"
        text = "\n".join(
            f"Stack of rank {rank} ({place}):\n{place.stack}"
            for rank, place in sorted(running.items())
        )
    del others[guilty]
    return RankError(guilty, summary, with_source(text), others)


def _first_failure(
    failures: dict[int, Failure], calls: dict[int, str]
) -> tuple[int, str, str]:
    """Return rank, summary and traceback."""
    first = min(failures, key=lambda r: (failures[r].is_victim, failures[r].time_s))
    if failures[first].call:  # the error says that calls differ, on every rank
        said = {rank: it.call for rank, it in failures.items() if it.call}
        odd = _minority(said)
        first = first if odd is None else odd
    failure = failures[first]
    odd = _minority(calls) if failure.has_aborted else None
    if odd is None:
        return first, failure.summary, failure.traceback
    summary = f"the calls do not match: {_listed(calls)}; rank {first} aborted on it"
    return odd, summary, failure.traceback


def suspect(
    where: dict[int, Where], returned: list[int], calls: dict[int, str]
) -> tuple[int, str]:
    """Return who is suspected after a hang, and why.

    Args:
        where: Where the ranks are that have not returned.
        returned: The other ranks.
        calls: Collectives that should be the same and are not, by rank; may be empty.
    """

    def innocence(rank: int) -> tuple[bool, bool, int, int]:
        place = where[rank]
        return not place.is_stopped, bool(place.collective), place.num_issued or 0, rank

    guilty = min(where, key=innocence)
    place = where[guilty]
    if place.is_stopped:
        return guilty, str(place)
    odd = _minority(calls)
    if odd is not None:
        return odd, f"called {calls[odd]}"
    if not place.collective:
        return guilty, str(place)
    if returned:
        return returned[0], "had returned while others wait"
    are_level = len({it.num_issued for it in where.values()}) == 1
    if len(where) > 1 and are_level:
        return guilty, f"is the first of ranks that are equally far; it {place}"
    reason = f"has issued the fewest collectives ({place.num_issued})"
    return guilty, f"{reason}; it {place}"


def _first_difference(
    records: dict[int, dict[tuple[str, int], str]],
) -> dict[int, str]:
    """Return what the ranks called at the first number of a group that differs."""
    numbers = {number for record in records.values() for number in record}
    for number in sorted(numbers, key=lambda it: (it[1], it[0])):
        calls = {r: record[number] for r, record in records.items() if number in record}
        if len(set(calls.values())) > 1:
            return calls
    return {}


def _different_waits(where: dict[int, Where]) -> dict[int, str]:
    """Return the collectives in which ranks wait, if they are as far and differ."""
    waits = {r: re.split("[ ;]", place.collective)[0] for r, place in where.items()}
    are_level = len({place.num_issued for place in where.values()}) == 1
    are_collectives = not {"", "a", *_MESSAGES} & set(waits.values())
    return (
        waits if are_level and are_collectives and len(set(waits.values())) > 1 else {}
    )


def _minority(calls: dict[int, str]) -> int | None:
    """Return the lowest rank that differs from most of the others, if most agree."""
    ranks: dict[str, list[int]] = {}
    for rank in sorted(calls):
        ranks.setdefault(calls[rank], []).append(rank)
    *fewer, most = sorted(ranks.values(), key=len) or [[]]
    if not fewer or len(fewer[-1]) == len(most):
        return None
    return min(set(calls) - set(most))


def _listed(calls: dict[int, str]) -> str:
    return ", ".join(f"{calls[rank]} on rank {rank}" for rank in sorted(calls))


def with_source(text: str) -> str:
    """Write notebook cells as `cell, line n` with their source; leave out our frames.

    Only the kernel knows the source of a cell: a rank cannot read it from a file.

    Args:
        text: Tracebacks, as Python or faulthandler print them.
    """

    def rewrite(match: re.Match[str]) -> str:
        indent, file, number, name = match.groups()
        line = linecache.getline(file, int(number)).strip()
        if not line or os.path.exists(file):
            return match[0]
        return f"{indent}cell, line {number}, in {name}\n{indent}  {line}"

    pattern = r'^( *)File "([^"]+)", line (\d+),? in (.+)$'
    return re.sub(pattern, rewrite, _NOISE.sub("", text), flags=re.MULTILINE)
