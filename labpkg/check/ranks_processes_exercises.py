"""Checker of the exercise of the chapter processes/ranks that watches processes.

Its processes are simulated, on a clock that only `sleep` and `wait` move: what the
reader writes works on real ones, and the answer does not depend on a busy machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from labpkg.check.result import CheckResult, Exercise

_MAX_POLLS = 100_000


def supervise(fn: Callable[..., Any]) -> CheckResult:
    """Check `supervise(ranks, limit_s, clock)`: watch processes, say who fails first.

    Each rank has `poll()`, `wait()` and `kill()` as `subprocess.Popen` has; the clock
    has `sleep(seconds)` and `monotonic()` as the module `time` has. The answer is the
    pair (rank, reason): `(None, "")` when all have ended with 0, `(r, "exit 3")` or
    `(r, "signal 9")` for the rank that fails first, `(r, "time")` for the lowest rank
    that still runs after `limit_s` seconds. It comes within 0.2 s, and no process
    outlives it.

    Args:
        fn: your function.

    Returns:
        A `CheckResult`, false with a hint when a case fails.
    """
    return _SUPERVISE.check(_simulated(fn) if callable(fn) else fn)


class _Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now_s, self.polls = 0.0, 0

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.polls = 0

    def monotonic(self) -> float:
        return self.now_s


class _Rank:
    """A process that ends at a known time."""

    def __init__(self, clock: _Clock, text: str) -> None:
        self._clock, self.killed = clock, False
        match = re.fullmatch(r"(exit|signal) (\d+) after (\S+) s", text)
        kind, number, end_s = match.groups() if match else ("exit", "0", "inf")
        self._code = int(number) if kind == "exit" else -int(number)
        self.end_s = float(end_s)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        self._clock.polls += 1
        if self._clock.polls > _MAX_POLLS:
            raise RuntimeError("time stands still: call clock.sleep between the polls")
        if self._clock.now_s >= self.end_s:
            return self._code
        return -9 if self.killed else None

    def wait(self, timeout: float | None = None) -> int | None:
        if self.poll() is None:
            if math.isinf(self.end_s):
                raise RuntimeError("waits for ever: this rank does not end by itself")
            self._clock.sleep(self.end_s - self._clock.now_s)
        return self.poll()

    def kill(self) -> None:
        self.killed = True

    terminate = kill


def _simulated(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the case, which adds when it returned and what is left."""

    def run(texts: list[str], limit_s: float, _: str) -> Any:
        clock = _Clock()
        ranks = [_Rank(clock, text) for text in texts]
        answer = fn(ranks, limit_s, clock)
        if answer is None or answer is ranks:
            return None if answer is None else texts
        left = sum(rank.poll() is None for rank in ranks)
        late_s = clock.now_s - _reference_end_s(texts, limit_s)
        when = "in time" if -0.01 <= late_s <= 0.2 else f"at {clock.now_s:.1f} s"
        return [answer, when, f"{left} processes left"]

    return run


def _reference_end_s(texts: Sequence[str], limit_s: float) -> float:
    clock = _Clock()
    _supervise([_Rank(clock, text) for text in texts], limit_s, clock, step_s=0.001)
    return clock.now_s


def _supervise(
    ranks: list[_Rank],
    limit_s: float,
    clock: _Clock,
    *,
    step_s: float = 0.01,
    waits_for_all: bool = False,
    kills: bool = True,
    watches_clock: bool = True,
    knows_signals: bool = True,
    zero_fails: bool = False,
    blames: Callable[[list[int]], int] = min,
) -> tuple[int | None, str]:
    """Answer the exercise; each option is a mistake."""
    answer: tuple[int | None, str] = (None, "")
    while True:
        codes = [rank.poll() for rank in ranks]
        good = (None,) if zero_fails else (None, 0)
        failed = [r for r, code in enumerate(codes) if code not in good]
        running = [r for r, code in enumerate(codes) if code is None]
        if failed and not (waits_for_all and running):
            code = codes[failed[0]] or 0
            is_signal = code < 0 and knows_signals
            answer = failed[0], f"signal {-code}" if is_signal else f"exit {code}"
            break
        if not running:
            break
        if watches_clock and clock.monotonic() >= limit_s:
            answer = blames(running), "time"
            break
        if clock.monotonic() > 100:  # the mistake: it would not end
            break
        clock.sleep(step_s)
    for rank in ranks if kills else []:
        rank.kill()
    return answer


def _one_by_one(ranks: list[_Rank], limit_s: float, clock: _Clock) -> Any:
    for r, rank in enumerate(ranks):
        if math.isinf(rank.end_s):
            return None  # it would wait for ever
        if code := rank.wait():
            return r, f"exit {code}" if code > 0 else f"signal {-code}"
    return None, ""


def _mistake(**options: Any) -> Callable[..., Any]:
    return _simulated(partial(_supervise, **options))


_GOOD, _LATER = "exit 0 after 0.5 s", "exit 0 after 3 s"
_SUPERVISE = Exercise(
    name="supervise",
    arguments=("ranks", "limit_s", "clock"),
    reference=_mistake(),
    cases=[
        ([_GOOD, _GOOD, _LATER], 20, "simulated"),
        ([_GOOD, "exit 3 after 1 s"], 20, "simulated"),
        (["signal 9 after 1 s", "exit 0 after 1 s"], 20, "simulated"),
        (["exit 1 after 2 s", "exit 2 after 1 s", _LATER], 20, "simulated"),
        (["exit 0 after 9 s", "exit 4 after 1 s"], 20, "simulated"),
        (["exit 0 after 9 s", "signal 11 after 8.5 s"], 5, "simulated"),
        ([_GOOD, "runs for ever", "runs for ever"], 2, "simulated"),
        (["runs for ever", "exit 1 after 1 s"], 20, "simulated"),
    ],
    mistakes={
        "a rank that ends with 0 has ended well": _mistake(zero_fails=True),
        "a negative returncode is the number of a signal": (
            _mistake(knows_signals=False)
        ),
        "kill the processes that still run before you return": _mistake(kills=False),
        "a rank that ends with 0 has ended well, and what still runs must be killed": (
            _mistake(zero_fails=True, kills=False)
        ),
        "a rank that fails must be noticed while the others run: ask each with poll(), "
        "instead of waiting for one after the other": _simulated(_one_by_one),
        "return at the first failure; do not go on until all have ended": (
            _mistake(waits_for_all=True)
        ),
        "the time limit holds for all ranks together; look at the clock in the loop": (
            _mistake(watches_clock=False)
        ),
        "after the time limit blame the lowest rank that still runs, not rank 0": (
            _mistake(blames=lambda running: 0)
        ),
        "of the ranks that still run, blame the lowest": _mistake(blames=max),
    },
    hint=(
        "return the pair (rank, reason): poll() every rank, then sleep a little, and "
        "again, until one has failed, all have ended or the time is up; at the end "
        "kill what still runs"
    ),
)
