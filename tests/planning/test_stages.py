"""Which layers the stages of a planned pipeline hold."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labpkg.planning.configuration import Configuration
from labpkg.planning.models import find_model
from labpkg.planning.shapes import ModelShape
from labpkg.planning.stages import (
    StageShare,
    head_weight,
    layer_elements,
    stage_elements,
    stage_shares,
    stages_of_rank,
    stages_per_rank,
)

GPT = ModelShape(
    num_layers=24,
    width=64,
    num_heads=8,
    num_kv_heads=8,
    ffn_width=256,
    vocab_size=100,
    sequence_length=32,
    tied=True,
    gated_mlp=False,
)


@given(
    num_layers=st.integers(1, 40),
    num_stages=st.integers(1, 50),
    vocab_size=st.integers(1, 10_000),
    tied=st.booleans(),
)
def test_every_layer_has_a_stage(num_layers, num_stages, vocab_size, tied):
    model = replace(GPT, num_layers=num_layers, vocab_size=vocab_size, tied=tied)
    shares = stage_shares(model, num_stages)
    assert len(shares) == num_stages
    assert sum(share.num_layers for share in shares) == num_layers
    assert [share.embedding for share in shares].index(True) == 0
    heads = [share.head for share in shares]
    assert heads.count(True) == 1
    last = max(s for s, share in enumerate(shares) if share.num_layers)
    assert heads.index(True) >= last  # nothing follows the head
    if num_stages <= num_layers:
        assert all(share.num_layers or share.head for share in shares)
    copies = tied and not shares[0].head
    assert sum(stage_elements(share, model) for share in shares) == (
        model.num_parameters + copies * vocab_size * model.width
    )


@given(
    num_layers=st.integers(1, 60),
    num_stages=st.integers(1, 60),
    vocab_size=st.integers(1, 10_000),
)
def test_no_stage_works_a_layer_more_than_its_share(num_layers, num_stages, vocab_size):
    model = replace(GPT, num_layers=num_layers, vocab_size=vocab_size)
    weight = head_weight(model) if head_weight(model) >= 1 else 0
    share_of_work = (num_layers + weight) / num_stages
    for share in stage_shares(model, num_stages):
        assert share.num_layers < share_of_work + 1
    if num_layers % num_stages == 0 and not weight:
        counts = {share.num_layers for share in stage_shares(model, num_stages)}
        assert counts == {num_layers // num_stages}


def test_published_models_are_dealt_as_their_runs_did():
    # Megatron-LM gives every stage 12 of 96 layers (arXiv:2104.04473), although GPT-3's
    # head costs a third of a layer.
    shares = stage_shares(find_model("gpt3-175b"), 8)
    assert [share.num_layers for share in shares] == [12] * 8
    # Four layers' worth of head: the last of four stages has one layer beside it.
    heavy = ModelShape(
        num_layers=16,
        width=2048,
        num_heads=32,
        num_kv_heads=32,
        ffn_width=8192,
        vocab_size=131072,
        sequence_length=4096,
        tied=True,
        gated_mlp=True,
        learned_positions=False,
    )
    assert head_weight(heavy) == 4
    assert stage_shares(heavy, 4) == (
        StageShare(5, embedding=True),
        StageShare(5),
        StageShare(5),
        StageShare(1, head=True),
    )


def test_tensor_parallel_ranks_divide_matrices_but_neither_norms_nor_positions():
    share = StageShare(2, embedding=True, head=True)
    D, T = GPT.width, GPT.sequence_length
    whole = (stage_elements(share, GPT, tp=n) - T * D - 5 * D for n in (1, 4))
    assert next(whole) == 4 * next(whole)
    # Three of four ranks would have 34 rows, and one has less.
    odd = replace(GPT, vocab_size=101)
    assert stage_elements(StageShare(0, head=True), odd, tp=3) == (34 + 1) * D


def test_key_heads_are_copied_when_there_are_fewer_than_ranks():
    grouped = replace(GPT, num_kv_heads=2)
    D = GPT.width
    keys_and_values = 2 * D * grouped.head_width
    rest = 2 * D * D // 8 + 2 * D * GPT.ffn_width // 8
    assert layer_elements(grouped, tp=8) == rest + keys_and_values
    assert layer_elements(grouped, tp=2) == 4 * rest + keys_and_values
    # One of two ranks has two of three heads.
    three = replace(GPT, num_heads=6, num_kv_heads=3, width=48, ffn_width=192)
    one = 2 * 48 * three.head_width
    assert layer_elements(three, tp=2) == 48 * 48 + 48 * 192 + 2 * one


def test_schedules_deal_stages_in_turn_or_down_and_up():
    def job(**how):
        return Configuration(model=GPT, gpus_per_node=4, pp=4, **how)

    looped = job(schedule="interleaved", num_virtual_stages=3)
    assert stages_per_rank(looped) == 3
    assert stages_of_rank(looped, 1) == (1, 5, 9)
    v_shaped = job(schedule="zb-v")
    assert stages_per_rank(v_shaped) == 2
    assert stages_of_rank(v_shaped, 1) == (1, 6)
    assert stages_of_rank(job(), 1) == (1,)
    assert stages_per_rank(Configuration(model=GPT, gpus_per_node=1)) == 1


def test_a_pipeline_needs_a_stage():
    with pytest.raises(ValueError, match="num_stages=0 is below 1"):
        stage_shares(GPT, 0)
