"""What training costs, as formulas: bytes before a single byte is sent or stored.

Contract: S is the payload, the bytes of the full logical tensor; n is the number of
ranks on the axis. `wire_bytes` says what one rank sends for it, `activation_bytes`
what forward keeps for backward, `model_state_bytes` what stays between steps. The
counters of `labpkg.count_comms`, the hooks of autograd and `labpkg.live_tensor_bytes`
report the same numbers, so each formula is an assertion in a chapter.

Standard library only.

Chapters: foundations/transformer, processes/collectives, processes/communication_cost,
parallelism/data_parallel, parallelism/zero.
References: Thakur, Rabenseifner, Gropp 2005, Optimization of collective communication
operations in MPICH, doi:10.1177/1094342005051521; Patarasuk and Yuan 2009, Bandwidth
optimal all-reduce algorithms for clusters of workstations,
doi:10.1016/j.jpdc.2008.09.002; Rajbhandari et al. 2020, SC20, arXiv:1910.02054 (ZeRO);
Korthikanti et al. 2022, arXiv:2205.05198 (activations).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from labpkg.planning.shapes import ModelShape

# Bytes sent by one rank per byte of payload, on a ring of n > 1 ranks.
_SENT_PER_PAYLOAD_BYTE = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0,
    "reduce": lambda n: 1.0,
    "send": lambda n: 1.0,
}


class _Parameter(Protocol):
    @property
    def requires_grad(self) -> bool: ...
    def numel(self) -> int: ...
    def element_size(self) -> int: ...


class _Model(Protocol):
    def parameters(self) -> Iterable[_Parameter]: ...
    def buffers(self) -> Iterable[_Parameter]: ...


def wire_bytes(op: str, payload_bytes: float, n: int) -> float:
    """Return the bytes that one rank sends for one collective.

    A ring moves the least that any algorithm can: all_reduce 2 (n - 1)/n S (a
    reduce_scatter, then an all_gather), reduce_scatter and all_gather (n - 1)/n S,
    all_to_all (n - 1)/n S because a rank keeps its own piece. broadcast, reduce and
    send cost S on the rank that sends (the root of a pipelined broadcast; in a reduce
    every rank but the root).

    Args:
        op: name of the collective, as in `labpkg.all_reduce`.
        payload_bytes: S, bytes of the full logical tensor: the input of all_reduce,
            reduce_scatter, all_to_all, broadcast, reduce and send; the output of
            all_gather.
        n: ranks that take part; with one rank nothing is sent.

    Returns:
        Bytes, a float because a ring piece is S/n.

    Raises:
        ValueError: for an unknown `op`, a negative payload or n < 1.

    Reference:
        Thakur et al. 2005 and Patarasuk and Yuan 2009, see the module.
    """
    if op not in _SENT_PER_PAYLOAD_BYTE:
        known = ", ".join(sorted(_SENT_PER_PAYLOAD_BYTE))
        raise ValueError(f"op={op!r} is not a collective; choose one of {known}")
    if payload_bytes < 0 or n < 1:
        raise ValueError(
            f"payload_bytes={payload_bytes} and n={n} must be at least 0 and 1; "
            "give the size of the full tensor and the number of ranks"
        )
    return _SENT_PER_PAYLOAD_BYTE[op](n) * payload_bytes if n > 1 else 0.0


def data_parallel_bytes(
    model: _Model, *, itemsize: int | None = None, buffers: bool = False
) -> int:
    """Return the payload bytes that `labpkg.DataParallel` communicates per step.

    Each gradient travels once, and with each parameter one more element: the flag that
    tells whether any rank used it. So the sum is itemsize x (elements + parameters),
    over the parameters that require a gradient. The forward pass broadcasts buffers.

    Args:
        model: anything with `.parameters()` (a tied parameter must come once, as
            `torch.nn.Module` does it) and, if they count, `.buffers()`.
        itemsize: bytes of a number on its way, such as 2 with
            `reduce_dtype=torch.bfloat16`; by default as in the parameter.
        buffers: also count the broadcast of buffers, which a model without running
            statistics can leave out (`broadcast_buffers=False`).

    Returns:
        Payload bytes: those of the all_reduce of backward, which
        `wire_bytes("all_reduce", ..., n)` turns into sent bytes, and of the broadcast.

    Raises:
        ValueError: for an `itemsize` below 1.
    """
    if itemsize is not None and itemsize < 1:
        raise ValueError(f"itemsize={itemsize} is below 1; 2 is that of bfloat16")
    reduced = sum(
        (itemsize or parameter.element_size()) * (parameter.numel() + 1)
        for parameter in model.parameters()
        if parameter.requires_grad
    )
    sent = model.buffers() if buffers else ()
    return reduced + sum(b.element_size() * b.numel() for b in sent)


def model_state_bytes(
    num_elements: int,
    *,
    stage: int,
    n: int,
    weight_bytes: float = 4,
    gradient_bytes: float = 4,
    optimizer_bytes: float = 8,
) -> float:
    """Return the bytes of weights, gradients and optimizer state on one rank.

    Replicas keep all three whole. Stage 1 of ZeRO divides the optimizer state by n,
    stage 2 the gradients too, stage 3 the weights as well:
    num_elements x (weight + gradient + optimizer), each divided from its stage on.

    Args:
        num_elements: elements of all parameters.
        stage: 0 (every rank has everything) to 3 (every rank has a slice).
        n: ranks on the axis.
        weight_bytes: bytes of a weight.
        gradient_bytes: bytes of a gradient.
        optimizer_bytes: bytes of optimizer state for each element: 8 for AdamW in
            float32, 4 for momentum, 12 for AdamW with a float32 copy of half weights.

    Returns:
        Bytes of an even cut; real ranks differ by at most an element for each bucket.

    Raises:
        ValueError: for a stage outside 0 to 3, n < 1 or negative sizes.

    Reference:
        Rajbhandari et al. 2020, ZeRO: Memory Optimizations Toward Training Trillion
        Parameter Models, arXiv:1910.02054, section 3 and table 1.
    """
    _check_stage(stage)
    sizes = (num_elements, weight_bytes, gradient_bytes, optimizer_bytes)
    if min(sizes) < 0 or n < 1:
        raise ValueError(
            f"num_elements, weight_bytes, gradient_bytes, optimizer_bytes = {sizes} "
            f"must be at least 0 and n={n} at least 1; optimizer_bytes=0 is SGD "
            "without momentum"
        )
    first_cut_at = ((weight_bytes, 3), (gradient_bytes, 2), (optimizer_bytes, 1))
    per_element = [b / n if stage >= first else b for b, first in first_cut_at]
    return num_elements * sum(per_element)


def zero_bytes(
    model: _Model,
    *,
    stage: int,
    weight_bytes: int | None = None,
    gradient_bytes: int | None = None,
    reshard_after_forward: bool = True,
) -> dict[str, int]:
    """Return the payload bytes of each collective in one step of ZeRO.

    With P the bytes of the parameters, stage 0 all-reduces P (a rank sends 2 P); stages
    1 and 2 reduce-scatter P and all-gather P: the same bytes on the wire, because these
    are the halves of an all_reduce. Stage 3 gathers a second time, for backward: 3 P.
    At stages 1 to 3 one byte for each trainable parameter tells the ranks whether any
    of them used it; `DataParallel` spends one element on that. Frozen parameters are
    gathered at stage 3, and otherwise stay where they are.

    Args:
        model: the whole model, before `fully_shard` cuts it.
        stage: 0 (`DataParallel`) to 3 (`fully_shard`).
        weight_bytes: bytes of an element that is gathered, by default as stored.
        gradient_bytes: bytes of an element that is reduced, by default as stored.
        reshard_after_forward: whether stage 3 gathers for backward again. Frozen units
            before the first trainable one see no backward, and move less.

    Returns:
        Payload bytes by name of the collective: `wire_bytes` turns each into what a
        rank sends, and `labpkg.count_comms` counts the same.

    Raises:
        ValueError: for a stage outside 0 to 3, or if a stage below 3 should not
            reshard: it never frees weights.

    Reference:
        Rajbhandari et al. 2020, arXiv:1910.02054, section 7.
    """
    _check_stage(stage)
    if stage < 3 and not reshard_after_forward:
        raise ValueError(
            f"reshard_after_forward=False has no effect at stage={stage}, where "
            "weights stay whole; leave it out"
        )
    if stage == 0:
        return {"all_reduce": data_parallel_bytes(model, itemsize=gradient_bytes)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    gathered = model.parameters() if stage == 3 else trainable
    times = 2 if stage == 3 and reshard_after_forward else 1
    return {
        "all_gather": times * _total_bytes(gathered, weight_bytes),
        "reduce_scatter": _total_bytes(trainable, gradient_bytes),
        "all_reduce": len(trainable),
    }


def _total_bytes(parameters: Iterable[_Parameter], itemsize: int | None) -> int:
    return sum(p.numel() * (itemsize or p.element_size()) for p in parameters)


def _check_stage(stage: int) -> None:
    if stage not in (0, 1, 2, 3):
        raise ValueError(
            f"stage={stage} must be 0, 1, 2 or 3: stage 1 shards the optimizer state, "
            "2 the gradients too, 3 the weights as well"
        )


def activation_bytes(shape: ModelShape, *, batch_size: int, itemsize: int = 4) -> int:
    """Return the bytes of activations that forward keeps for backward.

    A block keeps, per token, the inputs of its two norms and of its matrices, queries,
    keys, values and the input of GELU: 8 D + 2 F numbers with full key/value heads and
    no gate, plus two statistics for each norm and the log-sum of each head. The head
    of the model keeps 2 D + 2, and the loss keeps the V logits. All of it grows with
    B T. The attention scores would grow with B T^2: they are computed again instead.

    Convention: floating-point tensors, each storage once, without the parameters, which
    exist anyway; token numbers and targets are not counted. It is exact for
    `labpkg.GPT` with `labpkg.cross_entropy` on the CPU. On a GPU the norms keep float32
    statistics in half precision too, a kernel may pad the log-sums, and attention
    without a fused kernel keeps the scores.

    Args:
        shape: sizes, with T tokens in each sequence; a feed-forward part with a gate is
            down(silu(gate x) * up x).
        batch_size: B, sequences.
        itemsize: bytes of a number; the log-sums have at least four.

    Returns:
        Bytes.

    Raises:
        ValueError: for a negative `batch_size` or an `itemsize` below 1.

    Reference:
        Korthikanti et al. 2022, arXiv:2205.05198; log-sums instead of scores: Dao et
        al. 2022, arXiv:2205.14135.
    """
    if batch_size < 0 or itemsize < 1:
        raise ValueError(
            f"batch_size={batch_size} must be at least 0 and itemsize={itemsize} at "
            "least 1; itemsize is 4 for float32"
        )
    D, F = shape.width, shape.ffn_width
    keys_and_values = 2 * shape.num_kv_heads * shape.head_width
    attention = (D + 2) + D + (D + keys_and_values) + D  # norm, qkv, scores, out
    feed_forward = (D + 2) + D + (4 if shape.gated_mlp else 2) * F
    head = (D + 2) + D + shape.vocab_size
    numbers = shape.num_layers * (attention + feed_forward) + head
    log_sums = shape.num_layers * shape.num_heads * max(itemsize, 4)
    return batch_size * shape.sequence_length * (itemsize * numbers + log_sums)
