"""The laws of a run: ranks, kills and precision change nothing that they should not."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import labpkg as lab
from labpkg.processes import collectives
from labpkg.runs import checkpoint, checkpoint_files, checkpoint_folder, tasks, trainer
from labpkg.runs.checkpoint_lock import claim_folder
from labpkg.runs.config import TrainConfig
from labpkg.runs.start import set_aside
from labpkg.runs.trainer import Trainer, check_config

_RUN_S = 110  # a World's limit: the machine may be busy


def _digits(out, **options):
    defaults = {"steps": 12, "global_batch_size": 16, "checkpoint_every": 0}
    return TrainConfig(data="digits", out=out, **{**defaults, **options})


def _text(tmp_path, out, **options):
    file = tmp_path / "text"
    if not file.exists():
        file.write_bytes((b"for line in lines:\n    print(line)\n" * 400)[:12_000])
    defaults = {"steps": 3, "global_batch_size": 3, "checkpoint_every": 0}
    return TrainConfig(data=str(file), out=out, **{**defaults, **options})


def _run(config):
    return Trainer(config).run()


def _run_off(config):
    with collectives.off():
        return Trainer(config).run()


def _weights(result):
    return lab.export_state_dict(result.checkpoint)


def _distance(a, b):
    """Relative norm of the difference of two sets of weights."""
    a, b = _weights(a), _weights(b)
    assert a.keys() == b.keys()
    difference = sum((a[k].double() - b[k].double()).pow(2).sum() for k in a)
    return (difference / sum(b[k].double().pow(2).sum() for k in b)).sqrt().item()


def test_the_loss_falls_and_beats_the_baseline(tmp_path):
    result = _run(_digits(tmp_path, steps=150, global_batch_size=64))
    losses = [loss for _, loss in result.history]
    assert losses[0] == pytest.approx(2.3, abs=0.2)
    assert losses[-1] < 0.4
    assert result.validation_loss < 0.5 < result.baseline_loss
    assert (result.num_ranks, result.backend, result.device) == (1, "gloo", "CPU")
    text = str(result)
    assert "(beaten)" in text
    assert "Ran mlp (2,410 parameters) on 1 ranks, gloo, CPU, fp32: " in text
    assert text.endswith(" samples/s.")
    assert any(
        name.startswith("events") for name in os.listdir(tmp_path / "tensorboard")
    )


def test_two_ranks_end_with_the_weights_of_one_and_need_to_communicate(
    tmp_path, world2
):
    # Three samples on two ranks: the shards are uneven.
    one = _run(_text(tmp_path, tmp_path / "one", precision="fp64"))
    config = _text(tmp_path, tmp_path / "two", precision="fp64")
    two = world2.run(_run, config, timeout_s=_RUN_S)[0]
    assert (one.num_ranks, two.num_ranks) == (1, 2)
    assert _distance(two, one) < 1e-12
    assert two.validation_loss == pytest.approx(one.validation_loss, rel=1e-12)
    assert [s for s, _ in two.history] == [s for s, _ in one.history]
    for (_, a), (_, b) in zip(two.history, one.history, strict=True):
        assert a == pytest.approx(b, rel=1e-12)
    assert two.sample == one.sample != ""
    off = replace(config, out=tmp_path / "off")
    alone = world2.run(_run_off, off, timeout_s=_RUN_S)[0]
    assert _distance(alone, one) > 1e-9


def test_two_ranks_train_the_digits_like_one(tmp_path, world2):
    options = {"precision": "fp64", "steps": 20, "global_batch_size": 17}
    one = _run(_digits(tmp_path / "one", **options))
    two = world2.run(_run, _digits(tmp_path / "two", **options), timeout_s=_RUN_S)[0]
    assert _distance(two, one) < 1e-12


_LAYOUTS = {
    "dp2_tp2_zero2": {"dp": 2, "tp": 2, "zero": 2, "grad_accum": 2},
    "pp2_dp2_zero1": {"pp": 2, "dp": 2, "zero": 1, "async_save": True},
    "pp2_tp2_zb": {"pp": 2, "tp": 2, "schedule": "zb-h1", "recompute": True},
    "dp4_zero3": {"dp": 4, "zero": 3, "recompute": True},
}


def _run_all(configs):
    return [Trainer(config).run() for config in configs]


def test_every_layout_ends_with_the_weights_of_one_rank(tmp_path, world4):
    options = {"precision": "fp64", "checkpoint_every": 5}
    one = _run(_digits(tmp_path / "one", **options))
    configs = [
        _digits(tmp_path / name, **options, **layout)
        for name, layout in _LAYOUTS.items()
    ]
    # Each goes on from the middle of the run that stands before it.
    resumed = [
        replace(
            config,
            out=tmp_path / f"{name}_resumed",
            resume=str(tmp_path / before / "checkpoints" / "step_000005"),
        )
        for config, name, before in zip(
            configs, _LAYOUTS, [*list(_LAYOUTS)[-1:], *_LAYOUTS], strict=False
        )
    ]
    results = world4.run(_run_all, configs + resumed, timeout_s=_RUN_S)
    for result in results[0]:
        assert _distance(result, one) < 1e-12, result.layout
        assert result.validation_loss == pytest.approx(one.validation_loss, rel=1e-12)
        assert (result.num_ranks, result.num_parameters) == (4, one.num_parameters)
    assert [r.layout for r in results[0][:2]] == [
        "dp2 tp2 zero2 accumulate 2",
        "pp2 dp2 zero1 1f1b",
    ]
    assert all(r.resumed_from and r.history[0][0] == 6 for r in results[3][4:])


def _short_samples(configs):
    tasks._SAMPLE_TOKENS = 8
    return _run_all(configs)


def test_a_language_model_writes_the_same_under_every_layout(
    tmp_path, world4, monkeypatch
):
    monkeypatch.setattr(tasks, "_SAMPLE_TOKENS", 8)
    options = {"precision": "fp64", "steps": 1, "global_batch_size": 4}
    layouts = [
        {"pp": 2, "tp": 2, "num_micro_batches": 2},
        {"dp": 2, "tp": 2, "zero": 1, "sequence_parallel": True},
    ]
    configs = [
        _text(tmp_path, tmp_path / str(number), **options, **layout)
        for number, layout in enumerate(layouts)
    ]
    results = world4.run(_short_samples, configs, timeout_s=_RUN_S)
    one = _run(_text(tmp_path, tmp_path / "one", **options))
    assert len(one.sample) >= 8
    for on_rank in results:
        for result in on_rank:
            assert result.sample == one.sample
            assert result.validation_loss == pytest.approx(
                one.validation_loss, rel=1e-12
            )


def test_a_resumed_run_in_fp16_keeps_its_loss_scale(tmp_path):
    config = _digits(tmp_path, precision="fp16", checkpoint_every=5)
    expected = _weights(_run(config))
    manifest = lab.verify_checkpoint(tmp_path / "checkpoints" / "step_000005")
    assert manifest.state["loss_scale"]["num_good_steps"] <= 5
    shutil.rmtree(tmp_path / "checkpoints" / "step_000012")
    again = _weights(_run(replace(config, resume="auto")))
    assert all(torch.equal(again[k], expected[k]) for k in expected)


def test_all_ranks_hear_of_a_refusal_of_the_first(tmp_path, world2):
    config = _digits(tmp_path, resume="newest")
    answers = world2.run(_refused, config, timeout_s=_RUN_S)
    assert answers[0] == answers[1]
    assert "has no checkpoint to resume from" in answers[0]


def _refused(config):
    try:
        Trainer(config).run()
    except ValueError as error:
        return str(error)


def test_a_folder_belongs_to_one_job_at_a_time(tmp_path):
    config = _digits(tmp_path)
    _run(config)
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        with claim_folder(tmp_path / "checkpoints"):
            lock = json.loads((tmp_path / "checkpoints" / ".lock").read_text())
        started = Path(f"/proc/{sleeper.pid}/stat").read_text().rpartition(")")[2]
        lock |= {"pid": sleeper.pid, "started": started.split()[19]}
        (tmp_path / "checkpoints" / ".lock").write_text(json.dumps(lock))
        for start in (_run, check_config):
            with pytest.raises(
                ValueError, match=f"is written to by process {sleeper.pid}"
            ):
                start(config)
    finally:
        sleeper.kill()
        sleeper.wait()
    assert not (tmp_path / "previous").exists()
    _run(config)  # and the lock of a dead process is none


def test_a_resumed_run_equals_an_undisturbed_one_bit_by_bit(tmp_path, world2):
    config = _digits(tmp_path, checkpoint_every=5)
    whole = world2.run(_run, config, timeout_s=_RUN_S)[0]
    expected = _weights(whole)
    assert whole.resumed_from is None
    shutil.rmtree(tmp_path / "checkpoints" / "step_000012")
    resumed = replace(config, resume="newest")
    second = world2.run(_run, resumed, timeout_s=_RUN_S)[0]
    assert second.resumed_from == str(tmp_path / "checkpoints" / "step_000010")
    assert second.history == [pair for pair in whole.history if pair[0] > 10]
    assert second.validation_loss == whole.validation_loss
    again = _weights(second)
    assert all(torch.equal(again[k], expected[k]) for k in expected)


def _verified_files(config):
    """How many files of checkpoints this rank verifies."""
    verify, names = checkpoint_files.verify_files, []

    def counting(path, files):
        names.extend(files)
        return verify(path, files)

    for module in (checkpoint, checkpoint_folder):
        module.verify_files = counting  # pyright: ignore[reportAttributeAccessIssue]
    try:
        Trainer(config).run()
    finally:
        for module in (checkpoint, checkpoint_folder):
            module.verify_files = verify  # pyright: ignore
    return len(names)


def test_resuming_ranks_verify_each_file_once_together(tmp_path, world2):
    config = _digits(tmp_path)
    world2.run(_run, config, timeout_s=_RUN_S)
    resumed = replace(config, resume="newest")
    counts = world2.run(_verified_files, resumed, timeout_s=_RUN_S)
    assert counts == [4 + 2, 2]  # rank 0 chooses before all load what each has written


def test_a_run_may_resume_on_another_number_of_ranks(tmp_path, world2):
    config = _digits(tmp_path, checkpoint_every=5, precision="fp64")
    whole = world2.run(_run, config, timeout_s=_RUN_S)[0]
    halfway = str(tmp_path / "checkpoints" / "step_000005")
    one = _run(replace(config, resume=halfway, out=tmp_path / "one"))
    assert one.resumed_from == halfway
    assert _distance(one, whole) < 1e-12


def test_the_checkpoint_to_resume_from_is_named_and_so_are_those_passed_over(
    tmp_path, capfd
):
    config = _digits(tmp_path, checkpoint_every=5)
    _run(config)
    name = "training-00000-0.safetensors"
    (tmp_path / "checkpoints" / "step_000012" / name).write_bytes(b"short")
    result = _run(replace(config, resume="newest"))
    error = capfd.readouterr().err
    assert "Skipped: " in error
    assert f"step_000012 is not a usable checkpoint: {name} has 5 bytes" in error
    assert f"Resumed from {result.resumed_from}." in error


def test_a_restarted_rank_resumes_by_itself_and_starts_afresh_without_checkpoint(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    config = _digits(tmp_path, checkpoint_every=5)
    assert _run(config).resumed_from is None
    second = _run(config)
    assert second.resumed_from == str(tmp_path / "checkpoints" / "step_000012")
    assert second.history == []


def test_a_fresh_run_moves_the_earlier_one_out_of_the_way(tmp_path, capfd):
    _run(_digits(tmp_path, steps=9))
    _run(_digits(tmp_path, steps=3))
    assert os.listdir(tmp_path / "checkpoints") == ["step_000003"]
    assert os.listdir(tmp_path / "previous" / "checkpoints") == ["step_000009"]
    assert "Moved the earlier run" in capfd.readouterr().err


def test_a_restart_before_the_first_checkpoint_leaves_the_earlier_run(
    tmp_path, monkeypatch
):
    _run(_digits(tmp_path, steps=9))
    set_aside(_digits(tmp_path))  # the attempt that was killed got as far as this
    (tmp_path / "tensorboard").mkdir()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert _run(_digits(tmp_path, steps=3)).resumed_from is None
    assert os.listdir(tmp_path / "checkpoints") == ["step_000003"]
    assert os.listdir(tmp_path / "previous" / "checkpoints") == ["step_000009"]


def test_a_run_that_is_complete_elsewhere_is_saved_here_too(tmp_path):
    first = _run(_digits(tmp_path / "there", steps=2))
    here = _run(_digits(tmp_path / "here", steps=2, resume=first.checkpoint))
    assert (here.history, here.first_step_time) == ([], None)
    assert here.checkpoint == str(tmp_path / "here" / "checkpoints" / "step_000002")
    assert here.sample == ""  # this model writes no text
    assert _distance(here, first) == 0
    assert here.validation_loss == first.validation_loss


def test_the_first_and_the_last_step_are_reported_whatever_lies_between(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(trainer, "_NUM_REPORTS", 2)
    result = _run(_digits(tmp_path, steps=5))
    assert [step for step, _ in result.history] == [1, 2, 4, 5]


def test_bf16_trains_close_to_fp32(tmp_path):
    full = _run(_digits(tmp_path / "full", steps=40))
    mixed = _run(_digits(tmp_path / "mixed", steps=40, precision="bf16"))
    assert mixed.precision == "bf16"
    assert 0 < abs(mixed.validation_loss - full.validation_loss) < 0.1
    assert {t.dtype for t in _weights(mixed).values()} == {torch.float32}


def test_a_run_leaves_the_process_as_it_found_it(tmp_path):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    _run(_digits(tmp_path, steps=2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_default_device() == torch.device("cpu")
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match="dp=2"):
        _run(_digits(tmp_path, steps=2, dp=2))
    assert not dist.is_initialized()


def _data_parallel_traffic(config):
    with lab.count_comms() as log:
        Trainer(config).run()
    return log["dp", "all_reduce"].payload_bytes


def test_each_step_all_reduces_the_gradients_once(tmp_path, world2):
    counts = {}
    for steps in (10, 20):
        config = _digits(tmp_path / str(steps), steps=steps)
        counts[steps] = world2.run(_data_parallel_traffic, config, timeout_s=_RUN_S)[1]
    model = lab.MLP(64, 32, 10)
    loss_bytes = 10 * 4  # of the mean loss, which every step reports
    expected = 10 * lab.data_parallel_bytes(model) + loss_bytes
    assert counts[20] - counts[10] == expected


# What is refused before any rank starts. ------------------------------------------


def test_check_config_resolves_what_it_accepts(tmp_path):
    config = check_config(_digits(tmp_path / "new" / "folder", device="cpu"))
    assert (config.dp, config.precision, config.model) == (2, "fp32", "mlp")
    assert os.listdir(tmp_path / "new" / "folder") == []


def test_more_gpus_than_there_are(tmp_path):
    too_many = torch.cuda.device_count() + 1
    config = _digits(tmp_path, device="cuda", dp=too_many)
    with pytest.raises(ValueError, match=f"needs {too_many} GPUs, but torch sees"):
        check_config(config)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written to"):
        check_config(_digits(tmp_path / "file" / "out"))


def test_a_text_that_is_too_short(tmp_path):
    (tmp_path / "short").write_text("short")
    config = TrainConfig(data=str(tmp_path / "short"), out=tmp_path)
    with pytest.raises(ValueError, match="too short for one window"):
        check_config(config)


def test_a_checkpoint_of_another_run_names_the_first_difference(tmp_path):
    _run(_digits(tmp_path))
    for options, difference in (
        ({"seed": 3}, "seed is 0 there and 3 here"),
        ({"lr": 0.5}, "lr is 0.01 there and 0.5 here"),
        ({"steps": 13}, "steps is 12 there and 13 here"),
        ({"precision": "fp64"}, "precision is 'fp32' there and 'fp64' here"),
    ):
        config = _digits(tmp_path, resume="newest", **options)
        with pytest.raises(ValueError, match=difference):
            check_config(config)
        with pytest.raises(ValueError, match=difference):
            _run(config)


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(ValueError, match="has no checkpoint to resume from"):
        check_config(_digits(tmp_path, resume="newest"))
    with pytest.raises(ValueError, match="not a usable checkpoint"):
        check_config(_digits(tmp_path, resume=str(tmp_path)))
