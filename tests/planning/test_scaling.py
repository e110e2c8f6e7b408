import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labpkg.planning.scaling import (
    DividedWork,
    littles_law,
    model_flops_utilization,
    palm_flops_per_token,
    parallel_efficiency,
)
from labpkg.planning.shapes import ModelShape

seconds = st.floats(1e-6, 1e6)
ranks = st.integers(1, 16384)


def test_amdahl_s_own_numbers():
    work = DividedWork(serial_s=5, divided_s=95)
    assert work.serial_fraction == 0.05
    assert work.max_speedup == 20
    assert round(work.speedup(64), 1) == 15.4
    assert round(work.scaled_speedup(64), 2) == 60.85


@given(seconds, seconds, ranks)
def test_both_laws_are_their_formulas(serial_s, divided_s, n):
    work = DividedWork(serial_s=serial_s, divided_s=divided_s)
    s = Fraction(serial_s) / (Fraction(serial_s) + Fraction(divided_s))
    assert work.speedup(n) == pytest.approx(float(1 / (s + (1 - s) / n)), rel=1e-9)
    assert work.scaled_speedup(n) == pytest.approx(float(s + (1 - s) * n), rel=1e-9)
    assert work.speedup(1) == work.scaled_speedup(1) == 1
    nearly = 1 + 1e-9
    assert work.speedup(n) <= min(n, work.max_speedup, work.scaled_speedup(n)) * nearly
    own = parallel_efficiency(work.time_s(1), work.time_s(n), n)
    assert own == pytest.approx(work.speedup(n) / n)
    assert own <= nearly


@given(seconds, seconds, st.sets(ranks, min_size=2, max_size=5))
def test_a_fit_finds_the_job_behind_exact_times(serial_s, divided_s, numbers):
    work = DividedWork(serial_s=serial_s, divided_s=divided_s)
    fitted = DividedWork.fit({n: work.time_s(n) for n in numbers})
    for n in numbers:
        assert fitted.time_s(n) == pytest.approx(work.time_s(n), rel=1e-6)


def test_two_times_give_the_serial_fraction_of_karp_and_flatt():
    fitted = DividedWork.fit({1: 10.0, 2: 6.0})
    speedup = 10 / 6
    assert fitted.serial_fraction == pytest.approx((1 / speedup - 1 / 2) / (1 - 1 / 2))
    assert (fitted.time_s(1), fitted.time_s(2)) == pytest.approx((10, 6))


def test_more_than_perfect_times_leave_no_serial_part():
    fitted = DividedWork.fit({1: 10.0, 2: 4.0})
    assert fitted.serial_s == 0
    assert fitted.max_speedup == math.inf
    assert fitted.speedup(2) == 2


def test_slower_with_more_ranks_leaves_nothing_to_divide():
    fitted = DividedWork.fit({1: 1.0, 2: 3.0})
    assert (fitted.divided_s, fitted.speedup(1000)) == (0, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DividedWork(serial_s=-1, divided_s=1), "serial_s=-1 and"),
        (lambda: DividedWork(serial_s=0, divided_s=0), "not both 0"),
        (lambda: DividedWork(serial_s=math.nan, divided_s=1), "must be finite"),
        (lambda: DividedWork(serial_s=1, divided_s=math.inf), "divided_s=inf must be"),
        (lambda: DividedWork.fit({1: 1.0}), "two numbers of ranks"),
        (lambda: DividedWork.fit({0: 1.0, 2: 1.0}), "n=0 ranks"),
        (lambda: DividedWork.fit({1: 1.0, 2: 0.0}), "seconds=0.0 must be positive"),
        (lambda: DividedWork(serial_s=1, divided_s=1).speedup(0), "n=0 ranks"),
        (lambda: DividedWork(serial_s=1, divided_s=1).scaled_speedup(0), "n=0 ranks"),
        (lambda: parallel_efficiency(0, 1, 2), "one_s=0"),
        (lambda: parallel_efficiency(1, 0, 2), "many_s=0"),
        (lambda: parallel_efficiency(1, 1, 0), "n=0 ranks"),
        (lambda: littles_law(-1, 1), "throughput_per_s=-1"),
        (lambda: littles_law(1, 0), "latency_s=0"),
        (lambda: littles_law(1, math.inf), "latency_s=inf must be positive and finite"),
    ],
)
def test_impossible_numbers_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


PALM = {"num_parameters": 1, "num_layers": 1, "width": 1, "sequence_length": 1}
MFU = {"tokens_per_s": 1, "flops_per_token": 1, "peak_flops": 1}


@pytest.mark.parametrize(
    ("formula", "values", "name"),
    [(palm_flops_per_token, PALM, name) for name in PALM]
    + [(model_flops_utilization, MFU, name) for name in MFU],
)
def test_each_factor_must_be_positive(formula, values, name):
    assert formula(**values) > 0
    with pytest.raises(ValueError, match=f"{name}=0 must be positive"):
        formula(**{**values, name: 0})


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.01, 100)), min_size=1))
def test_little_s_law_holds_for_every_order_of_visits(visits):
    visits = [(come, come + stay) for come, stay in visits]
    start, end = min(a for a, _ in visits), max(b for _, b in visits)
    times = sorted({t for visit in visits for t in visit})
    area = math.fsum(
        (t1 - t0) * sum(a <= t0 and t1 <= b for a, b in visits)
        for t0, t1 in itertools.pairwise(times)
    )
    throughput = len(visits) / (end - start)
    latency = math.fsum(b - a for a, b in visits) / len(visits)
    assert littles_law(throughput, latency) == pytest.approx(area / (end - start))


MEGATRON = [  # layers, width, heads, GPUs, batch, seconds per iteration, MFU in percent
    (48, 6144, 64, 8, 4, 1.10, 41.5),
    (96, 12288, 96, 64, 64, 13.75, 51.4),
    (105, 20480, 128, 280, 280, 37.83, 56.0),
    (128, 25600, 160, 512, 512, 71.49, 56.3),
]


@pytest.mark.parametrize("row", MEGATRON, ids=lambda row: f"{row[3]} GPUs")
def test_published_utilisations_of_matrix_products(row):
    """Korthikanti et al. 2022, arXiv:2205.05198, table 5; A100, vocabulary 51,200."""
    num_layers, width, num_heads, num_gpus, batch, iteration_s, percent = row
    shape = ModelShape(
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        ffn_width=4 * width,
        vocab_size=51200,
        sequence_length=2048,
        tied=True,
        gated_mlp=False,
    )
    mfu = model_flops_utilization(
        batch * 2048 / iteration_s,
        flops_per_token=shape.flops_per_token,
        peak_flops=num_gpus * 312e12,
    )
    assert 100 * mfu == pytest.approx(percent, abs=0.2)


@pytest.mark.parametrize(
    ("layers", "width", "length", "num_parameters", "tokens_per_s", "percent"),
    [
        (32, 4096, 2048, 6658859008, 4641, 64.23),
        (40, 5120, 32768, 13011240960, 1016, 51.69),
        (80, 8192, 2048, 64862437376, 410, 53.33),
    ],
)
def test_published_utilisations_of_6n(
    layers, width, length, num_parameters, tokens_per_s, percent
):
    """MosaicML, llm-foundry, scripts/train/benchmarking; A100 80GB, FSDP."""
    flops = palm_flops_per_token(
        num_parameters, num_layers=layers, width=width, sequence_length=length
    )
    mfu = model_flops_utilization(
        tokens_per_s, flops_per_token=flops, peak_flops=312e12
    )
    assert 100 * mfu == pytest.approx(percent, abs=0.2)
