"""Where ranks sit, what they send, and how long that takes."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labpkg.planning.configuration import Configuration
from labpkg.planning.hardware import HARDWARE
from labpkg.planning.model_parallel import tensor_parallel_bytes
from labpkg.planning.network import (
    AxisPlace,
    collective_s,
    held_elements,
    place_axis,
    step_traffic,
)
from labpkg.planning.shapes import ModelShape

H100 = HARDWARE["h100"]
GPT = ModelShape(
    num_layers=4,
    width=64,
    num_heads=8,
    num_kv_heads=8,
    ffn_width=256,
    vocab_size=512,
    sequence_length=32,
    tied=False,
    gated_mlp=False,
)


def job(**options):
    return Configuration(model=GPT, **options)


@pytest.mark.parametrize(
    ("axis", "options", "place"),
    [
        ("tp", {"nodes": 2, "dp": 2, "tp": 8}, (8, 8, 1, 8)),
        ("dp", {"nodes": 2, "dp": 2, "tp": 8}, (2, 1, 2, 8)),
        ("dp", {"nodes": 2, "dp": 8, "tp": 2}, (8, 4, 2, 8)),
        ("dp", {"nodes": 1, "dp": 4, "tp": 2}, (4, 4, 1, 8)),
        ("dp", {"nodes": 2, "dp": 4, "cp": 2, "tp": 2}, (8, 4, 2, 8)),
        ("cp", {"nodes": 2, "dp": 4, "cp": 2, "tp": 2}, (2, 2, 1, 8)),
        ("tp", {"nodes": 2, "tp": 8, "pp": 4, "gpus_per_node": 16}, (8, 8, 1, 16)),
        ("pp", {"nodes": 2, "dp": 2, "tp": 4, "pp": 2}, (2, 1, 2, 8)),
        ("pp", {"nodes": 1, "dp": 2, "tp": 2, "pp": 2}, (2, 2, 1, 8)),
    ],
)
def test_ranks_of_an_axis_sit_a_stride_apart(axis, options, place):
    assert tuple(place_axis(job(**options), axis)) == place


def test_a_ring_that_leaves_the_node_pays_its_latency_and_its_share_of_the_cards():
    inside, whole, eighth = (
        AxisPlace(8, 8, 1, 8),
        AxisPlace(16, 8, 2, 8),
        AxisPlace(2, 1, 2, 8),
    )
    rounds = 7 * H100.node_latency_s
    sent = 7 / 8 * 1e9 / H100.node_bytes_per_s
    assert math.isclose(collective_s("all_gather", 1e9, inside, H100), rounds + sent)
    rate = H100.network_rate(2)
    expected = 15 * H100.network_latency_s + 15 / 16 * 1e9 / rate
    assert math.isclose(collective_s("all_gather", 1e9, whole, H100), expected)
    expected = H100.network_latency_s + 1 / 2 * 1e9 / (rate / 8)
    assert math.isclose(collective_s("all_gather", 1e9, eighth, H100), expected)


# All-gather and reduce-scatter of 256 MB, GB/s of the bus, over nodes with 8 H100
# (Ultra-Scale Playbook of Hugging Face, figure on interconnect bandwidth).
MEASURED = {2: 184.61, 4: 118.97, 8: 69.0, 16: 54.97, 32: 27.97, 64: 11.04}


@pytest.mark.parametrize("nodes", MEASURED)
def test_latency_explains_how_published_bandwidths_fall_over_nodes(nodes):
    n = 8 * nodes
    seconds = collective_s("all_gather", 256e6, AxisPlace(n, 8, nodes, 8), H100)
    bus = (n - 1) / n * 256e6 / seconds / 1e9
    assert 0.7 < bus / MEASURED[nodes] < 1.4


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "send"]),
    st.floats(1, 1e10),
    st.integers(1, 64),
    st.integers(0, 3),
)
def test_more_bytes_and_more_neighbours_never_take_less(op, payload, nodes, halvings):
    per_node = 8 >> halvings
    place = AxisPlace(nodes * per_node, per_node, nodes, 8)
    seconds = collective_s(op, payload, place, H100)
    assert seconds > 0 or place.n == 1
    assert collective_s(op, 2 * payload, place, H100) >= seconds
    wider = place._replace(n=2 * place.n, nodes=2 * nodes)
    assert collective_s(op, payload, wider, H100) >= seconds
    assert collective_s(op, payload, place, H100, share=0.5) >= seconds
    crowded = place._replace(gpus_per_node=16)
    assert collective_s(op, payload, crowded, H100) >= seconds


def test_one_rank_sends_nothing():
    assert collective_s("all_reduce", 1e9, AxisPlace(1, 1, 1, 8), H100) == 0
    assert step_traffic(job(nodes=1, gpus_per_node=1)) == ()


def test_an_unknown_axis_or_collective_is_refused():
    with pytest.raises(ValueError, match="axis='ep' is unknown; choose one of tp"):
        place_axis(job(dp=8), "ep")
    with pytest.raises(ValueError, match="gather_all"):
        collective_s("gather_all", 1.0, AxisPlace(8, 8, 1, 8), H100)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_layer_sends_what_the_formula_of_tensor_parallelism_says(sequence_parallel):
    found = job(
        tp=8, micro_batch_size=3, precision="fp32", sequence_parallel=sequence_parallel
    )
    sent = {}
    for axis, phase, op, payload, calls in step_traffic(found):
        if (axis, phase) == ("tp", "layer"):
            sent[op] = payload * calls
    D, F = GPT.width, GPT.ffn_width
    cuts = [("column", D, 3 * D), ("row", D, D), ("column", D, F), ("row", F, D)]
    formula = tensor_parallel_bytes(
        cuts, tokens=3 * 32, sequence_parallel=sequence_parallel
    )
    assert sent == formula


def test_divided_gradients_leave_after_every_micro_batch():
    def phases(zero):
        found = step_traffic(job(dp=8, zero=zero, grad_accum_steps=4))
        return {(op, phase): calls for _, phase, op, _, calls in found}

    assert phases(0) == {("all_reduce", "step"): 1}
    assert phases(1) == {("reduce_scatter", "step"): 1, ("all_gather", "update"): 1}
    assert phases(2) == {("reduce_scatter", "pass"): 1, ("all_gather", "update"): 1}
    # layer by layer, for each of two passes
    assert phases(3) == {("reduce_scatter", "pass"): 4, ("all_gather", "pass"): 8}


def test_large_tensors_travel_in_buckets_of_the_whole_payload():
    large = replace(GPT, width=8192, ffn_width=32768, num_layers=40)
    found = Configuration(model=large, dp=8)
    (sent,) = step_traffic(found)
    assert sent.calls > 1
    assert sent.payload_bytes <= 512e6
    total = 4 * large.num_parameters
    assert math.isclose(sent.calls * sent.payload_bytes, total)
    assert held_elements(found) == large.num_parameters
