"""Tensor parallelism: cut the matrices of a model over ranks that share every step.

A plan says for each layer along which dim it is cut. Column then row: the first matrix
of a pair is cut by output features, so each rank has whole hidden units and may apply
any elementwise function; the second by input features, so the ranks' results are terms
of a sum. One all_reduce for each pair forward (`g`), one backward (`f`).

The model file knows nothing of it. It must take the number of heads or hidden units
from what a layer returns: reshape with a fixed head width and -1 heads.

Chapter: parallelism/tensor_parallel. References: Shoeybi et al. 2019, Megatron-LM,
arXiv:1909.08053; Korthikanti et al. 2022, Reducing Activation Recomputation in Large
Transformer Models, arXiv:2205.05198 (sequence parallelism).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from labpkg.foundations.models import GPTConfig
from labpkg.processes.collectives import broadcast
from labpkg.processes.cuts import Cut, cut_of
from labpkg.processes.flat import shard_of
from labpkg.processes.messages import all_gather_object
from labpkg.processes.parallel_layers import (
    ColumnParallelLinear,
    Layout,
    ParallelLayer,
    RowParallelLinear,
    VocabParallelEmbedding,
    block_lengths,
    cut_layout,
)
from labpkg.processes.region_hooks import (
    Border,
    RankRandom,
    Region,
    SumGradients,
)
from labpkg.processes.region_plans import (
    SEES_WHOLE,
    Match,
    inside,
    match_plan,
)
from labpkg.processes.regions import join_sequence, split_sequence
from labpkg.processes.replicas import (
    broadcast_state,
    release,
    require_device,
    require_same_model,
)

_COLUMN = (nn.Linear, ColumnParallelLinear)
_VOCAB = (nn.Embedding, VocabParallelEmbedding)
_LAYERS: dict[str, tuple[type[nn.Module], type[ParallelLayer]]] = {
    "column": _COLUMN,
    "column_fused": _COLUMN,
    "column_gather": _COLUMN,
    "row": (nn.Linear, RowParallelLinear),
    "vocab": _VOCAB,
    "vocab_sequence": _VOCAB,
}
_SEQUENCE_ONLY = (*SEES_WHOLE, "sequence", "vocab_sequence")


def apply_tensor_parallel(
    model: nn.Module,
    mesh: DeviceMesh,
    plan: Mapping[str, str],
    *,
    sequence_parallel: bool = False,
) -> nn.Module:
    """Cut the layers that a plan names over the ranks of an axis, in place.

    Keys of the plan are `fnmatch` patterns over `model.named_modules()`, in which a
    star matches dots too; each must match a module. Values for an `nn.Linear`::

        column               output features are cut; each rank returns its own
        column:U             in units of U rows, such as a head: column:64
        column_fused:K       K equal matrices are stacked, each is cut: q, k, v
        column_fused:A+B:U   matrices of A and B rows; here in units of U rows
        column_gather        as column, but each rank returns all features: a head
        row, row:U           input features are cut; the outputs are added up

    For an `nn.Embedding`, and for any module::

        vocab                the vocabulary is cut; each rank returns all
        region               column layers inside that share an input enter it once
        partial              it sees the rank's heads or features: gradients add up
        dropout              its random numbers differ by rank, as slices need it

    With `sequence_parallel` activations between the layers are cut along T, dim 1:
    `column` gathers T, `row` returns this rank's positions. Each parameter must be
    named, for one that sees some positions has a part of its gradient only::

        sequence             a norm; any: gradients add up, but of what is named inside
        sequence_scatter     an embedding; any: its output is cut along T
        vocab_sequence       nn.Embedding: as vocab, and its output is cut along T
        sequence_gather      any: its first input is gathered along T
        whole                any: it sees all positions; nothing happens

    All ranks take parameters, buffers and torch's random state from rank 0 of the axis;
    on "meta" there is no value, see `materialize`. Inputs and output are the same on
    all ranks. Parameters stay the same objects, tied or not, and `cut_of` says how each
    is cut; gradients are dropped. Only a layer itself may use its weights.

    Args:
        model: The same on every rank but for values; it reshapes to -1 heads.
        mesh: The tensor-parallel axis, such as `mesh["tp"]`.
        plan: What becomes of which module; a stage takes that of the whole model.
        sequence_parallel: Cut activations along T between the layers.

    Returns:
        The model. Replicate or shard it afterwards, not before.

    Raises:
        ValueError: On every rank, the model unchanged: if the plan does not fit the
            model or n, or if models or plans differ by rank.

    Communication: here the state. In a step, for each pair of column and row, an
        all_reduce of (B, T, D) forward and backward; with `sequence_parallel` an
        all_gather and a reduce_scatter each, and an all_gather more backward.

    Reference: Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al. 2022,
        arXiv:2205.05198.
    """
    require_device(model, mesh, allows_meta=True)
    require_same_model(model, mesh)
    _require_same_plan(plan, sequence_parallel, mesh)
    matches = match_plan(model, plan)
    summed = _summed_parameters(model, matches, sequence_parallel)
    regions = _regions(matches, mesh)
    layouts = _layouts(matches, mesh, regions, sequence_parallel)
    _check_values(matches, sequence_parallel)
    _check_parameters(model, layouts)
    model.zero_grad()
    state = (*model.parameters(), *model.buffers())
    broadcast_state([t for t in state if cut_of(t) is None], mesh)  # cuts differ
    _share_random_state(mesh)
    for match, layout in layouts:
        match.module.__class__ = _LAYERS[match.rule.kind][1]
        cast(ParallelLayer, match.module).take_layout(layout)
    for match in matches:
        _add_hooks(match, mesh, regions, summed)
    return model


def gpt_tensor_parallel_plan(
    config: GPTConfig, *, sequence_parallel: bool = False, parallel_loss: bool = False
) -> dict[str, str]:
    """Return the plan that cuts a `GPT`: heads, hidden units and the vocabulary.

    Args:
        config: Of the model.
        sequence_parallel: For `apply_tensor_parallel` with the same option.
        parallel_loss: The model returns this rank's classes (B, T, V/n), for
            `vocab_parallel_cross_entropy`; otherwise all logits.

    Returns:
        The plan; the axis must divide the heads, the hidden units and the vocabulary.
    """
    head_width = config.shape.head_width
    plan = {
        "embedding.tokens": "vocab",
        "blocks.*.attention.qkv": f"column:{3 * head_width}",  # rows: head by head
        "blocks.*.attention.out": f"row:{head_width}",
        "blocks.*.mlp.up": "column",
        "blocks.*.mlp.down": "row",
        "head.output": "column" if parallel_loss else "column_gather",
    }
    if sequence_parallel:
        plan["embedding"] = "sequence_scatter"
        plan["blocks.*_norm"] = plan["head.norm"] = "sequence"
    return plan


def _require_same_plan(
    plan: Mapping[str, str], sequence_parallel: bool, mesh: DeviceMesh
) -> None:
    mine = (list(plan.items()), sequence_parallel)
    for rank, theirs in enumerate(all_gather_object(mine, mesh)):
        if theirs != mine:
            raise ValueError(
                f"rank {rank} of the axis has another plan: {theirs}, here {mine}; "
                "pass the same on every rank"
            )


def _regions(matches: list[Match], mesh: DeviceMesh) -> dict[nn.Module, Region]:
    """Return the region around each module that has one."""
    columns = {m.module for m in matches if m.rule.kind.startswith("column")}
    regions: dict[nn.Module, Region] = {}
    for match in matches:
        if match.rule.kind == "region":
            within = set(match.module.modules())
            if len(within & columns) < 2:
                raise ValueError(
                    f"{match.name}: 'region' lets column layers share an input, but "
                    f"the plan names {len(within & columns)} inside; leave it out"
                )
            regions |= dict.fromkeys(within, Region(mesh))
    return regions


def _layouts(
    matches: list[Match],
    mesh: DeviceMesh,
    regions: dict[nn.Module, Region],
    sequence_parallel: bool,
) -> list[tuple[Match, Layout]]:
    """Say how each layer that is to be cut will lie, or refuse."""
    whole = inside(matches, SEES_WHOLE)
    layouts = []
    for match in matches:
        layer, rule = match.module, match.rule
        if rule.kind not in _LAYERS:
            continue
        _check_layer(match)
        dim, blocks = _dim_and_blocks(match, mesh.size())
        layout = cut_layout(
            *(layer, mesh, dim, blocks),
            is_sequence=sequence_parallel
            and layer not in whole
            and rule.kind != "vocab",
            gathers=rule.kind == "column_gather",
            region=regions.get(layer),
        )
        layouts.append((match, layout))
    return layouts


def _dim_and_blocks(match: Match, n: int) -> tuple[int, tuple[int, ...]]:
    name, _, layer, rule = match
    if isinstance(layer, nn.Embedding):
        return 0, block_lengths(f"{name}: num_embeddings", layer.num_embeddings, n)
    assert isinstance(layer, nn.Linear)
    if rule.kind == "row":
        what, length = f"{name}: in_features", layer.in_features
        return 1, block_lengths(what, length, n, unit=rule.unit)
    what, length = f"{name}: out_features", layer.out_features
    if length % rule.num_blocks:
        raise ValueError(
            f"{what}={length} is not {rule.num_blocks} equal matrices; give their "
            "lengths, as in column_fused:64+16+16"
        )
    blocks = rule.blocks or (length // rule.num_blocks,) * rule.num_blocks
    return 0, block_lengths(what, length, n, unit=rule.unit, blocks=blocks)


def _check_layer(match: Match) -> None:
    name, _, layer, rule = match
    wanted = _LAYERS[rule.kind][0]
    if isinstance(layer, ParallelLayer):
        raise ValueError(
            f"{name} is parallel already; apply a plan once, or leave the layer out"
        )
    if type(layer) is not wanted:
        raise ValueError(
            f"{name} is a {type(layer).__name__}, but {rule.kind!r} cuts a "
            f"{wanted.__name__}; choose another value or another layer"
        )
    if isinstance(layer, nn.Embedding) and (
        layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse
    ):
        raise ValueError(
            f"{name}: max_norm, scale_grad_by_freq and sparse=True need the whole "
            "embedding; build it without"
        )


def _check_values(matches: list[Match], sequence_parallel: bool) -> None:
    """Refuse values without effect, and modules that were changed by a plan before."""
    whole = inside(matches, SEES_WHOLE)
    for name, _, module, rule in matches:
        if rule.kind in _SEQUENCE_ONLY and not sequence_parallel:
            raise ValueError(
                f"{name}: {rule.kind!r} has no effect without sequence_parallel=True; "
                "pass it, or leave the value out"
            )
        if rule.kind == "vocab" and sequence_parallel and module not in whole:
            raise ValueError(
                f"{name}: 'vocab' returns all positions, but sequence_parallel wants "
                "each rank's; choose 'vocab_sequence', or name the module around it "
                "'sequence_scatter'"
            )
        if hasattr(module, "_labpkg_rule"):
            raise ValueError(
                f"{name} was named by a plan before; apply a plan once, or leave the "
                "module out"
            )


def _check_parameters(model: nn.Module, layouts: list[tuple[Match, Layout]]) -> None:
    """Refuse parameters that another engine has, or that are tied to another cut."""
    cuts = {match.module: layout.cuts for match, layout in layouts}
    seen: dict[nn.Parameter, tuple[str, object]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(prefix, recurse=False):
            cut = cuts.get(module, {}).get(key.rpartition(".")[2])
            way, known = _way(cut), _way(cut_of(parameter))
            if known is not None and not isinstance(module, ParallelLayer):
                seen.setdefault(parameter, ("what another stage shares", known))
            name, first = seen.setdefault(parameter, (key, way))
            if first != way:
                raise ValueError(
                    f"{name} and {key} are one parameter, but would be cut in two "
                    "ways; name both layers so that the same dim is cut, e.g. 'vocab' "
                    "and 'column'"
                )
            if cut is not None:
                _require_free(key, parameter)


def _way(cut: Cut | None) -> tuple[int, tuple[int, ...]] | None:
    return None if cut is None else (cut.dim, cut.blocks)


def _require_free(name: str, parameter: nn.Parameter) -> None:
    if shard_of(parameter) is not None:
        raise ValueError(
            f"{name} is cut by ZeRO; apply tensor parallelism first, then shard"
        )
    release(name, parameter)


def _summed_parameters(
    model: nn.Module, matches: list[Match], sequence_parallel: bool
) -> set[nn.Parameter]:
    """Return the parameters of which each rank sees a slice, or refuse."""
    cut = {match.module for match in matches if match.rule.kind in _LAYERS}
    whole = inside(matches, SEES_WHOLE) | cut
    parts = inside(matches, ("sequence",)) - whole | inside(matches, ("partial",)) - cut
    seen: dict[nn.Parameter, tuple[str, bool]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            is_part = module in parts
            if sequence_parallel and not is_part and module not in whole:
                raise ValueError(
                    f"the plan does not name the module of {name}: if it sees a slice "
                    "of the sequence, each rank would have a part of its gradient "
                    "only; name it 'sequence', or 'whole' if it sees all positions"
                )
            first, was_part = seen.setdefault(parameter, (name, is_part))
            if was_part != is_part:
                raise ValueError(
                    f"{first} and {name} are one parameter, but one of them sees a "
                    "slice and the other all, so its gradient is neither a part nor "
                    "whole; name their modules alike"
                )
    return {parameter for parameter, (_, is_part) in seen.items() if is_part}


def _share_random_state(mesh: DeviceMesh) -> None:
    """Give all ranks of the axis the random state of rank 0."""

    def shared(state: Tensor) -> Tensor:
        return broadcast(state.to(mesh.device_type), mesh).cpu()

    torch.set_rng_state(shared(torch.get_rng_state()))
    if mesh.device_type == "cuda":
        torch.cuda.set_rng_state(shared(torch.cuda.get_rng_state()))


def _add_hooks(
    match: Match,
    mesh: DeviceMesh,
    regions: dict[nn.Module, Region],
    summed: set[nn.Parameter],
) -> None:
    module, kind = match.module, match.rule.kind
    cast(Any, module)._labpkg_rule = kind
    if kind == "region":
        regions[module].around(module)
    elif kind == "dropout":
        RankRandom(mesh).around(module)
    elif kind in ("partial", "sequence"):
        names = [name for name, p in module.named_parameters() if p in summed]
        SumGradients(mesh, names).around(module)
    elif kind == "sequence_scatter":
        Border(mesh, split_sequence).after(module)
    elif kind == "sequence_gather":
        Border(mesh, join_sequence).before(module)
