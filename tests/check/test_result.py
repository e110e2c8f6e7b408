import dataclasses
import signal
import threading
import time

import numpy as np
import pytest
import torch

from labpkg.check.limits import SizeLimit
from labpkg.check.result import CheckResult, Exercise

DOUBLE = Exercise(
    name="double",
    arguments=("x",),
    reference=lambda x: 2 * x,
    cases=[(torch.tensor([1.0, 2.0]),), (torch.tensor([3.0]),)],
    mistakes={"you squared it": lambda x: x**2},
    hint="multiply by two",
)
PIECES = Exercise(
    name="pieces",
    arguments=("x", "n"),
    reference=lambda x, n: list(x.chunk(n)),
    cases=[(torch.arange(4.0), 2)],
    mistakes={},
    hint="n pieces",
)


def test_a_right_answer_is_one_line(capsys):
    result = DOUBLE.check(lambda x: x + x)
    assert capsys.readouterr().out == "ok 2 cases\n"
    assert result
    assert result == CheckResult(passed=True, cases=2, message="ok 2 cases", hint="")


def test_a_wrong_answer_shows_input_got_expected_and_hint(capsys):
    result = DOUBLE.check(lambda x: x + 2)
    assert not result
    assert (result.passed, result.cases, result.hint) == (False, 2, "multiply by two")
    assert result.message == (
        "FAIL case 1 of 2\n"
        "  input    x = [1, 2]\n"
        "  got      [3, 4]\n"
        "  expected [2, 4]\n"
        "hint: multiply by two"
    )
    assert capsys.readouterr().out == result.message + "\n"
    assert repr(result) == "CheckResult(passed=False, cases=2)"


def test_the_first_failing_case_is_reported():
    result = DOUBLE.check(lambda x: 2 * x if len(x) == 2 else x)
    assert result.message.startswith("FAIL case 2 of 2\n  input    x = [3]")


def test_a_known_mistake_is_named():
    assert DOUBLE.check(lambda x: x * x).hint == "you squared it"


def test_a_returned_input_is_named():
    assert "returns its argument unchanged" in DOUBLE.check(lambda x: x).hint


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda x: None, "returns nothing; end it with a return statement"),
        (lambda x: x[0], "return a tensor of shape (2,), not a scalar"),
        (lambda x: [2 * x], "return a tensor of shape (2,), not a list of 1"),
        (lambda x: "four", "return a tensor of shape (2,), not a str"),
        (lambda x: x + 2j, "return a tensor of shape (2,), not a Tensor"),
        (lambda x: x.to("meta"), "return a tensor of shape (2,), not a Tensor"),
        (lambda x: x.to_sparse(), "returns its argument unchanged"),
        (
            lambda x: np.array(["4", "8"]),
            "return a tensor of shape (2,), not a ndarray",
        ),
        (lambda x: 10**400, "return a tensor of shape (2,), not a int"),
        (lambda x: x * torch.nan, "multiply by two"),
    ],
)
def test_other_kinds_of_answers(answer, hint):
    result = DOUBLE.check(answer)
    assert not result
    assert hint in result.hint


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: (2 * x).numpy(),
        lambda x: (2 * x).double().requires_grad_(),
        lambda x: (2 * x).int(),
    ],
)
def test_any_numeric_form_is_accepted(answer):
    assert DOUBLE.check(answer)


def test_a_changed_argument_is_refused_and_spoils_nothing():
    result = DOUBLE.check(lambda x: x.mul_(2))
    assert "changes its argument x; work on a copy" in result.hint
    assert "x is now [2, 4]" in result.message
    assert DOUBLE.check(lambda x: 2 * x)


def test_a_crash_shows_only_the_frames_of_the_reader():
    def inner(x):
        raise KeyError("no such key")

    def answer(x):
        return inner(x)

    result = DOUBLE.check(answer)
    assert "\n  KeyError: 'no such key'\n" in result.message
    assert "in inner" in result.message
    assert "in answer" in result.message
    assert "labpkg/check/result.py" not in result.message
    assert "raises KeyError" in result.hint


def test_leaving_the_interpreter_is_a_wrong_answer():
    assert not DOUBLE.check(lambda x: exit(1))


def test_an_interrupt_passes_through():
    def answer(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        DOUBLE.check(answer)


def test_a_wrong_signature_tells_the_right_one():
    result = DOUBLE.check(lambda: 3)
    assert "TypeError" in result.message
    assert result.hint == "the function is called as double(x)"


@pytest.mark.parametrize("not_a_function", [None, torch.ones(2), 3])
def test_something_that_is_not_a_function(not_a_function):
    result = DOUBLE.check(not_a_function)
    assert "is not a function" in result.message
    assert result.hint == "pass the function itself: check.double(double)"


def test_sequences_of_tensors_are_compared_one_by_one():
    assert PIECES.check(lambda x, n: x.chunk(n))
    assert not PIECES.check(lambda x, n: [x, x])
    assert PIECES.check(lambda x, n: [x]).hint == "return a list of 2, not a list of 1"
    assert PIECES.check(lambda x, n: x).hint.startswith("the function returns its arg")


def test_text_and_none_are_compared_too():
    first = Exercise(
        name="first",
        arguments=("text", "default"),
        reference=lambda text, default: text[0] if text else default,
        cases=[("ab", None), ("", None)],
        mistakes={"this is the last": lambda text, default: text[-1:]},
        hint="the first character, or the default",
    )
    assert first.check(lambda text, default: [*text, default][0])
    assert first.check(lambda text, default: text[-1]).hint == "this is the last"
    assert first.check(lambda text, default: 1).hint == "return a str, not a scalar"
    wrong = first.check(lambda text, default: text)
    assert wrong.hint.startswith("the function returns its argument unchanged")
    assert "input    text = 'ab', default = None" in wrong.message


def test_a_large_tensor_is_shown_by_its_shape():
    large = Exercise(
        name="double",
        arguments=("x",),
        reference=lambda x: 2 * x,
        cases=[(torch.ones(10, 10),)],
        mistakes={},
        hint="multiply by two",
    )
    message = large.check(lambda x: x + 2).message
    assert "got      a tensor of shape (10, 10), mean 3" in message


def test_a_limit_holds_inside_the_function_only():
    outer = Exercise(
        name="outer",
        arguments=("x",),
        reference=lambda x: x.outer(x).sum(),  # larger than the limit: not limited
        cases=[(torch.ones(3),)],
        mistakes={},
        hint="multiply the sums",
        limit=lambda x: SizeLimit(3, "sum first"),
    )
    assert outer.check(lambda x: x.sum() ** 2)
    assert outer.check(lambda x: x.expand(9, 3)[0].sum() ** 2)  # a view is no memory
    result = outer.check(lambda x: (x[:, None] * x).sum())
    assert result.hint == "sum first"
    assert "this makes a tensor of 9 elements, shape (3, 3)" in result.message
    assert torch.ones(9).numel() == 9  # and it is over


def test_a_float_keeps_its_digits():
    exact = Exercise(
        name="third",
        arguments=("x",),
        reference=lambda x: torch.tensor(x / 3, dtype=torch.float64),
        cases=[(1e9,)],
        mistakes={},
        hint="divide by three",
        rtol=1e-12,
    )
    assert exact.check(lambda x: x / 3)
    assert not exact.check(lambda x: x / 3 + 1e-2)


def test_a_known_mistake_does_not_warn():
    exercise = Exercise(
        name="spread",
        arguments=("x",),
        reference=lambda x: x.std(correction=0),
        cases=[(torch.ones(1),)],
        mistakes={"over N": lambda x: x.std()},  # torch warns of a single number
        hint="over N",
    )
    assert not exercise.check(lambda x: x.sum() + 1)


def endless(x):
    while True:
        x = x + 0


def test_an_endless_loop_is_ended_at_the_readers_line():
    started = []

    def quick(x):
        return started.append(x) or 2 * x

    hasty = dataclasses.replace(DOUBLE, limit_s=0.2)
    before = lambda *_: started.append("alarm")
    replaced = signal.signal(signal.SIGALRM, before)
    old = signal.setitimer(signal.ITIMER_REAL, 60)
    try:
        result = hasty.check(endless)
        assert "loop that never ends" in result.hint
        assert result.message.splitlines()[-2].strip() == (
            "labpkg.check.limits.AnswerTimeoutError: no answer after 0.2 s"
        )
        assert "in endless" in result.message
        assert "limits.py" not in result.message
        assert hasty.check(quick)
        assert signal.getsignal(signal.SIGALRM) is before
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] < 60
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, replaced)
        signal.setitimer(signal.ITIMER_REAL, *old)


def test_in_another_thread_an_answer_has_no_limit():
    hasty = dataclasses.replace(DOUBLE, limit_s=1e-3)
    found = []
    slow = lambda x: time.sleep(0.01) or 2 * x
    thread = threading.Thread(target=lambda: found.append(hasty.check(slow)))
    thread.start()
    thread.join()
    assert found[0]
