"""Callbacks: called on every rank in one order, heard, saved and undone."""

from pathlib import Path

import pytest

import labpkg as lab
from labpkg.runs.callbacks import Callback
from labpkg.runs.config import TrainConfig
from labpkg.runs.trainer import Trainer

_RUN_S = 110


class Recorder(Callback):
    """Note each call, and what the run is like then."""

    def __init__(self):
        self.calls = []

    def _note(self, moment, run):
        self.calls.append((moment, run.step))

    def on_start(self, run):
        self._note("start", run)
        assert run.composition.layout == run.config.layout

    def before_step(self, run):
        self._note("before", run)

    def after_step(self, run, report):
        self._note("after", run)
        assert report.count == run.config.global_batch_size

    def after_save(self, run, path):
        self._note("save", run)
        assert lab.verify_checkpoint(path).step == run.step

    def on_end(self, run):
        self._note("end", run)

    def close(self):
        self.calls.append("close")


class Lenient(Callback):
    """Note which checkpoints are announced; training has gone on meanwhile."""

    def __init__(self):
        self.saved = []

    def after_save(self, run, path):
        self.saved.append(lab.verify_checkpoint(path).step)


class Eager(Callback):
    """Save after step 3, stop after step 5 because of what all ranks know."""

    def after_step(self, run, report):
        if run.step == 3:
            run.save()
            run.save()  # has no effect: there is nothing new to save
        if run.step == 5:
            run.stop("enough")
            run.stop("more than enough")  # the first reason counts


class Counter(Callback):
    """Have a state of its own."""

    def __init__(self):
        self.seen = 0

    def after_step(self, run, report):
        self.seen += 1

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Refusing(Callback):
    """Skip every other step by a rule that all ranks share."""

    def on_start(self, run):
        run.composition.skip_rules.append(
            lambda loss, norm: "planted" if run.step % 2 else None
        )


class Failing(Callback):
    """Fail on one rank."""

    def __init__(self, rank):
        self.rank = rank

    def before_step(self, run):
        if run.composition.mesh.get_rank() == self.rank:
            raise KeyError("planted")


def _config(out, **options):
    defaults = {"steps": 8, "global_batch_size": 16, "checkpoint_every": 4}
    return TrainConfig(data="digits", out=Path(out), **{**defaults, **options})


def _recorded(config):
    recorder = Recorder()
    result = Trainer(config, [recorder, Eager()]).run()
    return recorder.calls, result


def _steps(first, last):
    return [
        c for s in range(first, last + 1) for c in (("before", s - 1), ("after", s))
    ]


def test_every_rank_calls_in_one_order_and_is_heard(tmp_path, world2):
    out = world2.run(_recorded, _config(tmp_path, pp=2), timeout_s=_RUN_S)
    (calls, result), (others, _) = out
    assert calls == others
    assert calls == [
        *(("start", 0), *_steps(1, 3), ("save", 3), *_steps(4, 4), ("save", 4)),
        *(*_steps(5, 5), ("save", 5), ("end", 5), "close"),
    ]
    assert (result.steps, result.stopped) == (5, "enough")
    assert result.validation_loss is None
    assert result.checkpoint.endswith("step_000005")
    assert "Stopped after 5 steps: enough." in str(result)
    assert lab.verify_checkpoint(result.checkpoint).step == 5


def test_an_asynchronous_checkpoint_is_announced_when_it_is_complete(tmp_path):
    recorder = Lenient()
    Trainer(_config(tmp_path, async_save=True), [recorder]).run()
    assert recorder.saved == [4, 8]


def test_a_state_is_saved_and_comes_back_before_the_start(tmp_path):
    counter = Counter()
    Trainer(_config(tmp_path), [counter, Eager()]).run()
    assert counter.seen == 5
    again = Counter()
    Trainer(_config(tmp_path, resume="auto"), [again]).run()
    assert again.seen == 8


def test_steps_that_a_rule_skips_are_in_the_result_and_in_the_checkpoint(tmp_path):
    first = Trainer(_config(tmp_path), [Refusing(), Eager()]).run()
    assert first.skipped_steps == [(2, "planted"), (4, "planted")]
    whole = Trainer(_config(tmp_path, resume="newest"), [Refusing()]).run()
    assert [step for step, _ in whole.skipped_steps] == [2, 4, 6, 8]
    assert "Skipped 4 steps, last 8: planted." in str(whole)


def test_an_error_in_a_callback_is_one_of_its_rank(tmp_path, world2):
    with pytest.raises(lab.RankError, match="planted") as caught:
        world2.run(_fail, _config(tmp_path), timeout_s=_RUN_S)
    assert caught.value.rank == 1


def _fail(config):
    Trainer(config, [Failing(1)]).run()


def test_what_a_callback_did_is_undone_after_an_error(tmp_path):
    recorder = Recorder()
    with pytest.raises(KeyError, match="planted"):
        Trainer(_config(tmp_path), [recorder, Failing(0)]).run()
    assert recorder.calls == [("start", 0), ("before", 0), "close"]


def test_two_of_one_class_are_refused():
    with pytest.raises(ValueError, match="two callbacks are of the class Counter"):
        Trainer(TrainConfig(), [Counter(), Counter()])
