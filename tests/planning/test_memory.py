"""Peak memory: exact parts, laws between jobs, and published runs."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from labpkg.planning.configuration import Configuration
from labpkg.planning.constants import FITTED, Constants
from labpkg.planning.cost import activation_bytes
from labpkg.planning.hardware import find_hardware
from labpkg.planning.layout import SCHEDULES
from labpkg.planning.memory import (
    layer_activation_bytes,
    peak_memory,
    rank_memory,
    rank_moments,
    state_bytes,
    usable_bytes,
)
from labpkg.planning.models import find_model
from labpkg.planning.shapes import ModelShape
from labpkg.planning.stages import (
    in_flight,
    layer_elements,
    stages_per_rank,
    waiting,
)
from scripts.published_runs import VARIABLE, data_folder, mosaicml_runs, playbook_runs

EXACT = Constants(activation_copies=1.0, gathered_inputs=0.0, logit_copies=1.0)
GPT = ModelShape(
    num_layers=24,
    width=64,
    num_heads=8,
    num_kv_heads=4,
    ffn_width=192,
    vocab_size=1000,
    sequence_length=32,
    tied=True,
    gated_mlp=False,
)


def job(model=GPT, **division):
    n = 1
    for axis in ("dp", "tp", "pp", "cp"):
        n *= division.get(axis, 1)
    return Configuration(model=model, nodes=1, gpus_per_node=n, **division)


def term(memory, name):
    return {t.name: t.value for t in memory.terms}.get(name, 0.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_micro_batches_in_flight_are_those_of_the_schedule(schedule):
    for P in (2, 3, 4, 6):
        for M in (1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 24):
            for v in (1, 2, 3) if schedule == "interleaved" else (1,):
                c = job(
                    pp=P,
                    grad_accum_steps=M,
                    schedule=schedule,
                    num_virtual_stages=v,
                )
                held = [in_flight(c, rank) for rank in range(P)]
                assert all(len(counts) == stages_per_rank(c) for counts in held)
                measured = SCHEDULES[schedule](P, M, v).peak_in_flight
                assert [sum(counts) for counts in held] == measured, (P, M, v)


@pytest.mark.parametrize("schedule", ["zb-h1", "zb-v"])
def test_what_waits_for_w_is_what_the_schedule_leaves(schedule):
    for P in (2, 3, 4, 6):
        for M in (1, 2, 3, 5, 8, 12, 24):
            c = job(pp=P, grad_accum_steps=M, schedule=schedule)
            for rank, actions in enumerate(SCHEDULES[schedule](P, M, 1).ranks):
                change = {"F": 0, "I": 1, "W": -1}
                steps = np.cumsum([change[action.kind] for action in actions])
                found = sum(waiting(c, rank))
                assert found >= steps.max(), (P, M, rank)
                if schedule == "zb-h1" or M >= 2 * P - 1:
                    assert found == steps.max(), (P, M, rank)


@given(
    num_layers=st.integers(1, 5),
    heads=st.sampled_from([(8, 8), (8, 4), (8, 1)]),
    gated=st.booleans(),
    batch=st.integers(1, 4),
)
def test_one_gpu_keeps_the_activations_of_the_library(num_layers, heads, gated, batch):
    shape = replace(
        GPT,
        num_layers=num_layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        gated_mlp=gated,
    )
    c = job(shape, micro_batch_size=batch, precision="fp32")
    memory = peak_memory(c, EXACT)
    kept = term(memory, "activations") + term(memory, "logits")
    assert kept == activation_bytes(shape, batch_size=batch, itemsize=4)
    state = [term(memory, n) for n in ("weights", "gradients", "optimizer state")]
    assert state == [4 * shape.num_parameters] * 2 + [8 * shape.num_parameters]
    assert memory.num_bytes == kept + sum(state)


def test_state_of_mixed_precision():
    # 18 bytes, or 6 + 12 / n with a distributed optimizer: Megatron-LM's own estimate.
    for zero, expected in ((0, 18), (1, 6 + 12 / 8), (2, 2 + 16 / 8), (3, 16 / 8)):
        state = state_bytes(100, precision="bf16", zero=zero, n=8)
        assert sum(state) == pytest.approx(100 * expected)
    assert state_bytes(100, precision="fp32", zero=0, n=8) == (400, 400, 800)


def test_a_layer_under_recomputation_and_sequence_parallelism():
    tokens = 3 * GPT.sequence_length
    whole, divided = (
        job(tp=4, recompute="full", micro_batch_size=3, sequence_parallel=cut)
        for cut in (False, True)
    )
    assert layer_activation_bytes(whole) == 2 * tokens * GPT.width
    assert layer_activation_bytes(divided) == 2 * tokens * GPT.width / 4
    none = job(tp=4, micro_batch_size=3)
    assert layer_activation_bytes(none) == layer_activation_bytes(
        replace(none, recompute="selective")
    )
    # Alone, sequence parallelism makes tp divide everything.
    one = job(micro_batch_size=3, sequence_parallel=False)
    assert layer_activation_bytes(none) == layer_activation_bytes(one) / 4


jobs = st.builds(
    dict,
    dp=st.sampled_from([1, 2, 8]),
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2, 3, 4, 8]),
    cp=st.sampled_from([1, 2]),
    micro_batch_size=st.sampled_from([1, 4]),
    grad_accum_steps=st.sampled_from([1, 3, 16]),
    zero=st.integers(0, 3),
    recompute=st.sampled_from(["none", "full"]),
    precision=st.sampled_from(["bf16", "fp32"]),
    schedule=st.sampled_from(list(SCHEDULES)),
).map(
    lambda division: (
        division | {"num_virtual_stages": 3}
        if division["schedule"] == "interleaved"
        else division
    )
)
shapes = st.builds(
    lambda layers, vocab, gated: replace(
        GPT, num_layers=layers, vocab_size=vocab, gated_mlp=gated
    ),
    st.sampled_from([20, 24, 29]),
    st.sampled_from([100, 5_000, 50_000]),
    st.booleans(),
)


@given(model=shapes, division=jobs)
def test_no_rank_is_fuller_than_the_fullest(model, division):
    c = job(model, **division)
    worst = peak_memory(c)
    assert worst == rank_memory(c, worst.rank)
    assert worst.num_bytes == max(rank_memory(c, r).num_bytes for r in range(c.pp))
    assert all(t.value > 0 and t.formula and t.source for t in worst.terms)


@given(model=shapes, division=jobs)
def test_dividing_more_never_needs_more(model, division):
    c = job(model, **division)
    peak = peak_memory(c).num_bytes
    assume(c.recompute == "none")
    almost = peak * (1 + 1e-9)
    assert peak_memory(replace(c, recompute="full")).num_bytes <= almost
    assert peak_memory(replace(c, micro_batch_size=8)).num_bytes > peak
    if c.precision != "fp32":  # whose slices lie beside what is whole for a moment
        more = replace(c, zero=min(c.zero + 1, 3))
        assert peak_memory(more).num_bytes <= almost
    if c.tp < 4:
        more = job(model, **division | {"tp": 2 * c.tp})
        assert peak_memory(more).num_bytes <= almost
    twice = dict(division, cp=2 * c.cp)
    assert peak_memory(job(model, **twice)).num_bytes < peak * (1 + 1e-9) or c.dp == 1


def test_logits_are_gone_while_a_layer_is_computed_again():
    none = job(micro_batch_size=2)
    full = replace(none, recompute="full")
    loss, again = rank_moments(full, 0, EXACT)
    layer, own = (layer_activation_bytes(c) for c in (none, full))
    logits = 4 * 2 * GPT.sequence_length * GPT.vocab_size
    assert loss.num_bytes - again.num_bytes == logits - (layer - own)
    assert rank_memory(full, 0, EXACT) == max(loss, again, key=lambda m: m.num_bytes)
    assert term(again, "logits") == term(loss, "recomputed layer") == 0
    # The other micro-batches of GPipe keep theirs.
    many = job(recompute="full", grad_accum_steps=3, pp=2, schedule="gpipe")
    assert term(rank_moments(many, 1, EXACT)[1], "logits") == logits


def test_recomputation_saves_nothing_where_w_waits_for_all():
    def kept(rank, **how):
        c = job(pp=4, grad_accum_steps=8, schedule="zb-h1", **how)
        return term(rank_moments(c, rank)[0], "activations")

    assert kept(3, recompute="full") == pytest.approx(kept(3))
    assert kept(0, recompute="full") < 0.4 * kept(0)


def test_tensor_parallel_ranks_divide_the_head():
    def head(**how):
        c = job(tp=2, precision="fp32", **how)
        layers = GPT.num_layers * layer_activation_bytes(c)
        memory = peak_memory(c, EXACT)
        return term(memory, "activations") - layers, term(memory, "logits")

    norm = 4 * GPT.sequence_length * (2 * GPT.width + 2)
    logits = 4 * GPT.sequence_length * GPT.vocab_size / 2
    assert head(sequence_parallel=False) == (norm, logits)
    assert head() == (norm / 2, logits)


def test_a_fused_loss_has_the_logits_once():
    fused, plain = (peak_memory(job(fused_loss=fused)) for fused in (True, False))
    logits = 4 * GPT.sequence_length * GPT.vocab_size
    assert term(fused, "logits") == logits
    assert term(plain, "logits") == pytest.approx(FITTED.logit_copies * logits)


def test_rotary_positions_keep_queries_and_keys_twice():
    rotary = job(replace(GPT, learned_positions=False))
    more = layer_activation_bytes(rotary) - layer_activation_bytes(job())
    keys = GPT.num_kv_heads * GPT.head_width
    assert more == 2 * GPT.sequence_length * (GPT.width + keys)
    # Eight ranks share four key heads: each has a whole one, 8 numbers wide.
    per_token = (4 * 64 + 4 + 2 * 64 + 2 * 192) / 8 + 2 * 8
    wide = layer_activation_bytes(job(tp=8))
    assert wide == GPT.sequence_length * (2 * per_token + 4)


def test_gathered_inputs_are_those_of_two_products():
    def kept(share, **how):
        constants = replace(EXACT, gathered_inputs=share)
        return term(peak_memory(job(tp=4, **how), constants), "activations")

    both = 2 * (2 * GPT.width) * GPT.sequence_length * 3 / 4
    assert kept(1.0) - kept(0.0) == GPT.num_layers * both
    alone = {"sequence_parallel": False}
    assert kept(1.0, **alone) == kept(0.0, **alone)


def test_ranks_that_share_sequences_divide_the_state():
    whole, divided = (peak_memory(job(cp=2, zero=zero)) for zero in (0, 1))
    assert term(divided, "optimizer state") == term(whole, "optimizer state") / 2


def test_buckets_are_half_gradients_that_are_summed_whole():
    def buckets(**how):
        return term(peak_memory(job(**how)), "gradient buckets")

    for how in ({"dp": 2}, {"cp": 2}, {"dp": 2, "zero": 1}):
        assert buckets(**how) == 2 * GPT.num_parameters
    for how in ({"dp": 1}, {"dp": 2, "zero": 2}, {"dp": 2, "precision": "fp32"}):
        assert buckets(**how) == 0


def test_no_more_is_gathered_than_there_is():
    # A single layer has no next one whose weights come early.
    deep = job(replace(GPT, num_layers=4), pp=4, dp=2, zero=3)
    memory = rank_memory(deep, 1)
    own = term(memory, "weights")  # float32 of a half: as much as half weights of all
    layer = layer_elements(deep.model)
    assert term(memory, "gathered layers") == own + 2 * layer
    # The table of the first stage is a unit, too; a head alone is all of its stage.
    first = rank_memory(replace(deep, zero=2), 0)
    assert term(first, "gathered layers") == 2 * 1000 * GPT.width
    small = replace(GPT, num_layers=3, vocab_size=8)
    alone = rank_memory(job(small, pp=4, dp=2, zero=2), 3)
    assert term(alone, "gathered layers") == 2 * (8 + 1) * GPT.width


def test_one_rank_alone_divides_nothing():
    plain, *others = (peak_memory(job(tp=2, pp=2, zero=zero)) for zero in range(4))
    assert all(other == plain for other in others)


def test_usable_memory_and_its_constant():
    h100 = find_hardware("h100")
    assert usable_bytes(h100, Constants(reserved_memory=0.0)) == h100.memory_bytes
    assert 0.85 * h100.memory_bytes < usable_bytes(h100) < h100.memory_bytes


@pytest.mark.parametrize(
    ("name", "division"),
    [
        ("megatron-22b", {"tp": 8, "micro_batch_size": 4}),
        ("gpt3-175b", {"tp": 8, "pp": 8, "grad_accum_steps": 64}),
        ("megatron-530b", {"tp": 8, "pp": 35, "grad_accum_steps": 280}),
        ("megatron-1t", {"tp": 8, "pp": 64, "grad_accum_steps": 512}),
    ],
)
def test_published_runs_of_megatron_fit(name, division):
    """Runs of arXiv:2205.05198, table 5, on A100 80 GB; interleaved with v = 3."""
    model = replace(find_model(name), sequence_length=2048)
    if name in ("gpt3-175b", "megatron-530b"):
        division |= {"schedule": "interleaved", "num_virtual_stages": 3}
    a100 = find_hardware("a100-80gb")
    for recompute in ("selective", "full"):
        memory = peak_memory(job(model, recompute=recompute, **division))
        assert memory.num_bytes < usable_bytes(a100)
    # Without sequence parallelism they would not: the reason for that paper.
    if name != "megatron-22b":
        alone = job(model, sequence_parallel=False, **division)
        assert peak_memory(alone).num_bytes > usable_bytes(a100)


def test_a_pipeline_has_no_rank_beyond_its_end():
    with pytest.raises(ValueError, match="rank=4 is not in a pipeline of pp=4"):
        rank_memory(job(pp=4), 4)


@pytest.fixture(scope="module")
def tables():
    folder = data_folder()
    if folder is None:
        pytest.skip(f"the published tables are not here; {VARIABLE} says where")
    return playbook_runs(folder), mosaicml_runs(folder)


def fits(run):
    usable = usable_bytes(find_hardware(run.hardware))
    return peak_memory(run.configuration).num_bytes <= usable


def test_published_peaks_are_met(tables):
    """The targets, with the constants as fitted; the report has them held out."""
    jobs = [run for run in tables[0] if run.configuration is not None]
    errors = [
        abs(peak_memory(run.configuration).num_bytes / run.memory_bytes - 1)
        for run in jobs
        if run.memory_bytes
    ]
    assert len(errors) > 1000
    assert np.median(errors) <= 0.12
    assert np.quantile(errors, 0.75) <= 0.25
    crashed = [run.tok_s_gpu is None for run in jobs]
    refused = [not fits(run) for run in jobs]
    found = sum(a and b for a, b in zip(crashed, refused, strict=True))
    assert 2 * found / (sum(crashed) + sum(refused)) >= 0.85
    assert found / sum(refused) >= 0.9


def test_published_runs_fit(tables):
    refused = [run for run in tables[1] if not fits(run)]
    assert len(refused) <= 0.1 * len(tables[1])
