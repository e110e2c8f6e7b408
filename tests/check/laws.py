"""What every exercise obeys; the tests of a chapter's exercises inherit it."""

from __future__ import annotations

import sys

import pytest

from labpkg.check.result import Exercise


class ExerciseLaws:
    """Set `exercises` (name: checker) and `wrong` (name, answer, part of the hint)."""

    exercises: dict
    wrong: list

    def test_wrong_answers_fail_with_their_hint(self, subtests):
        for name, answer, hint in self.wrong:
            with subtests.test(name, hint=hint):
                result = self.exercises[name](answer)
                assert not result
                assert hint in result.hint, result.message

    def test_each_exercise_has_three_wrong_answers_and_its_input(self):
        for name in self.exercises:
            hints = [hint for exercise, _, hint in self.wrong if exercise == name]
            assert len(hints) >= 3, name
            assert "returns its argument" in hints, name

    @pytest.mark.parametrize("rubbish", [None, 3, lambda *args: None, lambda: 1 / 0])
    def test_nothing_raises(self, rubbish):
        for check in self.exercises.values():
            assert not check(rubbish)

    def test_each_known_mistake_is_one_and_is_named(self, subtests):
        modules = {sys.modules[check.__module__] for check in self.exercises.values()}
        for module in modules:
            known = [it for it in vars(module).values() if isinstance(it, Exercise)]
            assert len(known) == len(self.exercises)
            for exercise in known:
                for hint, answer in exercise.mistakes.items():
                    with subtests.test(exercise.name, hint=hint):
                        result = exercise.check(answer)
                        assert not result
                        assert result.hint == hint
