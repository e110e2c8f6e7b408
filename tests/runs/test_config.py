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


def test_configurations_need_no_torch():
    code = (
        "import labpkg.runs.config, labpkg.__main__, sys; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
