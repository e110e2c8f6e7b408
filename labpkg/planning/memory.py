"""Peak memory of a training job on its fullest GPU, term by term.

Contract: bytes of tensors that are allocated at the same time, as
`torch.cuda.max_memory_allocated` reports them. What is arithmetic is exact: elements of
a stage, bytes of their state (`state_bytes`), numbers that a layer keeps
(`layer_activation_bytes`), micro-batches that a schedule keeps (`stages.in_flight`).
`Constants` adds what kernels and the allocator cost. Mixed precision keeps half
weights, float32 gradients, a float32 copy and two moments for AdamW: 18 bytes each.

Letters: B micro-batch, T sequence, D width, F feed-forward, N heads, H head width, L
layers, V vocabulary, P ranks of the pipeline, M micro-batches. Standard library only.

Chapters: planning/memory, planning/planner. References: Rajbhandari et al. 2020,
arXiv:1910.02054; Korthikanti et al. 2022, arXiv:2205.05198; Narayanan et al. 2021,
arXiv:2104.04473; Dao et al. 2022, arXiv:2205.14135 (no attention scores).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from labpkg.planning.configuration import Configuration
from labpkg.planning.constants import FITTED, Constants
from labpkg.planning.hardware import Hardware
from labpkg.planning.stages import (
    StageShare,
    in_flight,
    layer_elements,
    stage_elements,
    stage_shares,
    stages_of_rank,
    stages_per_rank,
    waiting,
)
from labpkg.planning.terms import Term

_FULL = 4  # bytes of float32
_WHOLE_UNITS = {2: "gradients of a unit", 3: "weights of two units, gradients of one"}


class StateBytes(NamedTuple):
    """What one parameter, or a stage of them, keeps between steps.

    Attributes:
        weights: What the layers compute with.
        gradients: Sums over micro-batches.
        optimizer: Moments of AdamW, and the float32 copy of half weights.
    """

    weights: float
    gradients: float
    optimizer: float


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """Peak memory of one rank of the pipeline.

    Args:
        rank: On the axis pp; the fullest one if `peak_memory` made it.
        terms: Summands in bytes.
    """

    rank: int
    terms: tuple[Term, ...]

    @property
    def num_bytes(self) -> float:
        """The peak, the sum of the terms."""
        return sum(term.value for term in self.terms)


def peak_memory(
    configuration: Configuration, constants: Constants = FITTED
) -> PeakMemory:
    """Return the memory of the fullest GPU of a job.

    In a pipeline with one stage on each rank this is the first, which has the embedding
    and keeps most micro-batches, or the one with the head, which has the logits. With
    several, uneven stages can add up on another.

    Args:
        configuration: The job.
        constants: The fitted numbers.

    Returns:
        The terms of that GPU.
    """
    fullest = {
        rank: max(_moments(configuration, rank, constants), key=sum)
        for rank in sorted(_candidates(configuration, constants))
    }
    rank, parts = max(fullest.items(), key=lambda found: sum(found[1]))
    return PeakMemory(rank, _terms(configuration, rank, parts))


def usable_bytes(hardware: Hardware, constants: Constants = FITTED) -> float:
    """Return what tensors can fill of a GPU's memory.

    The rest holds the context, buffers of NCCL, and holes between tensors.

    Args:
        hardware: The GPU.
        constants: The fitted numbers.

    Returns:
        Bytes; a job fits if its peak is not above them.
    """
    return hardware.memory_bytes * (1 - constants.reserved_memory)


def state_bytes(elements: float, *, precision: str, zero: int, n: int) -> StateBytes:
    """Return what parameters keep between steps, with AdamW, on one of n ranks.

    In float32 4 + 4 + 8 bytes for each element. In mixed precision 2 + 4 + 12: half
    weights, float32 gradients, a float32 copy and two moments. At stage 3 the slices
    are that copy, and half weights exist only while a layer computes.

    Args:
        elements: Parameters of the rank if nothing is divided.
        precision: bf16, fp16 or fp32.
        zero: Stage: 1 divides the optimizer's part, 2 gradients too, 3 weights too.
        n: Ranks that divide.

    Returns:
        Bytes of an even cut.

    Reference:
        Rajbhandari et al. 2020, arXiv:1910.02054; float32 gradients as in Megatron-LM.
    """
    weight, gradient, optimizer = 4, 4, 8
    if precision != "fp32" and zero < 3:
        weight, optimizer = 2, 12
    return StateBytes(
        elements * weight / (n if zero >= 3 else 1),
        elements * gradient / (n if zero >= 2 else 1),
        elements * optimizer / (n if zero >= 1 else 1),
    )


def layer_activation_bytes(configuration: Configuration) -> float:
    """Return what one layer keeps of one micro-batch for backward, on one rank.

    Per token the inputs of its norms and matrices, queries, keys, values and the inputs
    of the activation function: 8 D + 2 F numbers (4 F with a gate) if keys are as wide
    as queries, two statistics for each norm, and one log-sum for each head. Rotary
    positions make queries and keys anew; the old ones stay, 2 D more, because values
    are a view of the same product. tp divides what lies inside attention and
    feed-forward; the other 4 D only with sequence parallelism. Scores are never kept,
    so selective recomputation saves nothing. With full recomputation only the input
    stays.

    Args:
        configuration: The job.

    Returns:
        Bytes: those that `labpkg.GPT` keeps on the CPU.

    Reference:
        Korthikanti et al. 2022, arXiv:2205.05198, section 4; log-sums instead of
        scores: Dao et al. 2022, arXiv:2205.14135.
    """
    c = configuration
    if c.recompute == "full":
        return _tokens(c) * _itemsize(c) * c.model.width / _outside(c)
    return _kept_by_layer(c)


def rank_memory(
    configuration: Configuration, rank: int, constants: Constants = FITTED
) -> PeakMemory:
    """Return the memory of the GPUs of one rank of the pipeline.

    Args:
        configuration: The job.
        rank: On the axis pp.
        constants: The fitted numbers.

    Returns:
        Its terms.

    Raises:
        ValueError: If the pipeline has no such rank.
    """
    return max(
        rank_moments(configuration, rank, constants),
        key=lambda memory: memory.num_bytes,
    )


def rank_moments(
    configuration: Configuration, rank: int, constants: Constants = FITTED
) -> tuple[PeakMemory, ...]:
    """Return what a rank holds at the moments one of which is its peak.

    Fullest is the loss, or a layer computed again when the logits are gone.

    Args:
        configuration: The job.
        rank: On the axis pp.
        constants: The fitted numbers.

    Returns:
        The memory at the loss, and while the last layer is computed again.

    Raises:
        ValueError: If the pipeline has no such rank.
    """
    if not 0 <= rank < configuration.pp:
        raise ValueError(
            f"rank={rank} is not in a pipeline of pp={configuration.pp}; choose 0 to "
            f"{configuration.pp - 1}"
        )
    return tuple(
        PeakMemory(rank, _terms(configuration, rank, parts))
        for parts in _moments(configuration, rank, constants)
    )


class _Parts(NamedTuple):
    """Bytes of each term, in order of the terms."""

    weights: float
    gradients: float
    optimizer: float
    buckets: float
    activations: float
    recomputed: float
    logits: float
    gathered: float


_SOURCES = (
    ("weights", "arXiv:1910.02054"),
    ("gradients", "arXiv:1910.02054"),
    ("optimizer state", "arXiv:1910.02054"),
    ("gradient buckets", "arXiv:2006.15704"),
    ("activations", "arXiv:2205.05198; fitted: activation_copies, gathered_inputs"),
    ("recomputed layer", "arXiv:1604.06174; fitted: activation_copies"),
    ("logits", "float32 for the loss; fitted: logit_copies"),
    ("gathered layers", "arXiv:2304.11277"),
)


def _moments(c: Configuration, rank: int, constants: Constants) -> tuple[_Parts, ...]:
    """At the loss, and while the last layer is computed again."""
    shares, counts = _shares(c, rank), in_flight(c, rank)
    elements = sum(stage_elements(share, c.model, tp=c.tp) for share in shares)
    heads = sum(n for n, share in zip(counts, shares, strict=True) if share.head)
    copy = _FULL * _tokens(c) * c.model.vocab_size / c.tp
    kept, again = _activations(c, rank, constants)
    kept += heads * _tokens(c) * _itemsize(c) * (2 * c.model.width + 2) / _outside(c)
    # Of micro-batches in flight one copy stays; only one of them has the others.
    copies = heads if c.fused_loss else heads - 1 + constants.logit_copies
    loss = _Parts(
        *state_bytes(elements, precision=c.precision, zero=_zero(c), n=c.dp * c.cp),
        buckets=_buckets(c, elements),
        activations=kept,
        recomputed=0.0,
        logits=copy * copies if heads else 0.0,
        gathered=_gathered(c, shares, elements),
    )
    return loss, loss._replace(recomputed=again, logits=copy * max(heads - 1, 0))


def _activations(
    c: Configuration, rank: int, constants: Constants
) -> tuple[float, float]:
    """What layers keep, and what the last one adds while it is computed again."""
    kept, again = _kept_layers(c, rank, [s.num_layers for s in _shares(c, rank)])
    whole, inputs = _layer_bytes(c, constants)
    if c.recompute != "full":
        return kept * whole, 0.0
    last = 0 if _keeps_recomputed(c) or not kept else whole - inputs
    return kept * inputs + again * (whole - inputs), last


def _kept_layers(c: Configuration, rank: int, layers: Sequence[int]) -> tuple[int, int]:
    """Layers times micro-batches that are kept, and kept whole after recomputation."""
    kept = sum(n * L for n, L in zip(in_flight(c, rank), layers, strict=True))
    if not _keeps_recomputed(c):
        return kept, 0
    return kept, sum(n * L for n, L in zip(waiting(c, rank), layers, strict=True))


def _keeps_recomputed(c: Configuration) -> bool:
    """Whether backward is split, so that what I computed again stays until W."""
    return c.recompute == "full" and c.pp > 1 and c.schedule.startswith("zb")


def _layer_bytes(c: Configuration, constants: Constants) -> tuple[float, float]:
    """One layer of one micro-batch: all that it keeps, and its input."""
    whole = _kept_by_layer(c) * constants.activation_copies
    whole += _kept_gathered(c) * constants.gathered_inputs
    return whole, layer_activation_bytes(c)


def _buckets(c: Configuration, elements: int) -> float:
    """Half gradients of a micro-batch, apart from their float32 sums, while dp > 1."""
    has_buckets = c.dp * c.cp > 1 and _zero(c) < 2 and c.precision != "fp32"
    return 2.0 * elements if has_buckets else 0.0


def _gathered(c: Configuration, shares: Sequence[StageShare], elements: int) -> float:
    """What is whole for a moment: gradients of a unit, at stage 3 weights of two."""
    if _zero(c) < 2:
        return 0.0
    unit = layer_elements(c.model, tp=c.tp)
    if any(share.embedding or share.head for share in shares):
        unit = max(unit, -(-c.model.vocab_size // c.tp) * c.model.width)
    weights = min(2 * unit, elements) if _zero(c) == 3 else 0
    return (weights + min(unit, elements)) * _itemsize(c)


def _kept_by_layer(c: Configuration) -> float:
    model, size = c.model, _itemsize(c)
    keys = -(-model.num_kv_heads // c.tp) * model.head_width
    queries = model.width / c.tp
    inner = (4 if model.gated_mlp else 2) * model.ffn_width / c.tp
    numbers = (4 * model.width + 4) / _outside(c) + 2 * queries + 2 * keys + inner
    if not model.learned_positions:
        numbers += queries + keys
    log_sums = max(size, _FULL) * model.num_heads / c.tp
    return _tokens(c) * (size * numbers + log_sums)


def _kept_gathered(c: Configuration) -> float:
    """What the inputs of a layer's two column products have beyond the own slice."""
    if not c.cuts_sequence:
        return 0.0
    return _tokens(c) * _itemsize(c) * 2 * c.model.width * (1 - 1 / c.tp)


def _zero(c: Configuration) -> int:
    """The stage of ZeRO; one rank alone has nothing to divide."""
    return c.zero if c.dp * c.cp > 1 else 0


def _outside(c: Configuration) -> int:
    """Ranks that divide what lies between the layers that tp cuts."""
    return c.tp if c.cuts_sequence else 1


def _tokens(c: Configuration) -> float:
    return c.micro_batch_size * c.model.sequence_length / c.cp


def _itemsize(c: Configuration) -> int:
    return _FULL if c.precision == "fp32" else 2


def _shares(c: Configuration, rank: int) -> list[StageShare]:
    shares = stage_shares(c.model, c.pp * stages_per_rank(c))
    return [shares[stage] for stage in stages_of_rank(c, rank)]


def _candidates(c: Configuration, constants: Constants) -> set[int]:
    """The ranks of which one is the fullest."""
    shares = [_shares(c, rank) for rank in range(c.pp)]
    found = {0} | {r for r, own in enumerate(shares) if any(s.head for s in own)}
    if stages_per_rank(c) > 1 or _keeps_recomputed(c):
        # Of ranks with as many layers the one that keeps most; their state is alike.
        whole, inputs = _layer_bytes(c, constants)
        best: dict[int, tuple[float, int]] = {}
        for rank, own in enumerate(shares):
            layers = [share.num_layers for share in own]
            kept, again = _kept_layers(c, rank, layers)
            full = kept * inputs + again * (whole - inputs), -rank
            best[sum(layers)] = max(best.get(sum(layers), full), full)
        found |= {-rank for _, rank in best.values()}
    return found


def _terms(c: Configuration, rank: int, parts: _Parts) -> tuple[Term, ...]:
    shares = _shares(c, rank)
    elements = sum(stage_elements(share, c.model, tp=c.tp) for share in shares)
    layers = "+".join(str(share.num_layers) for share in shares)
    times = "+".join(map(str, in_flight(c, rank)))
    tokens = f"{_tokens(c):.0f} tokens"
    zero, n = _zero(c), f" / {c.dp * c.cp} ranks"
    per = state_bytes(1, precision=c.precision, zero=zero, n=1)
    formulas = (
        f"{per.weights:.0f} x {elements} elements" + n * (zero >= 3),
        f"{per.gradients:.0f} x {elements} elements" + n * (zero >= 2),
        f"{per.optimizer:.0f} x {elements} elements" + n * (zero >= 1),
        f"2 x {elements} elements",
        f"{layers} layers x {times} micro-batches of {tokens}, recompute={c.recompute}",
        f"one layer of {tokens}, beyond its input",
        f"float32 V/tp = {c.model.vocab_size / c.tp:.0f}, {tokens}",
        f"whole for a moment: {_WHOLE_UNITS.get(zero)}",
    )
    return tuple(
        Term(name, value, formula, source)
        for (name, source), value, formula in zip(
            _SOURCES, parts, formulas, strict=True
        )
        if value
    )
