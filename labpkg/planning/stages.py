"""Which layers each stage holds, how many numbers, and of how many micro-batches.

Time and memory of a pipeline are those of its fullest stage, so both need the same
answer. A stage is consecutive units of the model: the token embedding, L layers, the
head (final norm and output matrix). The rule is that of the published training runs.
The head of a large vocabulary works as long as several layers, so layers are dealt
around it; a head lighter than a layer is not counted and every stage gets L / P layers.
`labpkg.split_stages`, which cuts real modules, balances parameters instead: pass its
shares to `stage_elements` to compare.

Letters: L layers, P stages, D width, V vocabulary. Standard library only.

Chapters: planning/memory, planning/planner. References: Narayanan et al. 2021,
arXiv:2104.04473 (equal stages); https://github.com/huggingface/nanotron (by cost).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from labpkg.planning.configuration import Configuration
from labpkg.planning.shapes import ModelShape


class StageShare(NamedTuple):
    """What one stage holds.

    Attributes:
        num_layers: Consecutive layers.
        embedding: Whether it starts with the token embedding.
        head: Whether it ends with the final norm and the output matrix.
    """

    num_layers: int
    embedding: bool = False
    head: bool = False


def stages_per_rank(configuration: Configuration) -> int:
    """Return v, the stages that each rank of the pipeline holds.

    Args:
        configuration: Its schedule decides: interleaved takes `num_virtual_stages`,
            zb-v has two, the others one.

    Returns:
        At least 1.
    """
    if configuration.pp == 1:
        return 1
    if configuration.schedule == "interleaved":
        return configuration.num_virtual_stages
    return 2 if configuration.schedule == "zb-v" else 1


def stages_of_rank(configuration: Configuration, rank: int) -> tuple[int, ...]:
    """Return the stages of one rank of the pipeline, in order of forward.

    Args:
        configuration: Says how stages are dealt: in turn, or down and up again (zb-v).
        rank: Rank on the axis pp.

    Returns:
        Numbers of stages, from 0 to v P - 1.
    """
    P, v = configuration.pp, stages_per_rank(configuration)
    if v == 2 and configuration.schedule == "zb-v":
        return rank, 2 * P - 1 - rank
    return tuple(range(rank, v * P, P))


def in_flight(configuration: Configuration, rank: int) -> tuple[int, ...]:
    """Return how many micro-batches a rank keeps at its peak, for each of its stages.

    1F1B keeps min(P - r, M), GPipe all M. The sums are those of
    `Schedule.peak_in_flight`, but cost nothing for any M.

    Args:
        configuration: Says the schedule, P and M = `grad_accum_steps`.
        rank: r, on the axis pp.

    Returns:
        A number for each stage of the rank, in order of forward.
    """
    P, M = configuration.pp, configuration.grad_accum_steps
    schedule = configuration.schedule
    if P == 1:
        return (1,)
    if schedule == "gpipe":
        return (M,)
    if schedule == "zb-h1":
        return (min(P, M),)
    if schedule == "zb-v":
        return min(M, 2 * P - 1 - rank), min(M, rank + 1)
    v = stages_per_rank(configuration)
    return (min(P - rank, M),) if v == 1 else _in_flight_interleaved(P, M, v, rank)


def _in_flight_interleaved(P: int, M: int, v: int, rank: int) -> tuple[int, ...]:
    """Fill the stages of a rank group by group, as its warm-up does."""
    group = -(-M // max(1, M // P))
    left = min(v * M, (v - 1) * group + 2 * (P - 1 - rank) + 1)
    counts = [0] * v
    while left:
        for stage in range(v):
            taken = min(group, left)
            counts[stage] += taken
            left -= taken
    return tuple(counts)


def waiting(configuration: Configuration, rank: int) -> tuple[int, ...]:
    """Return for how many micro-batches of a split backward I is done and W is not.

    What I has computed again stays until W, so that recomputation saves little on late
    ranks: all of a stage is there, not one layer.

    Args:
        configuration: Its schedule is zb-h1 or zb-v.
        rank: r, on the axis pp.

    Returns:
        The most at once, for each stage of the rank, in order of forward; for zb-v
        with M < 2 P - 1 a bound from above.
    """
    M = configuration.grad_accum_steps
    most = min(M, rank + 1)
    return (most, min(M, rank)) if configuration.schedule == "zb-v" else (most,)


@lru_cache(maxsize=4096)
def stage_shares(model: ModelShape, num_stages: int) -> tuple[StageShare, ...]:
    """Return what each stage of a pipeline holds.

    Stage s ends with the layer that reaches the share (s + 1) / P of the work, so that
    earlier stages are the fuller ones, and none is empty as long as layers and head
    suffice. The head weighs V D beside the matrices of a layer, and nothing if that is
    less than one layer.

    Args:
        model: Sizes.
        num_stages: P, of all ranks together.

    Returns:
        A share for each stage.

    Raises:
        ValueError: If `num_stages` is below 1.
    """
    if num_stages < 1:
        raise ValueError(
            f"num_stages={num_stages} is below 1; choose a positive number"
        )
    L, P = model.num_layers, num_stages
    weight = head_weight(model)
    work = L + (weight if weight >= 1 else 0)
    counts, stage = [0] * P, 0
    for done in range(1, L + 1):
        counts[stage] += 1
        reached = done * P >= work * (stage + 1)
        must_move = L - done < P - 1 - stage  # a layer, or the head, for each one left
        if (reached or must_move) and stage < P - 1:
            stage += 1
    return tuple(StageShare(n, s == 0, s == stage) for s, n in enumerate(counts))


@lru_cache(maxsize=4096)
def head_weight(model: ModelShape) -> float:
    """Return the work of the output matrix in layers: V D over a layer's matrices.

    Args:
        model: Sizes.

    Returns:
        A ratio; 4 if the head works as long as four layers.
    """
    return model.vocab_size * model.width / layer_elements(model)


@lru_cache(maxsize=4096)
def layer_elements(model: ModelShape, *, tp: int = 1) -> int:
    """Return the elements of one layer's matrices on one rank of tp.

    Args:
        model: Sizes.
        tp: Ranks that divide heads and feed-forward width. With more ranks than
            key/value heads each holds a whole one, so that these are copied.

    Returns:
        Elements without the norms.
    """
    D, H = model.width, model.head_width
    queries = D * D // tp
    keys_and_values = 2 * D * H * -(-model.num_kv_heads // tp)
    feed_forward = (3 if model.gated_mlp else 2) * D * model.ffn_width // tp
    return 2 * queries + keys_and_values + feed_forward  # with the output projection


def stage_elements(share: StageShare, model: ModelShape, *, tp: int = 1) -> int:
    """Return the parameters that one rank holds of a stage.

    Embedding and output matrix are divided over the vocabulary, norms and positions are
    not. A tied matrix counts once where both its uses are, else once on each stage.

    Args:
        share: What the stage holds.
        model: Sizes.
        tp: Ranks that divide each layer.

    Returns:
        Elements of the rank that holds most: an uneven cut of the vocabulary is rounded
        up.
    """
    D = model.width
    matrix = -(-model.vocab_size // tp) * D
    elements = share.num_layers * (layer_elements(model, tp=tp) + 2 * D)
    if share.embedding:
        elements += matrix
        elements += model.sequence_length * D if model.learned_positions else 0
    if share.head:
        elements += D
        elements += 0 if model.tied and share.embedding else matrix
    return elements
