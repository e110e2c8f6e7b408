"""What a job is counted to, and that jobs which cannot exist are refused by name."""

import dataclasses
import itertools
import re

import pytest

from labpkg.planning.configuration import PRECISIONS, RECOMPUTE, Configuration
from labpkg.planning.layout import SCHEDULES
from labpkg.planning.shapes import ModelShape

SMALL = ModelShape(
    num_layers=3,
    width=24,
    num_heads=6,
    num_kv_heads=2,
    ffn_width=42,
    vocab_size=50,
    sequence_length=20,
    tied=True,
    gated_mlp=False,
)


def job(**changes):
    """Return a job of one GPU, or what the changes make of it."""
    return Configuration(**{"model": SMALL, "gpus_per_node": 1, **changes})


def test_one_gpu_needs_nothing_but_a_model():
    alone = job()
    assert (alone.world_size, alone.sequences_per_step) == (1, 1)
    assert alone.tokens_per_step == 20
    assert not alone.cuts_sequence
    assert Configuration(model=SMALL, dp=8).world_size == 8  # a node has 8


def test_a_step_counts_replicas_passes_and_micro_batches():
    whole = job(
        nodes=5,
        gpus_per_node=48,
        dp=5,
        tp=6,
        pp=2,
        cp=4,
        micro_batch_size=7,
        grad_accum_steps=11,
    )
    assert whole.world_size == 240
    # Ranks of tp, pp and cp work on the same sequences.
    assert whole.sequences_per_step == 5 * 7 * 11
    assert whole.tokens_per_step == 5 * 7 * 11 * 20


@pytest.mark.parametrize(
    ("tp", "chosen", "cuts"),
    [(1, None, False), (2, None, True), (2, False, False), (2, True, True)],
)
def test_tensor_parallelism_cuts_sequences_unless_told_not_to(tp, chosen, cuts):
    assert job(gpus_per_node=tp, tp=tp, sequence_parallel=chosen).cuts_sequence is cuts


def test_names_are_those_of_the_other_modules():
    for recompute, precision, schedule, zero in itertools.product(
        RECOMPUTE, PRECISIONS, SCHEDULES, range(4)
    ):
        job(recompute=recompute, precision=precision, schedule=schedule, zero=zero)


@pytest.mark.parametrize(
    "name",
    [
        *("nodes", "gpus_per_node", "dp", "tp", "pp", "cp"),
        *("micro_batch_size", "grad_accum_steps", "num_virtual_stages"),
    ],
)
@pytest.mark.parametrize("value", [0, -2, 1.5, 2.0, float("nan"), "2", None])
def test_sizes_are_whole_numbers_above_zero(name, value):
    rule = rf"{name}={re.escape(repr(value))} must be a whole number above 0"
    with pytest.raises(ValueError, match=rule):
        job(**{name: value})


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"model": "gpt2"}, "model='gpt2' must be a ModelShape.*find_model"),
        ({"recompute": "some"}, "recompute='some' .* none, selective, full"),
        ({"precision": "int8"}, "precision='int8' .* bf16, fp16, fp32"),
        ({"schedule": "1F1B"}, "schedule='1F1B' is unknown; choose one of gpipe, 1f1b"),
        ({"zero": 4}, "zero=4 is unknown; choose 0, 1, 2 or 3"),
        ({"zero": -1}, "zero=-1 is unknown"),
        ({"zero": "1"}, "zero='1' is unknown"),
        ({"dp": 2}, "dp=2 x tp=1 x pp=1 x cp=1 = 2 .* nodes=1 x gpus_per_node=1 = 1"),
        ({"nodes": 2}, "= 1 ranks, but nodes=2 x gpus_per_node=1 = 2 GPUs"),
        ({"gpus_per_node": 4, "tp": 4}, "num_heads=6 is not divisible by tp=4"),
        ({"gpus_per_node": 3, "cp": 3}, "sequence_length=20 .* by cp=3"),
        (
            {
                "gpus_per_node": 2,
                "tp": 2,
                "model": dataclasses.replace(SMALL, ffn_width=5),
            },
            "ffn_width=5 is not divisible by tp=2; choose a divisor",
        ),
    ],
)
def test_jobs_that_cannot_exist_are_refused_by_name(changes, rule):
    with pytest.raises(ValueError, match=rule):
        job(**changes)


def test_more_ranks_than_key_heads_copy_them():
    assert job(gpus_per_node=6, tp=6).tp == 6


def test_only_interleaving_chooses_its_stages():
    job(pp=2, gpus_per_node=2, schedule="interleaved", num_virtual_stages=3)
    for v in (1, 2):
        job(pp=2, gpus_per_node=2, schedule="zb-v", num_virtual_stages=v)
    for schedule, v, has in (("1f1b", 2, 1), ("zb-h1", 2, 1), ("zb-v", 3, 2)):
        rule = f"'{schedule}' has {has} stages on each rank, but num_virtual_stages={v}"
        with pytest.raises(ValueError, match=rule):
            job(pp=2, gpus_per_node=2, schedule=schedule, num_virtual_stages=v)


@pytest.mark.parametrize(
    ("most", "schedule"),
    [
        (8, {"schedule": "1f1b"}),
        (4, {"schedule": "zb-v"}),
        (2, {"schedule": "interleaved", "num_virtual_stages": 4}),
    ],
)
def test_stages_need_a_layer_or_an_end(most, schedule):
    job(pp=most, gpus_per_node=most, **schedule)  # 3 layers and 5 others
    with pytest.raises(ValueError, match=rf"pp={most + 1} .* more than the 3 layers"):
        job(pp=most + 1, gpus_per_node=most + 1, **schedule)
