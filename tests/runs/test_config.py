"""Configurations are checked in one line."""

import subprocess
import sys
from dataclasses import replace

import pytest

from labpkg.runs.config import MODELS, TrainConfig, first_difference


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dp": 0}, "dp=0 is too small; choose 1 or more"),
        ({"steps": 0}, "steps=0 is too small"),
        ({"global_batch_size": 0}, "global_batch_size=0 is too small"),
        ({"seed": -1}, "seed=-1 is too small; choose 0 or more"),
        ({"checkpoint_every": -1}, "checkpoint_every=-1 is too small"),
        ({"model": "gpt-1t"}, "model='gpt-1t' is unknown; choose gpt-1m or gpt-10m or"),
        ({"precision": "fp8"}, "precision='fp8' is unknown; choose fp32 or bf16"),
        ({"device": "tpu"}, "device='tpu' is unknown; choose cpu or cuda"),
        ({"lr": 0.0}, "lr=0.0 must be a positive number"),
        ({"lr": float("nan")}, "lr=nan must be a positive number"),
        ({"dp": 4, "global_batch_size": 3}, "choose 4 or more"),
        ({"tp": 0}, "tp=0 is too small; choose 1 or more"),
        ({"zero": 4}, "zero=4 is no stage of ZeRO; choose 0, 1, 2, 3"),
        ({"schedule": "1g1b"}, "schedule='1g1b' is unknown; choose gpipe, 1f1b"),
        ({"num_micro_batches": 4}, "needs a pipeline"),
        ({"grad_accum": 0}, "grad_accum=0 is too small"),
        ({"keep": -1}, "keep=-1 is too small; choose 0 or more"),
        ({"clip": 0.0}, "clip=0.0 must be a positive number; choose e.g. 1.0"),
        ({"dp": 2, "grad_accum": 5}, "grad_accum = 10 passes without a sample"),
        ({"pp": 2, "dp": 3}, "num_micro_batches = 12, .* choose a multiple of 12"),
        ({"data": "mnist"}, "data='mnist' is neither digits nor stdlib nor a file"),
        ({"data": "digits", "model": "gpt-1m"}, "choose model='mlp'"),
        ({"model": "mlp"}, "choose model='gpt-1m'"),
    ],
)
def test_impossible_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        TrainConfig(**options)
    assert "\n" not in str(caught.value)


def test_resolved_leaves_nothing_to_choose():
    config = TrainConfig().resolved(dp=2, device="cpu")
    assert (config.model, config.precision, config.dp) == ("gpt-1m", "fp32", 2)
    assert config.lr == MODELS["gpt-1m"].lr
    assert TrainConfig().resolved(dp=1, device="cuda").precision == "bf16"
    assert TrainConfig(data="digits").resolved(dp=1, device="cpu").model == "mlp"
    with pytest.raises(ValueError, match="without a sample"):
        TrainConfig(global_batch_size=2).resolved(dp=3, device="cpu")


def test_the_number_of_ranks_does_not_change_the_identity_but_the_seed_does(tmp_path):
    config = TrainConfig(out=tmp_path).resolved(dp=2, device="cpu")
    own = config.identity("abc")
    assert first_difference(replace(config, dp=4).identity("abc"), own) is None
    other = replace(config, seed=1).identity("abc")
    assert first_difference(other, own) == "seed is 1 there and 0 here"
    changed = first_difference(config.identity("def"), own)
    assert changed == "data is 'stdlib:def' there and 'stdlib:abc' here"
    assert first_difference({**own, "extra": 1}, own) == (
        "extra is 1 there and None here"
    )


def test_the_layout_of_a_run():
    config = TrainConfig(
        pp=2, tp=2, zero=1, grad_accum=2, recompute=True, global_batch_size=16
    )
    assert str(config.layout) == "pp2 tp2 zero1 1f1b accumulate 2 recompute"
    assert config.dp_of(8) == 2
    resolved = config.resolved(dp=config.dp_of(4), device="cpu")
    assert resolved.layout.world_size == 4
    for num_ranks in (2, 6):
        with pytest.raises(ValueError, match=f"but there are {num_ranks} ranks"):
            config.dp_of(num_ranks)
    with pytest.raises(ValueError, match=r"pp=2 \* dp=2 \* tp=2 = 8, but there are 4"):
        replace(config, dp=2).dp_of(4)


def test_the_layout_does_not_change_the_identity_but_clipping_does(tmp_path):
    config = TrainConfig(out=tmp_path, global_batch_size=16)
    own = config.resolved(dp=2, device="cpu").identity("abc")
    cut = replace(config, pp=2, tp=2, zero=1, schedule="zb-h1", recompute=True, keep=1)
    assert cut.resolved(dp=2, device="cpu").identity("abc") == own
    other = replace(config, clip=None).resolved(dp=2, device="cpu").identity("abc")
    assert first_difference(other, own) == "clip is None there and 1.0 here"


def test_configurations_need_no_torch():
    code = (
        "import labpkg.runs.config, labpkg.__main__, sys; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
