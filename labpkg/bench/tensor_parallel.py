"""`apply_tensor_parallel` against DTensor's `parallelize_module`, in the same ranks.

A 10.9M-parameter GPT takes training steps with AdamW on two ranks of one thread each.
With micro batch 1 Python and latency decide, with 8 arithmetic. Both sides cut the same
layers: embedding, attention by heads, feed-forward, head; both with separate matrices
for queries, keys and values, then with the fused one of `GPT`. The base is DTensor at
its fastest documented setting, where a module is a region that its input enters once;
by default the input enters each column layer, with an all_reduce each in backward.
Sequence parallelism has a table of its own.

Chapter: parallelism/tensor_parallel. References: Shoeybi et al. 2019, Megatron-LM,
arXiv:1909.08053; Korthikanti et al. 2022, arXiv:2205.05198.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.optim import AdamW

from labpkg.bench.measure import Sample, alternate, compare
from labpkg.bench.steps import (
    LARGE,
    LEARNING_RATE,
    SMALL,
    Engine,
    Trained,
    check_losses,
    training_step,
    with_adamw,
)
from labpkg.foundations.models import GPT, Attention, GPTConfig
from labpkg.parallelism.tensor_parallel import (
    apply_tensor_parallel,
    gpt_tensor_parallel_plan,
)
from labpkg.processes.mesh import make_mesh
from labpkg.processes.world import World

BASE = "torch DTensor (one input for q, k, v)"
BASE_SEQUENCE = "torch DTensor (sequence parallel)"

_KINDS = {BASE: "", BASE_SEQUENCE: ", sequence parallel"}


def rows(*, quick: bool = False) -> list[dict[str, Any]]:
    """Measure training steps of all variants.

    Args:
        quick: A small model and few rounds: the form of the answer, not its numbers.

    Returns:
        Rows as in `labpkg.bench.run`, milliseconds per step.

    Raises:
        RuntimeError: If a variant ends with another loss than the base.
    """
    config = replace(SMALL, tied=False) if quick else LARGE  # DTensor would untie
    size = f"{config.shape.num_parameters / 1e6:.1f}M GPT"
    found = []
    with World(2, timeout_s=None) as world:
        for micro_batch_size in (1, 8):
            tables = world.run(_measure, config, micro_batch_size, quick)[0]
            for base, samples in tables.items():
                where = f"{size}, 2 ranks on {world.device}"
                where += f", micro batch {micro_batch_size}{_KINDS[base]}"
                found += compare(samples, base=base, config=where)
    return found


def _measure(
    config: GPTConfig, micro_batch_size: int, quick: bool
) -> dict[str, dict[str, list[Sample]]]:
    """Return the samples of each table by its base."""
    tables = _engines()
    losses: dict[str, Tensor] = {}
    step = partial(
        training_step,
        config=config,
        micro_batch_size=micro_batch_size,
        losses=losses,
        is_replicated=True,
    )
    rounds, most = (2, 2) if quick else (12, 24)
    samples = alternate(
        {
            name: step(engine, name=name)
            for table in tables.values()
            for name, engine in table.items()
        },
        num_rounds=rounds,
        max_rounds=most,
        sample_s=0.01 if quick else 0.5,
    )
    check_losses({name: loss.item() for name, loss in losses.items()}, base=BASE)
    return {
        base: {name: samples[name] for name in table} for base, table in tables.items()
    }


def _engines() -> dict[str, dict[str, Engine]]:
    """Return what is compared, by base; every rank calls it."""
    tp = make_mesh(tp=2)["tp"]
    ours, theirs = partial(_ours, tp=tp), partial(_theirs, tp=tp)
    sequence = {"sequence_parallel": True}
    return {
        BASE: {
            BASE: theirs,
            "torch DTensor (default)": partial(theirs, has_regions=False),
            "torch DTensor (fused q, k, v)": partial(theirs, fused=True),
            "labpkg": ours,
            "labpkg:fused": partial(ours, fused=True),
        },
        BASE_SEQUENCE: {
            BASE_SEQUENCE: partial(theirs, **sequence),
            "torch DTensor (fused q, k, v, sequence parallel)": partial(
                theirs, fused=True, **sequence
            ),
            "labpkg:sequence parallel": partial(ours, **sequence),
            "labpkg:fused, sequence parallel": partial(ours, fused=True, **sequence),
        },
    }


class SplitAttention(nn.Module):
    """Attention with a matrix each for queries, keys and values.

    Args:
        fused: Whose weights it takes.

    Shape:
        x (B, T, D) -> (B, T, D)
    """

    def __init__(self, fused: Attention) -> None:
        super().__init__()
        self.head_width, self.out = fused.head_width, fused.out
        width = fused.qkv.in_features
        heads = fused.qkv.weight.detach().unflatten(0, (-1, 3, self.head_width))
        weights = heads.transpose(0, 1).flatten(1, 2).unbind()  # (D, D)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in weights)
        for layer, weight in zip((self.q, self.k, self.v), weights, strict=True):
            layer.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor, cache: None = None) -> Tensor:
        """Return what each position reads from itself and the positions before it."""
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )  # (B, N, T, H)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))  # (B, T, D)


def _split(model: GPT) -> GPT:
    for block in model.blocks:
        block.attention = SplitAttention(block.attention)  # pyright: ignore
    return model


def _ours(
    model: GPT,
    *,
    tp: DeviceMesh,
    fused: bool = False,
    sequence_parallel: bool = False,
) -> Trained:
    options = {"sequence_parallel": sequence_parallel}
    plan = gpt_tensor_parallel_plan(model.config, **options)
    if not fused:
        _split(model)
        del plan["blocks.*.attention.qkv"]
        plan["blocks.*.attention"] = "region"
        plan["blocks.*.attention.[qkv]"] = f"column:{model.config.shape.head_width}"
    return with_adamw(apply_tensor_parallel(model, tp, plan, **options))


def _theirs(
    model: GPT,
    *,
    tp: DeviceMesh,
    fused: bool = False,
    sequence_parallel: bool = False,
    has_regions: bool = True,
) -> Trained:
    if not fused:
        _split(model)
    outside = Shard(1) if sequence_parallel else Replicate()
    columns = ("qkv",) if fused else tuple("qkv")
    plan: dict[str, ParallelStyle] = {
        "embedding.tokens": RowwiseParallel(input_layouts=Replicate()),
        "head.output": ColwiseParallel(
            input_layouts=outside, output_layouts=Replicate()
        ),
        "blocks.*.attention.out": RowwiseParallel(output_layouts=outside),
        "blocks.*.mlp.up": ColwiseParallel(),
        "blocks.*.mlp.down": RowwiseParallel(output_layouts=outside),
    }
    plan |= {f"blocks.*.attention.{name}": ColwiseParallel() for name in columns}
    if has_regions:
        # Blocks call attention with a second argument, the cache.
        for module, others in (("attention", (None,)), ("mlp", ())):
            plan[f"blocks.*.{module}"] = PrepareModuleInput(
                input_layouts=(outside, *others),
                desired_input_layouts=(Replicate(), *others),
            )
    if sequence_parallel:
        for norm in ("blocks.*.attention_norm", "blocks.*.mlp_norm", "head.norm"):
            plan[norm] = SequenceParallel()
        plan["embedding"] = PrepareModuleOutput(
            output_layouts=Replicate(), desired_output_layouts=Shard(1)
        )
    parallelize_module(model, tp, plan)
    # The fused kernel takes no list that mixes both kinds.
    kinds = [[], []]
    for parameter in model.parameters():
        kinds[isinstance(parameter, DTensor)].append(parameter)
    groups = [{"params": kind} for kind in kinds if kind]
    return Trained(model, AdamW(groups, lr=LEARNING_RATE, fused=True))
