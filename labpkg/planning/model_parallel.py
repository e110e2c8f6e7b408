"""What tensor and pipeline parallelism send, as formulas over layers and schedules.

Contract: payload bytes of one rank in a forward and a backward pass, as
`labpkg.count_comms` counts them; `wire_bytes` says what a rank sends for them. Tensor
parallelism moves activations within each layer, a pipeline moves them once for each
border of two stages: which axis wants the faster link is a division.

Letters: B batch, T sequence, D width, M micro-batches. Standard library only.

Chapters: parallelism/tensor_parallel, parallelism/pipeline.
References: Shoeybi et al. 2019, Megatron-LM, arXiv:1909.08053; Korthikanti et al. 2022,
arXiv:2205.05198 (sequence parallelism); Narayanan et al. 2021, arXiv:2104.04473.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from labpkg.planning.actions import Schedule
from labpkg.planning.shapes import ModelShape


class LayerCut(NamedTuple):
    """One layer of a tensor-parallel plan.

    Attributes:
        kind: Its value in the plan, such as `column` or `row:64`. Column layers inside
            a `region` enter with it and are left out.
        in_features: Of the whole layer; of `sequence` and `partial` the elements of
            their parameters.
        out_features: Of the whole layer.
    """

    kind: str
    in_features: int
    out_features: int


def gpt_layer_cuts(
    shape: ModelShape, *, sequence_parallel: bool = False, parallel_loss: bool = False
) -> list[LayerCut]:
    """Return the layers that `labpkg.gpt_tensor_parallel_plan` names in a model.

    Args:
        shape: Sizes; a gate is a column layer of its own.
        sequence_parallel: As for the plan: norms see a slice of the sequence.
        parallel_loss: As for the plan: the logits stay cut.

    Returns:
        The layers in order of forward, for `tensor_parallel_bytes`.
    """
    D, F = shape.width, shape.ffn_width
    qkv = D + 2 * shape.num_kv_heads * shape.head_width
    norm = [LayerCut("sequence", D, D)] if sequence_parallel else []
    embedding = [LayerCut("vocab", shape.vocab_size, D)]
    if sequence_parallel:
        embedding.append(LayerCut("sequence_scatter", D, D))
    attention = [*norm, LayerCut("column", D, qkv), LayerCut("row", D, D)]
    up = [LayerCut("column", D, F)] * (2 if shape.gated_mlp else 1)
    feed_forward = [*norm, *up, LayerCut("row", F, D)]
    output = LayerCut(
        "column" if parallel_loss else "column_gather", D, shape.vocab_size
    )
    blocks = shape.num_layers * (attention + feed_forward)
    return [*embedding, *blocks, *norm, output]


def tensor_parallel_bytes(
    layers: Iterable[tuple[str, int, int]],
    *,
    tokens: int,
    itemsize: int = 4,
    sequence_parallel: bool = False,
    parallel_loss: bool = False,
) -> dict[str, int]:
    """Return the payload bytes of each collective in a forward and a backward pass.

    A `column` layer of K input features enters a region: an all_reduce of the gradient
    (B T, K) backward. A `row` layer of N output features leaves it: an all_reduce of
    (B T, N) forward. So a Transformer block moves 4 B T D numbers, whatever n is. With
    `sequence_parallel` each becomes an all_gather and a reduce_scatter, the same bytes
    on the wire, and `column` gathers its input once more for dW instead of keeping it.

    Args:
        layers: Each a `LayerCut`, or such a tuple, of a model that is trained, its
            embedding too: a first layer whose input needs no gradient sends nothing.
        tokens: B T, of the whole sequences.
        itemsize: Bytes of an activation, and of a parameter of `sequence`.
        sequence_parallel: Cut activations along T between the layers.
        parallel_loss: Count `labpkg.vocab_parallel_cross_entropy`, too: three numbers
            for each token, of at least four bytes.

    Returns:
        Payload bytes by name of the collective: `wire_bytes` turns each into what a
        rank sends, and `labpkg.count_comms` counts the same.

    Raises:
        ValueError: for an unknown kind, negative `tokens` or an `itemsize` below 1.

    Reference:
        Shoeybi et al. 2019, arXiv:1909.08053, section 3; Korthikanti et al. 2022,
        arXiv:2205.05198, section 4.
    """
    if tokens < 0 or itemsize < 1:
        raise ValueError(
            f"tokens={tokens} must be at least 0 and itemsize={itemsize} at least 1; "
            "tokens are B x T, itemsize is 4 for float32"
        )
    sent: Counter[str] = Counter()
    for kind, in_features, out_features in layers:
        sizes = tokens * in_features, tokens * out_features, in_features
        for op, numbers in _cut_traffic(kind, *sizes, sequence_parallel):
            sent[op] += numbers * itemsize
    if parallel_loss:
        sent["all_reduce"] += 3 * tokens * max(itemsize, 4)
    return dict(sent)


def _cut_traffic(
    kind: str, entering: int, leaving: int, elements: int, in_slices: bool
) -> list[tuple[str, int]]:
    """Return collectives and the numbers that each moves for one layer."""
    if in_slices:
        enter = [("all_gather", entering), ("reduce_scatter", entering)]
        leave = [("reduce_scatter", leaving), ("all_gather", leaving)]
        column = [*enter, ("all_gather", entering)]
    else:
        enter = column = [("all_reduce", entering)]
        leave = [("all_reduce", leaving)]
    traffic = {
        "column": column,
        "column_fused": column,
        "column_gather": [*column, ("all_gather", leaving)],
        "row": leave,
        "region": enter,
        "vocab": [("all_reduce", leaving)],
        "partial": [("all_reduce", elements)],
        "dropout": [],
    }
    if in_slices:
        traffic |= {
            "vocab_sequence": leave,
            "sequence": [("all_reduce", elements)],
            "sequence_scatter": [("all_gather", leaving)],
            "sequence_gather": [("all_gather", entering)],
            "whole": [],
        }
    name = kind.partition(":")[0]
    if name not in traffic:
        raise ValueError(
            f"kind={kind!r} is none of {', '.join(traffic)} (sequence_parallel="
            f"{in_slices}); give the values of the plan"
        )
    return traffic[name]


def pipeline_bytes(
    schedule: Schedule,
    rank: int,
    *,
    activation_bytes: int | Sequence[int],
    tied_bytes: int = 0,
) -> int:
    """Return the payload bytes that one rank of a pipeline sends in a step.

    Each micro-batch crosses the border of two stages forward, and its gradient, as
    large, backward; borders inside a rank cost nothing. So with one stage on each rank
    an inner rank sends 2 M A, for A bytes of activations: B T D numbers, little beside
    the 4 B T D of each block of tensor parallelism.

    Args:
        schedule: Which rank has which stages.
        rank: The rank.
        activation_bytes: A, what one micro-batch brings from a stage to the next, the
            same at each border, or one number for each.
        tied_bytes: Of a parameter that the first and the last stage hold: each sends
            the other its gradient.

    Returns:
        Payload bytes of the messages, which is also what is sent. `labpkg.count_comms`
        counts the same under `send`; the mean loss travels besides.

    Raises:
        ValueError: for a rank that the schedule does not have, or another number of
            borders.

    Reference:
        Narayanan et al. 2021, arXiv:2104.04473, section 3.2.
    """
    last = schedule.num_stages - 1
    sizes = activation_bytes
    if isinstance(sizes, int):
        sizes = [sizes] * last
    if len(sizes) != last:
        raise ValueError(
            f"activation_bytes has {len(sizes)} numbers, but {last + 1} stages have "
            f"{last} borders; give one number for each, or one for all"
        )
    sent = [m for m in schedule.messages(rank) if m.src == rank]
    crossed = (min(m.producer.stage, m.consumer.stage) for m in sent)
    ends = {schedule.rank_of(0), schedule.rank_of(last)}
    is_tied = len(ends) == 2 and rank in ends
    return sum(sizes[border] for border in crossed) + tied_bytes * is_tied
