"""Formulas of tensor and pipeline traffic: from the definition, and as counted."""

import pytest
import torch
from torch import nn

import labpkg as lab
from labpkg.parallelism.pipeline import Pipeline
from labpkg.parallelism.tensor_parallel import (
    apply_tensor_parallel,
    gpt_tensor_parallel_plan,
)
from labpkg.parallelism.vocabulary_loss import vocab_parallel_cross_entropy
from labpkg.planning.model_parallel import (
    LayerCut,
    gpt_layer_cuts,
    pipeline_bytes,
    tensor_parallel_bytes,
)
from labpkg.planning.schedules import gpipe, interleaved, one_f_one_b, zero_bubble
from labpkg.processes.stages import split_stages

CONFIG = lab.GPTConfig(
    num_layers=2, width=8, num_heads=4, vocab_size=12, sequence_length=4
)
B, T = 3, 4
OPTIONS = [
    {"sequence_parallel": sequence, "parallel_loss": loss}
    for sequence in (False, True)
    for loss in (False, True)
]


def test_a_block_moves_four_times_its_activations():
    D, F = 8, 32
    block = [
        LayerCut("column", D, 3 * D),
        ("row:2", D, D),
        ("column_fused:2", D, F),
        ("row", F, D),
    ]
    tokens = 30
    whole = tensor_parallel_bytes(block, tokens=tokens)
    assert whole == {"all_reduce": 4 * tokens * D * 4}
    cut = tensor_parallel_bytes(
        block, tokens=tokens, itemsize=2, sequence_parallel=True
    )
    # A pair for each all_reduce, and the inputs of column layers once more, for dW.
    assert cut == {
        "all_gather": (4 + 2) * tokens * D * 2,
        "reduce_scatter": 4 * tokens * D * 2,
    }


def test_shapes_with_a_gate_and_grouped_heads():
    shape = lab.ModelShape(
        num_layers=1,
        width=8,
        num_heads=4,
        num_kv_heads=2,
        ffn_width=24,
        vocab_size=100,
        sequence_length=4,
        tied=False,
        gated_mlp=True,
    )
    assert gpt_layer_cuts(shape, parallel_loss=True) == [
        ("vocab", 100, 8),
        ("column", 8, 8 + 2 * 4),
        ("row", 8, 8),
        ("column", 8, 24),
        ("column", 8, 24),
        ("row", 24, 8),
        ("column", 8, 100),
    ]


def counted_by_gpt():
    """Return what a GPT sends in one pass, for each option of its plan."""
    mesh = lab.make_mesh(tp=2)["tp"]
    tokens = torch.arange(B * (T + 1)).view(B, -1) % 12
    x, y = tokens[:, :-1], tokens[:, 1:].contiguous()
    counted = []
    for options in OPTIONS:
        sequence = options["sequence_parallel"]
        model = lab.GPT(CONFIG)
        plan = gpt_tensor_parallel_plan(CONFIG, **options)
        apply_tensor_parallel(model, mesh, plan, sequence_parallel=sequence)
        with lab.count_comms() as log:
            logits = model(x)
            if options["parallel_loss"]:
                vocab_parallel_cross_entropy(logits, y, mesh).backward()
            else:
                lab.cross_entropy(logits, y).backward()
        ops = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")
        sent = {op: log["tp", op].payload_bytes for op in ops}
        counted.append({op: number for op, number in sent.items() if number})
    return counted


def test_a_gpt_sends_what_is_predicted(world2):
    for counted in world2.run(counted_by_gpt):
        for options, sent in zip(OPTIONS, counted, strict=True):
            layers = gpt_layer_cuts(CONFIG.shape, **options)
            predicted = tensor_parallel_bytes(layers, tokens=B * T, **options)
            assert sent == predicted, options


class Mixed(nn.Module):
    """Columns that share an entry, norms, tokens cut along T, a mix of positions."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.pair = Pair()
        self.gain, self.down = nn.RMSNorm(2), nn.Linear(8, 4)
        self.mix = Mix()

    def forward(self, tokens):
        x = self.norm(self.embed(tokens))
        hidden = self.pair(x).unflatten(-1, (-1, 2))  # heads
        return self.mix(x + self.down(self.gain(hidden).flatten(-2)))


class Pair(nn.Module):
    """Two columns that share their input."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 8), nn.Linear(4, 8)

    def forward(self, x):
        return self.left(x) * self.right(x)


class Mix(nn.Module):
    """A layer that needs all positions."""

    def __init__(self):
        super().__init__()
        self.over_time = nn.Linear(T, T)

    def forward(self, x):
        return self.over_time(x.transpose(1, 2))


MIXED = {
    "embed": "vocab_sequence",
    "norm": "sequence",
    "pair": "region",
    "pair.*": "column",
    "gain": "partial",
    "down": "row",
    "mix": "sequence_gather",
}
MIXED_LAYERS = [
    ("vocab_sequence", 6, 4),
    ("sequence", 8, 8),
    ("region", 4, 4),
    ("partial", 2, 2),
    ("row", 8, 4),
    ("sequence_gather", 4, 4),
]


def counted_by_a_mix():
    mesh = lab.make_mesh(tp=2)["tp"]
    model = Mixed()
    apply_tensor_parallel(model, mesh, MIXED, sequence_parallel=True)
    tokens = torch.arange(B * T).view(B, T) % 6
    with lab.count_comms() as log:
        model(tokens).sum().backward()
    ops = ("all_reduce", "all_gather", "reduce_scatter")
    return {op: log["tp", op].payload_bytes for op in ops}


def test_the_other_values_of_a_plan_send_what_is_predicted(world2):
    predicted = tensor_parallel_bytes(
        MIXED_LAYERS, tokens=B * T, sequence_parallel=True
    )
    assert world2.run(counted_by_a_mix) == [predicted] * 2


M = 4
SCHEDULES = {
    "gpipe": gpipe(2, M),
    "1f1b": one_f_one_b(2, M),
    "interleaved": interleaved(2, M, num_virtual_stages=2),
    "h1": zero_bubble(2, M),
    "v": zero_bubble(2, M, variant="v"),
}
ACTIVATION_BYTES = T * CONFIG.width * 4  # of a micro-batch of one sequence
TIED_BYTES = CONFIG.vocab_size * CONFIG.width * 4


def counted_by_pipelines():
    mesh = lab.make_mesh(pp=2)["pp"]
    tokens = torch.arange(M * (T + 1)).view(M, -1) % 12
    x, y = tokens[:, :-1], tokens[:, 1:].contiguous()
    counted = {}
    for name, schedule in SCHEDULES.items():
        stages = split_stages(lab.GPT(CONFIG), schedule.num_stages)
        own = [stages[i] for i in schedule.stages_of(mesh.get_local_rank())]
        pipe = Pipeline(own, schedule, mesh, loss_fn=lab.cross_entropy)
        pipe.step(x, y)
        with lab.count_comms() as log:
            pipe.step(x, y)
        counted[name] = log["pp", "send"].payload_bytes
    return counted


def test_pipelines_send_what_is_predicted(world2):
    for rank, counted in enumerate(world2.run(counted_by_pipelines)):
        assert counted == {
            name: pipeline_bytes(
                schedule, rank, activation_bytes=ACTIVATION_BYTES, tied_bytes=TIED_BYTES
            )
            for name, schedule in SCHEDULES.items()
        }


def test_borders_of_a_pipeline():
    schedule = one_f_one_b(3, 5)
    assert [
        pipeline_bytes(schedule, r, activation_bytes=[10, 7]) for r in range(3)
    ] == [
        5 * 10,
        5 * (10 + 7),
        5 * 7,
    ]
    tied = [
        pipeline_bytes(schedule, r, activation_bytes=0, tied_bytes=9) for r in range(3)
    ]
    assert tied == [9, 0, 9]
    one_rank = interleaved(1, 2, num_virtual_stages=3)
    assert pipeline_bytes(one_rank, 0, activation_bytes=8, tied_bytes=9) == 0


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ([("diagonal", 2, 2)], {}, "kind='diagonal' is none of column, "),
        ([("sequence", 2, 2)], {}, "kind='sequence' is none of"),
        ([], {"tokens": -1}, "tokens=-1 must be at least 0"),
        ([], {"itemsize": 0}, "itemsize=0 at least 1"),
    ],
)
def test_bad_layers_raise(layers, options, message):
    with pytest.raises(ValueError, match=message):
        tensor_parallel_bytes(layers, **{"tokens": 4, **options})


def test_bad_borders_raise():
    with pytest.raises(ValueError, match="has 3 numbers, but 3 stages have 2 borders"):
        pipeline_bytes(one_f_one_b(3, 2), 0, activation_bytes=[1, 2, 3])
    with pytest.raises(ValueError, match="rank=3 is none of"):
        pipeline_bytes(one_f_one_b(3, 2), 3, activation_bytes=1)


def test_the_loss_adds_up_in_single_precision_at_least():
    for itemsize, nbytes in ((2, 4), (4, 4), (8, 8)):
        sent = tensor_parallel_bytes(
            [], tokens=7, itemsize=itemsize, parallel_loss=True
        )
        assert sent == {"all_reduce": 3 * 7 * nbytes}
