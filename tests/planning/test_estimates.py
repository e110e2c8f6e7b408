"""An estimate joins what time and memory predict."""

from dataclasses import replace

import pytest

from labpkg.planning.configuration import Configuration
from labpkg.planning.estimates import estimate
from labpkg.planning.hardware import find_hardware
from labpkg.planning.memory import peak_memory, usable_bytes
from labpkg.planning.models import find_model
from labpkg.planning.step_time import step_time

H100 = find_hardware("h100")
JOB = Configuration(
    model=find_model("llama2-7b"), nodes=2, dp=8, tp=2, zero=1, grad_accum_steps=4
)


def test_an_estimate_holds_both_predictions():
    own = estimate(JOB, H100)
    assert own.step_s == pytest.approx(step_time(JOB, H100).seconds)
    assert own.memory_bytes == pytest.approx(peak_memory(JOB).num_bytes)
    assert own.tokens_per_s_per_gpu * own.step_s * 16 == pytest.approx(8 * 4 * 4096)


def test_utilisation_counts_six_flops_for_each_parameter_and_attention():
    own = estimate(JOB, H100)
    flops = 6 * 6_738_415_616 + 12 * 32 * 4096 * 4096
    assert own.mfu == pytest.approx(own.tokens_per_s_per_gpu * flops / 989.4e12)
    assert 0.2 < own.mfu < 0.6


def test_recomputation_does_not_count_as_useful_work():
    again = estimate(replace(JOB, recompute="full"), H100)
    assert again.mfu < 0.85 * estimate(JOB, H100).mfu


def test_a_job_fits_up_to_the_last_usable_byte():
    needed = peak_memory(JOB).num_bytes
    share = usable_bytes(H100) / H100.memory_bytes
    for bytes_, fits in ((1.0001 * needed, True), (0.9999 * needed, False)):
        own = estimate(JOB, replace(H100, memory_bytes=bytes_ / share))
        assert own.usable_bytes == pytest.approx(bytes_)
        assert own.fits == fits
