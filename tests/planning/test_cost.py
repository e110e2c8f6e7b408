from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from labpkg.foundations.losses import cross_entropy
from labpkg.foundations.models import GPT, MLP, GPTConfig
from labpkg.planning.cost import (
    activation_bytes,
    data_parallel_bytes,
    model_state_bytes,
    wire_bytes,
    zero_bytes,
)


def ring_all_reduce_bytes(num_elements: int, n: int) -> list[int]:
    """Count what each rank sends when a ring runs, chunk by chunk."""
    sent = [0] * n
    for _phase in ("reduce_scatter", "all_gather"):
        for _step in range(n - 1):
            for rank in range(n):
                sent[rank] += num_elements // n
    return sent


@given(n=st.integers(2, 12), per_rank=st.integers(1, 50))
def test_all_reduce_is_what_a_ring_sends(n, per_rank):
    payload = n * per_rank
    assert (
        ring_all_reduce_bytes(payload, n) == [wire_bytes("all_reduce", payload, n)] * n
    )


@given(n=st.integers(1, 64), payload=st.integers(0, 2**40))
def test_all_reduce_is_reduce_scatter_and_all_gather(n, payload):
    parts = wire_bytes("reduce_scatter", payload, n) + wire_bytes(
        "all_gather", payload, n
    )
    assert wire_bytes("all_reduce", payload, n) == pytest.approx(parts)


@pytest.mark.parametrize(
    ("op", "sent"),
    [
        ("all_reduce", 150.0),
        ("all_gather", 75.0),
        ("reduce_scatter", 75.0),
        ("all_to_all", 75.0),
        ("broadcast", 100.0),
        ("reduce", 100.0),
        ("send", 100.0),
    ],
)
def test_four_ranks(op, sent):
    assert wire_bytes(op, 100, 4) == sent
    assert wire_bytes(op, 100, 1) == 0.0


def test_bad_arguments_raise():
    with pytest.raises(
        ValueError, match=r"op='allreduce' is not a collective; .*all_re"
    ):
        wire_bytes("allreduce", 8, 2)
    with pytest.raises(ValueError, match="n=0"):
        wire_bytes("send", 8, 0)
    with pytest.raises(ValueError, match="payload_bytes=-1"):
        wire_bytes("send", -1, 2)


def test_data_parallel_bytes_counts_elements_and_flags():
    model = MLP(3, 4, 2)
    assert data_parallel_bytes(model) == 4 * (12 + 4 + 8 + 2 + 4)
    model[0].weight.requires_grad_(False)  # pyright: ignore[reportAttributeAccessIssue]
    assert data_parallel_bytes(model) == 4 * (4 + 8 + 2 + 3)
    assert data_parallel_bytes(model.to(torch.float64)) == 8 * (4 + 8 + 2 + 3)


def test_data_parallel_bytes_in_another_dtype_and_with_buffers():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    reduced = 12 + 4 + 4 + 4 + 4  # elements, and a flag for each parameter
    assert data_parallel_bytes(model, itemsize=2) == 2 * reduced
    buffers = 4 * (4 + 4) + 8
    assert data_parallel_bytes(model, buffers=True) == 4 * reduced + buffers
    with pytest.raises(ValueError, match="itemsize=0 is below 1"):
        data_parallel_bytes(model, itemsize=0)


def test_data_parallel_bytes_counts_tied_weights_once():
    sizes = {"num_layers": 1, "width": 8, "num_heads": 2, "sequence_length": 4}
    tied, untied = GPT(GPTConfig(**sizes)), GPT(GPTConfig(**sizes, tied=False))
    assert data_parallel_bytes(untied) - data_parallel_bytes(tied) == 4 * (256 * 8 + 1)


def test_model_state_bytes_are_those_of_the_paper():
    # 7.5e9 parameters, half precision, AdamW with a float32 copy, 64 ranks: figure 1.
    half = {"weight_bytes": 2, "gradient_bytes": 2, "optimizer_bytes": 12}
    giga = [
        model_state_bytes(7_500_000_000, stage=stage, n=64, **half) / 1e9
        for stage in range(4)
    ]
    assert giga == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)


@given(num_elements=st.integers(0, 10**9), n=st.integers(1, 64))
def test_model_state_bytes_by_stage(num_elements, n):
    sizes = [model_state_bytes(num_elements, stage=stage, n=n) for stage in range(4)]
    p = 4 * num_elements
    shares = [4 * p, 2 * p + 2 * p / n, p + 3 * p / n, 4 * p / n]
    assert sizes == pytest.approx(shares)


def test_model_state_bytes_refuse_bad_sizes():
    with pytest.raises(ValueError, match="stage=4 must be 0, 1, 2 or 3"):
        model_state_bytes(10, stage=4, n=2)
    with pytest.raises(ValueError, match="n=0 at least 1"):
        model_state_bytes(10, stage=1, n=0)
    with pytest.raises(ValueError, match=r"\(10, 4, 4, -1\) must be at least 0"):
        model_state_bytes(10, stage=1, n=2, optimizer_bytes=-1)


def test_zero_bytes_count_halves_of_an_all_reduce_and_flags():
    model = MLP(3, 4, 2)  # 12 + 4 + 8 + 2 elements
    p = 4 * 26
    assert zero_bytes(model, stage=0) == {"all_reduce": data_parallel_bytes(model)}
    sharded = {"reduce_scatter": p, "all_gather": p, "all_reduce": 4}
    assert zero_bytes(model, stage=1) == zero_bytes(model, stage=2) == sharded
    assert zero_bytes(model, stage=3) == sharded | {"all_gather": 2 * p}
    assert zero_bytes(model, stage=3, reshard_after_forward=False) == sharded
    with pytest.raises(ValueError, match="stage=4 must be 0, 1, 2 or 3"):
        zero_bytes(model, stage=4)
    with pytest.raises(ValueError, match="has no effect at stage=2"):
        zero_bytes(model, stage=2, reshard_after_forward=False)


def test_zero_bytes_in_other_dtypes():
    model = MLP(3, 4, 2)
    half = {"weight_bytes": 2, "gradient_bytes": 8}
    assert zero_bytes(model, stage=0, **half) == {"all_reduce": 8 * (26 + 4)}
    assert zero_bytes(model, stage=3, **half) == {
        "reduce_scatter": 8 * 26,
        "all_gather": 2 * 2 * 26,
        "all_reduce": 4,
    }
    model[2].to(torch.float64)
    assert zero_bytes(model, stage=1)["all_gather"] == 4 * 16 + 8 * 10


def test_zero_bytes_move_frozen_weights_at_stage_3_only():
    model = MLP(3, 4, 2)
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    trained = {"reduce_scatter": 4 * 10, "all_gather": 4 * 10, "all_reduce": 2}
    assert zero_bytes(model, stage=0) == {"all_reduce": 4 * (10 + 2)}
    assert zero_bytes(model, stage=1) == trained
    assert zero_bytes(model, stage=3) == trained | {"all_gather": 2 * 4 * 26}


@given(n=st.integers(1, 64))
def test_stage_1_sends_what_an_all_reduce_sends_and_stage_3_half_as_much_again(n):
    model = MLP(5, 4, 3, 2)
    sent = []
    for stage in (1, 3):
        predicted = zero_bytes(model, stage=stage)
        del predicted["all_reduce"]  # the flags
        sent.append(sum(wire_bytes(op, nbytes, n) for op, nbytes in predicted.items()))
    whole = wire_bytes("all_reduce", sum(4 * p.numel() for p in model.parameters()), n)
    assert sent == pytest.approx([whole, 1.5 * whole])


def kept_bytes(model: nn.Module, forward) -> int:
    """Count the storages of floats that a forward keeps, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}  # the tensors too: a freed address could be used again

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(nbytes for nbytes, _ in kept.values())


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.float32, {}),
        (torch.float64, {"num_layers": 3, "num_heads": 8}),
        (torch.bfloat16, {"ffn_width": 17}),
        (torch.float32, {"tied": False, "vocab_size": 5, "width": 40}),
    ],
)
def test_activation_bytes_are_what_autograd_keeps(dtype, sizes):
    defaults = {"num_layers": 2, "width": 24, "num_heads": 4, "sequence_length": 11}
    model = GPT(GPTConfig(**{**defaults, **sizes})).to(dtype)
    tokens = torch.zeros(3, 11, dtype=torch.int64)
    kept = kept_bytes(model, lambda: cross_entropy(model(tokens), tokens))
    assert kept == activation_bytes(
        model.config.shape, batch_size=3, itemsize=dtype.itemsize
    )


class GatedGroupedBlock(nn.Module):
    """A block with two query heads for each key/value head, and a gate."""

    def __init__(self, D=24, N=4, K=2, width=36):
        super().__init__()
        self.heads = (N, K, K)
        self.norms = nn.ModuleList(nn.LayerNorm(D, bias=False) for _ in range(2))
        self.qkv = nn.Linear(D, (N + 2 * K) * D // N, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.gate, self.up = (nn.Linear(D, width, bias=False) for _ in range(2))
        self.down = nn.Linear(width, D, bias=False)

    def forward(self, x):
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (sum(self.heads), -1))
        q, k, v = heads.transpose(1, 2).split(self.heads, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def test_activation_bytes_of_a_gated_grouped_block():
    block = GatedGroupedBlock()
    x = torch.randn(3, 11, 24, requires_grad=True)
    config = GPTConfig(num_layers=1, width=24, num_heads=4, sequence_length=11)
    grouped = {"num_kv_heads": 2, "gated_mlp": True, "ffn_width": 36}
    one = replace(config.shape, **grouped)
    two = replace(one, num_layers=2)
    more = activation_bytes(two, batch_size=3) - activation_bytes(one, batch_size=3)
    assert kept_bytes(block, lambda: block(x)) == more


def test_activation_bytes_refuse_bad_sizes():
    shape = GPTConfig(num_layers=1, width=8, num_heads=2, sequence_length=4).shape
    assert activation_bytes(shape, batch_size=0) == 0
    with pytest.raises(ValueError, match="batch_size=-1"):
        activation_bytes(shape, batch_size=-1)
    with pytest.raises(ValueError, match="itemsize=0"):
        activation_bytes(shape, batch_size=1, itemsize=0)
