"""The time of a step: against the simulator and exact counts, and what is monotone."""

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from labpkg.planning.configuration import Configuration
from labpkg.planning.constants import FITTED, Constants, constant_ranges
from labpkg.planning.hardware import HARDWARE
from labpkg.planning.layout import SCHEDULES
from labpkg.planning.models import find_model
from labpkg.planning.shapes import ModelShape
from labpkg.planning.simulator import StageCost, simulate
from labpkg.planning.step_time import layer_seconds, step_time

H100 = HARDWARE["h100"]
LLAMA = find_model("llama2-70b")


def small(**sizes):
    chosen = {
        "num_layers": 16,
        "width": 2048,
        "num_heads": 16,
        "num_kv_heads": 16,
        "ffn_width": 8192,
        "vocab_size": 256,
        "sequence_length": 4096,
        "tied": True,
        "gated_mlp": True,
    } | sizes
    return ModelShape(**chosen)


def seconds(configuration, hardware=H100, constants=FITTED):
    return step_time(configuration, hardware, constants).seconds


def term(configuration, name, hardware=H100, constants=FITTED):
    found = step_time(configuration, hardware, constants).terms
    return sum(entry.value for entry in found if entry.name == name)


def job(nodes=1, **options):
    gpus = options.setdefault("gpus_per_node", 8) * nodes
    others = math.prod(options.get(axis, 1) for axis in ("tp", "pp", "cp"))
    return Configuration(nodes=nodes, dp=gpus // others, **options)


# Computes and does nothing else: no overheads, no traffic.
FREE = replace(
    H100,
    power_limited=False,
    memory_bytes_per_s=1e30,
    node_bytes_per_s=1e30,
    network_bytes_per_s={2: 1e30},
    node_latency_s=1e-30,
    network_latency_s=1e-30,
)
IDEAL = replace(FITTED, attention_efficiency=1.0, launch_s=5e-4)


def test_products_alone_take_the_exact_flops():
    model = small(num_layers=4, vocab_size=4096)
    found = job(model=model, gpus_per_node=1, micro_batch_size=2, grad_accum_steps=3)
    rate = FREE.matmul_fraction * FREE.peak_flops["bf16"]
    exact = model.flops_per_token * found.tokens_per_step / rate
    assert math.isclose(seconds(found, FREE, IDEAL), exact, rel_tol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    P=st.integers(2, 6),
    M=st.integers(1, 14),
    v=st.integers(1, 3),
)
def test_the_bubble_of_equal_stages_is_that_of_the_simulator(schedule, P, M, v):
    assume(v == 1 or schedule == "interleaved")
    # No attention scores to speak of: then I and W take as long as F.
    model = small(num_layers=6 * P, sequence_length=2, width=8192)
    found = Configuration(
        model=model,
        nodes=P,
        gpus_per_node=1,
        pp=P,
        micro_batch_size=2**14,
        grad_accum_steps=M,
        num_virtual_stages=v,
        schedule=schedule,
    )
    plan = SCHEDULES[schedule](P, M, v)
    simulated = simulate(plan, StageCost(backward_s=2.0)).makespan_s
    ratio = simulated / (3 * M * plan.num_stages / P)
    predicted = seconds(found, FREE, IDEAL)
    busy = term(found, "matrix products", FREE, IDEAL)
    assert math.isclose(predicted / busy, ratio, rel_tol=0.02)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0.5, 2), min_size=2, max_size=6),
    st.integers(1, 12),
)
def test_the_closed_form_is_an_upper_bound_for_unequal_stages(paces, M):
    # The closed form: M passes of the slowest stage and one of each other.
    closed = 3 * (M * max(paces) + sum(paces) - max(paces))
    costs = [StageCost(forward_s=pace, backward_s=2 * pace) for pace in paces]
    simulated = simulate(SCHEDULES["1f1b"](len(paces), M, 1), costs).makespan_s
    assert 0.6 * closed < simulated <= closed * (1 + 1e-9)


JOBS = st.builds(
    lambda tp, pp, cp, dp, **others: Configuration(
        model=small(num_layers=24, num_heads=32, width=4096, vocab_size=32000),
        nodes=max(1, tp * pp * cp * dp // 8),
        gpus_per_node=min(8, tp * pp * cp * dp),
        tp=tp,
        pp=pp,
        cp=cp,
        dp=dp,
        **others,
    ),
    tp=st.sampled_from([1, 2, 8, 16]),
    pp=st.sampled_from([1, 2, 8]),
    cp=st.sampled_from([1, 2]),
    dp=st.sampled_from([1, 4, 32]),
    zero=st.integers(0, 3),
    micro_batch_size=st.sampled_from([1, 2, 8]),
    grad_accum_steps=st.sampled_from([1, 4, 32]),
    recompute=st.sampled_from(["none", "selective", "full"]),
    precision=st.sampled_from(["bf16", "fp32"]),
    schedule=st.sampled_from(["1f1b", "gpipe", "interleaved", "zb-h1", "zb-v"]),
)


@settings(max_examples=60, deadline=None)
@given(JOBS)
def test_a_step_is_a_sum_and_never_beats_the_products(found):
    terms = step_time(found, H100).terms
    assert math.isclose(math.fsum(t.value for t in terms), seconds(found))
    assert all(t.value > 0 and t.formula and t.source for t in terms)
    rate = H100.matmul_fraction * H100.peak_flops[found.precision]
    flops = found.model.flops_per_token * found.tokens_per_step
    assert seconds(found) > flops / found.world_size / rate
    stages = found.model.num_layers / found.pp
    assert seconds(found) >= stages * found.grad_accum_steps * layer_seconds(
        found, H100
    )


FASTER = {
    "memory_bytes_per_s": lambda value: 2 * value,
    "peak_flops": lambda value: {name: 2 * rate for name, rate in value.items()},
    "node_bytes_per_s": lambda value: 2 * value,
    "network_bytes_per_s": lambda value: {n: 2 * rate for n, rate in value.items()},
    "node_latency_s": lambda value: value / 2,
    "network_latency_s": lambda value: value / 2,
}


@settings(max_examples=60, deadline=None)
@given(JOBS, st.sampled_from(sorted(FASTER)))
def test_a_better_machine_is_never_slower(found, name):
    better = replace(H100, **{name: FASTER[name](getattr(H100, name))})
    assert seconds(found, better) <= seconds(found) * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(JOBS)
def test_more_work_never_takes_less(found):
    before = seconds(found)
    M = found.grad_accum_steps
    twice = seconds(replace(found, grad_accum_steps=2 * M))
    assert before < twice <= 2 * before * (1 + 1e-9)
    larger = replace(found, micro_batch_size=2 * found.micro_batch_size)
    assert seconds(larger) >= before * (1 - 1e-9)
    deeper = replace(found, model=replace(found.model, num_layers=48))
    assert seconds(deeper) > before
    if found.recompute == "none":
        assert seconds(replace(found, recompute="full")) >= before * (1 - 1e-9)


def test_the_head_of_a_large_vocabulary_slows_its_stage():
    jobs = [
        job(model=small(vocab_size=V), pp=8, grad_accum_steps=64)
        for V in (8192, 131072)
    ]
    assert seconds(jobs[1]) > 1.3 * seconds(jobs[0])


def test_small_micro_batches_of_a_divided_layer_wait_for_the_host():
    one = job(model=small(), tp=8, grad_accum_steps=32)
    many = job(model=small(), tp=8, micro_batch_size=32)
    assert term(one, "waiting for the host") > seconds(one) / 2
    assert term(many, "waiting for the host") == 0


def test_zero_divides_the_optimizer_and_sends_what_it_divides():
    jobs = [
        job(nodes=2, model=small(), zero=zero, grad_accum_steps=4) for zero in range(4)
    ]
    step = [term(found, "optimizer") for found in jobs]
    assert step[0] > step[1] > step[2] == step[3]
    traffic = [term(found, "data-parallel traffic") for found in jobs]
    assert min(traffic[:3]) > 0
    # Layer by layer it hides behind passes that are long enough.
    assert traffic[3] == 0
    slow = replace(H100, network_bytes_per_s={2: 1e10})
    assert term(jobs[3], "data-parallel traffic", slow) > 0


def test_overlap_hides_gradients_behind_the_last_backward_only():
    found = job(nodes=2, model=small())
    hidden = replace(FITTED, overlap=1.0)
    exposed = term(found, "data-parallel traffic")
    assert exposed > 0
    assert term(found, "data-parallel traffic", constants=hidden) < exposed
    slow = replace(H100, network_bytes_per_s={2: 1e9})
    assert term(found, "data-parallel traffic", slow, hidden) > exposed


@pytest.mark.parametrize("name", sorted(HARDWARE))
@pytest.mark.parametrize("nodes", [1, 64])
def test_large_models_and_other_machines_stay_plausible(name, nodes):
    hardware = HARDWARE[name]
    found = job(nodes=nodes, model=LLAMA, zero=3, recompute="full", micro_batch_size=4)
    flops = found.model.flops_per_token * found.tokens_per_step / found.world_size
    share = flops / seconds(found, hardware) / hardware.peak_flops["bf16"]
    assert 0.02 < share < 0.8 * hardware.matmul_fraction
    if name in ("h100", "h200", "a100-80gb", "b200"):
        assert share > 0.3  # as published runs of 70 billion parameters


def test_a_constant_outside_its_plausible_range_is_refused():
    with pytest.raises(ValueError, match=r"overlap=2 must be between 0\.0 and 1\.0"):
        Constants(overlap=2)
    for name, known in constant_ranges().items():
        assert known.low <= getattr(FITTED, name) <= known.high
        assert known.meaning
    assert len(constant_ranges()) <= 12
