"""Faults on purpose: all ranks notice them at the same step, and say whose they are."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import labpkg as lab
from labpkg.runs.callbacks import Callback
from labpkg.runs.config import TrainConfig
from labpkg.runs.faults import (
    LossSpike,
    Preemption,
    ReplicaCheck,
    SkippedSteps,
)
from labpkg.runs.heartbeat import Heartbeat
from labpkg.runs.stragglers import Straggler, Stragglers
from labpkg.runs.trainer import Trainer

_RUN_S = 110  # a World's limit: the machine may be busy


def _digits(out, **options):
    defaults = {"steps": 8, "global_batch_size": 16, "checkpoint_every": 0}
    return TrainConfig(data="digits", out=out, **{**defaults, **options})


class At(Callback):
    """Call a function of the run before one step, on one rank."""

    def __init__(self, step, function, *, rank=1, lasts=1):
        self.steps, self.rank = range(step - 1, step - 1 + lasts), rank
        self.function = function

    def before_step(self, run):
        if run.step in self.steps and dist.get_rank() == self.rank:
            self.function(run)


class Again(At):
    """A second fault in one run, which has one callback of a class."""


def _train(config, *callbacks):
    """Train; return the result, or what a rank says when it gives up."""
    try:
        return Trainer(config, callbacks).run()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def _parameter(run):
    return next(p for p in run.composition.model.parameters() if p.numel() > 1)


def _flip(run):
    with torch.no_grad():
        _parameter(run).view(-1).view(torch.int32)[3] ^= 1


# Preemption. ------------------------------------------------------------------------


def _notified(config, number):
    before = signal.getsignal(number)
    result = _train(
        config, Preemption(), At(3, lambda run: os.kill(os.getpid(), number))
    )
    return result, signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(number, tmp_path, world2):
    results = world2.run(_notified, _digits(tmp_path), number, timeout_s=_RUN_S)
    for result, is_restored in results:
        assert result.steps == 3
        assert result.stopped == f"{number.name} announced the end of the job"
        assert result.validation_loss is None
        assert is_restored
    assert os.listdir(tmp_path / "checkpoints") == ["step_000003"]


# Steps that all ranks leave out. ------------------------------------------------------


def _no_number(run):
    """Let the next gradient of this rank alone be NaN."""
    handle = _parameter(run).register_hook(lambda g: handle.remove() or g * torch.nan)


def test_a_step_of_which_one_rank_has_no_number_is_left_out_by_all(tmp_path, world2):
    config = _digits(tmp_path)
    results = world2.run(
        _train, config, SkippedSteps(), At(3, _no_number), timeout_s=_RUN_S
    )
    for result in results:
        assert result.skipped_steps == [(3, "the norm of the gradient is nan")]
        assert result.steps == 8
        assert result.validation_loss < 2.5


def test_a_run_that_only_skips_ends_on_every_rank(tmp_path, world2):
    callbacks = SkippedSteps(max_in_a_row=2), At(3, _no_number, lasts=9)
    errors = world2.run(_train, _digits(tmp_path), *callbacks, timeout_s=_RUN_S)
    for error in errors:
        assert error.startswith("RuntimeError: 3 steps in a row were skipped, the last")
        assert "step 5, because the norm of the gradient is nan; resume" in error


def _exaggerate(run):
    """Let the next logits of this rank be 100 times as large."""
    handle = run.composition.model.register_forward_hook(
        lambda module, x, logits: handle.remove() or 100 * logits
    )


def test_a_spike_of_the_loss_on_one_rank_is_left_out_by_all(tmp_path, world2):
    config = _digits(tmp_path, steps=12)
    callbacks = LossSpike(window=20), At(9, _exaggerate), Again(2, _exaggerate)
    results = world2.run(_train, config, *callbacks, timeout_s=_RUN_S)
    assert results[0].skipped_steps == results[1].skipped_steps
    ((step, why),) = results[0].skipped_steps  # step 2 came before the rule starts
    assert step == 9
    assert "times the median" in why
    assert why.endswith("of 8 steps")


def test_the_rule_for_spikes_looks_back_on_steps_that_were_done():
    rule = LossSpike(factor=2, window=10)
    assert [rule._judge(loss, 0.0) for loss in (1.0, 9.0)] == [None, None]
    assert rule._judge(10.1, 0.0) is not None  # above twice the median 5.0
    assert rule._judge(10.0, 0.0) is None
    resumed = LossSpike(factor=2, window=10)
    resumed.load_state_dict(rule.state_dict())
    assert list(resumed._losses) == [1.0, 9.0, 10.0]
    assert resumed._judge(18.1, 0.0) == (
        "its loss 18.1 is 2.0 times the median 9 of 3 steps"
    )
    assert resumed._judge(float("inf"), 0.0) == "its loss is inf"
    assert list(resumed._losses) == [1.0, 9.0, 10.0]
    skipped = SkippedSteps()
    skipped.load_state_dict({"in_a_row": 4})
    assert skipped.state_dict() == {"in_a_row": 4}


def test_the_rule_for_spikes_starts_after_a_fifth_of_its_window_and_forgets():
    rule, resumed = LossSpike(window=9), LossSpike(window=9)
    assert rule._judge(4.0, 0.0) is None
    assert rule._judge(8.1, 0.0) is not None
    for _ in range(9):
        rule._judge(1.0, 0.0)
    assert rule.state_dict() == {"losses": [1.0] * 9}
    resumed.load_state_dict({"losses": [4.0] + [1.0] * 9})
    assert resumed.state_dict() == rule.state_dict()


def test_a_callback_of_an_earlier_run_starts_anew_unless_the_run_is_resumed():
    for step, losses, in_a_row in [(0, [], 0), (4, [1.0], 3)]:
        rules = []
        run = SimpleNamespace(step=step, composition=SimpleNamespace(skip_rules=rules))
        spikes, skipped = LossSpike(), SkippedSteps()
        spikes.load_state_dict({"losses": [1.0]})
        skipped.load_state_dict({"in_a_row": 3})
        for callback in (spikes, skipped):
            callback.on_start(run)
        assert spikes.state_dict() == {"losses": losses}
        assert skipped.state_dict() == {"in_a_row": in_a_row}
        assert rules == [spikes._judge]
        spikes.close()
        spikes.close()
        assert rules == []


# Silent corruption. -------------------------------------------------------------------


def test_one_flipped_bit_is_named_on_every_rank(tmp_path, world2):
    config = _digits(tmp_path, checkpoint_every=4)
    callbacks = ReplicaCheck(), At(7, _flip)
    errors = world2.run(_train, config, *callbacks, timeout_s=_RUN_S)
    for error in errors:
        assert error.startswith("RuntimeError: after step 8: the replicas have drifted")
        assert "rank 1 in " in error
    # What was saved before is sound, and what has drifted is not saved.
    assert os.listdir(tmp_path / "checkpoints") == ["step_000004"]


def test_within_a_stage_replicas_are_compared_and_ranks_of_the_job_named(
    tmp_path, world4
):
    config = _digits(tmp_path, dp=2, pp=2)
    callbacks = ReplicaCheck(every=2), At(1, _flip, rank=3)
    errors = world4.run(_train, config, *callbacks, timeout_s=_RUN_S)
    assert len(set(errors)) == 1
    assert "after step 2 of ranks [2, 3]: the replicas have drifted" in errors[0]


def test_a_run_without_replicas_is_refused(tmp_path):
    error = _train(_digits(tmp_path), ReplicaCheck(every=2))
    assert error.startswith("ValueError: dp=1 leaves one copy of each parameter")


def test_a_check_needs_to_know_when(tmp_path, world2):
    errors = world2.run(_train, _digits(tmp_path), ReplicaCheck(), timeout_s=_RUN_S)
    for error in errors:
        assert error.startswith("ValueError: checkpoint_every=0 does not say how often")


# Stragglers. --------------------------------------------------------------------------


def _times(config, slow_s):
    stragglers = Stragglers(window=3)
    _train(config, stragglers, At(1, lambda run: time.sleep(slow_s), lasts=6))
    return stragglers.found, stragglers.own_s


def test_a_slow_rank_is_named_and_not_those_that_wait_for_it(tmp_path, world2):
    slow_s = 0.4
    for found, own_s in world2.run(_times, _digits(tmp_path), slow_s, timeout_s=_RUN_S):
        assert [(it.rank, it.last_step) for it in found] == [(1, 3), (1, 6)]
        assert own_s[0] < slow_s / 2 < slow_s <= own_s[1]
        assert all(it.own_s >= slow_s for it in found)


def test_a_straggler_in_words():
    straggler = Straggler(rank=3, last_step=100, own_s=0.05, usual_s=0.02)
    assert str(straggler) == (
        "rank 3 is a straggler: it works 2.5 times as long on a step as its peers "
        "(50.0 ms, usual 20.0 ms, up to step 100)"
    )


# Stalls. ------------------------------------------------------------------------------


def _hang(run):
    time.sleep(6)  # in which no step ends
    told = run.config.out / "heartbeat" / "stall.txt"
    told.rename(run.config.out / f"after_step_{run.step}.txt")


def _stop(run):
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_rank_that_hangs_is_named_with_its_stack(tmp_path, world2):
    beat = Heartbeat(stall_s=1.5, every_s=0.5)
    faults = At(3, _hang), Again(6, _hang)
    results = world2.run(_train, _digits(tmp_path), beat, *faults, timeout_s=_RUN_S)
    assert [result.steps for result in results] == [8, 8]  # it is only told
    again = (tmp_path / "after_step_5.txt").read_text()
    assert "for 1.5 s after step 5; rank 1 (pid " in again
    text = (tmp_path / "after_step_2.txt").read_text()
    assert "no step has ended for 1.5 s after step 2; rank 1 (pid " in text
    assert "is suspected (an inference): it ran outside collectives" in text
    assert "(rank 0: waited in " in text
    assert "time.sleep(6)" in text


def test_a_stopped_rank_is_named_and_killed(tmp_path, world2):
    beat = Heartbeat(stall_s=1.5, every_s=0.5, ends_job=True)
    with pytest.raises(lab.RankError) as info:
        world2.run(_train, _digits(tmp_path), beat, At(3, _stop), timeout_s=_RUN_S)
    assert info.value.rank == 1
    assert "SIGKILL" in str(info.value)
    text = (tmp_path / "heartbeat" / "stall.txt").read_text()
    assert "no step has ended for 1.5 s after step 2; rank 1 (pid " in text
    assert "it gives no sign of life, so its process is stopped or gone" in text


# Bad input. ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SkippedSteps(max_in_a_row=0), "max_in_a_row=0"),
        (lambda: LossSpike(factor=1.0), r"factor=1.0 must be above 1"),
        (lambda: LossSpike(factor=float("nan")), "factor=nan must be above 1"),
        (lambda: LossSpike(window=4), "window=4"),
        (lambda: ReplicaCheck(every=0), "every=0 is too small"),
        (lambda: Stragglers(factor=0.5), "factor=0.5 must be above 1"),
        (lambda: Stragglers(window=0), "window=0"),
        (lambda: Heartbeat(stall_s=2.0, every_s=1.0), "shorter than 3 beats"),
        (lambda: Heartbeat(every_s=0.0), "shorter than 3 beats"),
    ],
)
def test_impossible_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()
