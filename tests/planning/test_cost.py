import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labpkg.foundations.models import GPT, MLP, GPTConfig
from labpkg.planning.cost import data_parallel_bytes, wire_bytes


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


def test_data_parallel_bytes_counts_tied_weights_once():
    sizes = {"num_layers": 1, "width": 8, "num_heads": 2, "sequence_length": 4}
    tied, untied = GPT(GPTConfig(**sizes)), GPT(GPTConfig(**sizes, tied=False))
    assert data_parallel_bytes(untied) - data_parallel_bytes(tied) == 4 * (256 * 8 + 1)
