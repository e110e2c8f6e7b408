"""Run a reader's function on cases, compare with a reference, report in a few lines.

Contract: a wrong answer never raises. The report shows the first failing case with its
input, what came back, what was expected, and one hint; a crash shows the reader's own
traceback. A hint is specific because each exercise lists the *known wrong answers*: if
the function returns exactly what a known mistake would, the hint names that mistake.

The exercises live in one module per chapter beside this one.
"""

from __future__ import annotations

import copy
import textwrap
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from labpkg.check import limits

_LARGEST_SHOWN = 24  # elements of a tensor in a report


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    """What a checker found; false when the answer is wrong.

    Args:
        passed: whether every case passed.
        cases: number of cases of the exercise.
        message: the printed report.
        hint: what to change; empty when passed.
    """

    passed: bool
    cases: int
    message: str = field(repr=False)
    hint: str = field(default="", repr=False)

    def __bool__(self) -> bool:
        return self.passed


def _no_limit(*case: Any) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True, kw_only=True, slots=True)
class Exercise:
    """One task: a function to write, cases to try it on, mistakes to recognise.

    Args:
        name: of the function that the reader writes.
        arguments: names of its arguments.
        reference: the right answer; returns a number, tensor or text, or a sequence.
        cases: argument tuples, from the plainest to the most extreme.
        mistakes: hint -> the wrong function that calls for it, the likeliest first.
        hint: shown when no mistake is recognised.
        rtol: relative tolerance; half-finished answers differ by far more.
        atol: absolute tolerance.
        limit: called with a case, returns the context in which the function runs.
        limit_s: seconds for one case, in the main thread.
    """

    name: str
    arguments: tuple[str, ...]
    reference: Callable[..., Any]
    cases: Sequence[tuple[Any, ...]]
    mistakes: Mapping[str, Callable[..., Any]]
    hint: str
    rtol: float = 1e-4
    atol: float = 1e-6
    limit: Callable[..., AbstractContextManager[Any]] = _no_limit
    limit_s: float = 30.0

    def check(self, fn: Callable[..., Any]) -> CheckResult:
        """Print and return how a function does on all cases, up to the first failure.

        Args:
            fn: the reader's function.
        """
        if not callable(fn):
            return self._report(
                f"FAIL\n  got {_show(fn)}, which is not a function",
                f"pass the function itself: check.{self.name}({self.name})",
            )
        for number, case in enumerate(self.cases, 1):
            failure = _Trial(self, case).failure(fn)
            if failure:
                place = f"FAIL case {number} of {len(self.cases)}"
                return self._report(f"{place}\n{failure.details}", failure.hint)
        return self._report(f"ok {len(self.cases)} cases")

    def _report(self, message: str, hint: str = "") -> CheckResult:
        if hint:
            message += f"\nhint: {hint}"
        print(message)
        return CheckResult(
            passed=not hint, cases=len(self.cases), message=message, hint=hint
        )

    @property
    def call(self) -> str:
        """How the function is called, for messages."""
        return f"{self.name}({', '.join(self.arguments)})"


class _Failure(NamedTuple):
    details: str
    hint: str


class _Trial:
    """One case of an exercise, tried on one function."""

    def __init__(self, exercise: Exercise, case: tuple[Any, ...]) -> None:
        self.exercise, self.case = exercise, case

    def failure(self, fn: Callable[..., Any]) -> _Failure | None:
        given = copy.deepcopy(self.case)
        try:
            limit_s = self.exercise.limit_s
            with limits.time_limit(limit_s), self.exercise.limit(*self.case):
                got = fn(*given)
        except (Exception, SystemExit) as error:
            return self._crash(error)
        for name, before, after in zip(
            self.exercise.arguments, self.case, given, strict=True
        ):
            if not self._agree(after, before):
                return _Failure(
                    self._details(f"{name} is now {_show(after)}"),
                    f"the function changes its argument {name}; work on a copy, "
                    "without in-place operations (+=, x[...] = y, names ending in _)",
                )
        expected = self.exercise.reference(*self.case)
        if self._agree(got, expected):
            return None
        details = self._details(f"got      {_show(got)}", f"expected {_show(expected)}")
        return _Failure(details, self._hint(got, expected))

    def _hint(self, got: Any, expected: Any) -> str:
        if got is None:
            return "the function returns nothing; end it with a return statement"
        with warnings.catch_warnings(action="ignore"):  # they would not be the reader's
            for hint, wrong_answer in self.exercise.mistakes.items():
                if self._agree(got, wrong_answer(*self.case)):
                    return hint
        if any(self._agree(got, argument) for argument in self.case):
            return "the function returns its argument unchanged; " + self.exercise.hint
        kinds = _kind(got), _kind(expected)
        if kinds[0] != kinds[1]:
            return f"return {kinds[1]}, not {kinds[0]}"
        return self.exercise.hint

    def _agree(self, got: Any, expected: Any) -> bool:
        if isinstance(expected, (list, tuple)):
            return (
                isinstance(got, (list, tuple))
                and len(got) == len(expected)
                and all(map(self._agree, got, expected))
            )
        if expected is None or isinstance(expected, str):
            return type(got) is type(expected) and got == expected
        a, b = _as_tensor(got), _as_tensor(expected)
        if a is None or b is None or a.shape != b.shape:
            return False
        tolerance = {"rtol": self.exercise.rtol, "atol": self.exercise.atol}
        return torch.allclose(a, b, equal_nan=True, **tolerance)

    def _crash(self, error: BaseException) -> _Failure:
        frames = error.__traceback__
        own = frames.tb_next if frames else None  # without our own call
        files = [frame.filename for frame in traceback.extract_tb(own)]
        depth = files.index(limits.__file__) if limits.__file__ in files else None
        lines = traceback.format_exception(type(error), error, own, limit=depth)
        hint = f"the function is called as {self.exercise.call}"
        if isinstance(error, limits.MemoryLimitError):
            hint = error.hint
        elif isinstance(error, limits.AnswerTimeoutError):
            hint = "look for a loop that never ends, or that waits for ever"
        elif own is not None:
            hint = f"the function raises {type(error).__name__}; " + hint
        return _Failure(self._details("".join(lines).rstrip()), hint)

    def _details(self, *lines: str) -> str:
        inputs = zip(self.exercise.arguments, self.case, strict=True)
        shown = ", ".join(f"{name} = {_show(value)}" for name, value in inputs)
        return textwrap.indent("\n".join((f"input    {shown}", *lines)), "  ")


def _as_tensor(value: Any) -> Tensor | None:
    """Return a number, array or tensor as a float64 tensor on the CPU, else None."""
    try:
        if isinstance(value, (bool, int, float, np.ndarray, np.generic)):
            # numpy first: torch makes float32 of a float.
            value = torch.as_tensor(np.asarray(value), device="cpu")
        if not isinstance(value, Tensor) or value.is_complex():
            return None
        return value.detach().to("cpu", torch.float64).to_dense()
    except (TypeError, RuntimeError):  # an array of text, a tensor without data
        return None


def _kind(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    tensor = _as_tensor(value)
    if tensor is None:
        return f"a {type(value).__name__}"
    return f"a tensor of shape {tuple(tensor.shape)}" if tensor.dim() else "a scalar"


def _show(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_show, value)) + "]"
    tensor = _as_tensor(value)
    if tensor is None:
        return repr(value)
    if tensor.numel() > _LARGEST_SHOWN:
        return f"{_kind(tensor)}, mean {tensor.mean():.6g}"
    return _show_numbers(tensor.tolist())


def _show_numbers(numbers: Any) -> str:
    if isinstance(numbers, list):
        return "[" + ", ".join(map(_show_numbers, numbers)) + "]"
    return f"{numbers:.6g}"
