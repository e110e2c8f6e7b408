"""Which rank is to blame, said in words.

When one rank of a job fails, the others fail too: they lose a connection, or wait for
ever. The first error by the clock is often a victim's. So every rank reports what
happened to it (`Failure`) or where it is (`Where`), and `diagnose` names the earliest
failure that is no lost connection. After a hang nobody has failed, and the blame is an
inference: a stopped rank, else one outside collectives (one that has returned, if all
others wait), else the one that has issued the fewest, because the others wait for it.

Chapter: processes/ranks, runs/debugging.
"""

from __future__ import annotations

import linecache
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

# What faulthandler says about a crash besides the frames of the function.
_NOISE = re.compile(
    r'^( *File "([^"]*labpkg/processes/(rank|fork_server)\.py|<string>)", line \d+ in'
    r"|Extension modules:).*\n?",
    re.MULTILINE,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a rank returned no value.

    Attributes:
        time_s: When, on the monotonic clock, which all processes of a machine share.
        summary: The error in one line.
        traceback: The traceback, or else what the rank printed last.
        is_victim: The rank lost a connection, so another rank must have failed first.
    """

    time_s: float
    summary: str
    traceback: str = ""
    is_victim: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """What a rank is doing.

    Attributes:
        stack: The Python stack of the function.
        collective: The collective or message that it waits in, or "".
        num_issued: Collectives that it has issued so far; None if it did not answer.
        is_stopped: The process is stopped by a signal or a debugger.
    """

    stack: str
    collective: str = ""
    num_issued: int | None = None
    is_stopped: bool = False

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
        where: The ranks that were still running.
        limit_s: The time limit of the run, in seconds.
    """
    returned = list(returned)
    others = dict.fromkeys(returned, "had returned")
    others |= {rank: str(place) for rank, place in where.items()}
    for rank, failure in failures.items():
        how = "lost a connection" if failure.is_victim else "failed too"
        others[rank] = f"{how}: {failure.summary}"
    if failures:
        guilty = min(
            failures, key=lambda r: (failures[r].is_victim, failures[r].time_s)
        )
        summary, text = failures[guilty].summary, failures[guilty].traceback
    else:
        guilty, reason = _suspect(where, sorted(returned))
        summary = (
            f"the run did not end within {limit_s:g} s; this rank is suspected (an "
            f"inference) because it {reason}"
        )
        if _differ(where):
            summary += "; ranks wait in calls that do not match: check=True names them"
        text = "\n".join(
            f"Stack of rank {rank} ({place}):\n{place.stack}"
            for rank, place in sorted(where.items())
        )
    del others[guilty]
    return RankError(guilty, summary, with_source(text), others)


def _suspect(where: dict[int, Where], returned: list[int]) -> tuple[int, str]:
    def innocence(rank: int) -> tuple[bool, bool, int, int]:
        place = where[rank]
        return not place.is_stopped, bool(place.collective), place.num_issued or 0, rank

    guilty = min(where, key=innocence)
    all_wait = where[guilty].collective and not where[guilty].is_stopped
    if all_wait and returned:
        return returned[0], "had returned while others wait"
    return guilty, _reason(where[guilty])


def _reason(place: Where) -> str:
    if place.collective and not place.is_stopped:
        return f"has issued the fewest collectives ({place.num_issued}); it {place}"
    return str(place)


def _differ(where: dict[int, Where]) -> bool:
    # "all_reduce [4] (number 2 in default_pg)": one number of a group is one call.
    calls: dict[str, str] = {}
    for place in where.values():
        pending = place.collective.rpartition("; pending: ")[2]
        call, _, number = pending.partition(" (")
        if number and calls.setdefault(number, call) != call:
            return True
    return False


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
