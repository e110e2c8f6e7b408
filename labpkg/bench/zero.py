"""`ZeroOptimizer` and `fully_shard` against torch's engines, in the same ranks.

A 10.9M-parameter GPT takes training steps with AdamW on two ranks of one thread each,
one sequence at a time: such a step is bound by communication. Stages 1 and 2 are
compared with ZeroRedundancyOptimizer around DistributedDataParallel, stage 3 with
FSDP2, once freeing the gathered parameters after forward and once keeping them for
backward. The base is a peer at its fastest documented setting, its default is the
second row; on the CPU each stage runs through shared memory and by messages of gloo.

The peak of live tensor bytes during a step is counted after the times were taken.

Chapter: parallelism/zero. References: Rajbhandari et al. 2020, SC20, arXiv:1910.02054;
Zhao et al. 2023, PVLDB 16(12):3848-3860, arXiv:2304.11277.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard as fsdp2_fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from labpkg.bench.measure import Sample, alternate, compare
from labpkg.bench.memory import peak_bytes
from labpkg.bench.steps import (
    LARGE,
    LEARNING_RATE,
    SMALL,
    Engine,
    Trained,
    check_losses,
    mesh_of_messages,
    training_step,
    with_adamw,
)
from labpkg.foundations.models import GPT, GPTConfig
from labpkg.parallelism.fsdp import fully_shard
from labpkg.parallelism.zero import ZeroOptimizer
from labpkg.processes.mesh import make_mesh
from labpkg.processes.world import World

BASE = "torch ZeroRedundancyOptimizer + DDP (bucket views, static_graph)"
FREED = "torch FSDP2"
KEPT = "torch FSDP2 (reshard_after_forward=False)"

_STEPS = {BASE: "stages 1 and 2", FREED: "stage 3", KEPT: "stage 3, parameters kept"}
Engines = dict[str, Engine]


def rows(*, quick: bool = False) -> list[dict[str, Any]]:
    """Measure training steps of all stages.

    Args:
        quick: A small model and few rounds: the form of the answer, not its numbers.

    Returns:
        Rows as in `labpkg.bench.run`, milliseconds per step, and one more key:
        `peak_bytes`, of the rank that has most.

    Raises:
        RuntimeError: If a variant ends with another loss than the base.
    """
    config = SMALL if quick else LARGE
    found = []
    with World(2, timeout_s=None) as world:
        ranks = world.run(_measure, config, quick)
        size = f"{config.shape.num_parameters / 1e6:.1f}M GPT"
        where = f"{size}, 2 ranks on {world.device}, micro batch 1"
    for base, table in ranks[0][0].items():
        for row in compare(table, base=base, config=f"{where}, {_STEPS[base]}"):
            peak = max(peaks[row["variant"]] for _, peaks in ranks)
            found.append({**row, "peak_bytes": peak})
    return found


def _measure(
    config: GPTConfig, quick: bool
) -> tuple[dict[str, dict[str, list[Sample]]], dict[str, int]]:
    """Return the samples of each table, and this rank's peaks."""
    tables = _engines()
    engines = {name: e for table in tables.values() for name, e in table.items()}
    losses: dict[str, Tensor] = {}
    step = lambda name: training_step(engines[name], config, 1, losses, name)
    rounds, most = (2, 2) if quick else (12, 24)
    samples = alternate(
        {name: step(name) for name in engines},
        num_rounds=rounds,
        max_rounds=most,
        sample_s=0.01 if quick else 0.5,
    )
    check_losses({name: loss.item() for name, loss in losses.items()}, base=BASE)
    peaks = {name: peak_bytes(partial(step, name)) for name in engines}
    columns = {
        base: {name: samples[name] for name in table} for base, table in tables.items()
    }
    return columns, peaks


def _engines() -> dict[str, Engines]:
    """Return what is compared, by base; every rank calls it."""
    dp = make_mesh(dp=2)["dp"]
    meshes = {"": dp}
    if torch.get_default_device().type == "cpu":
        meshes[":messages"] = mesh_of_messages()
    fast = partial(_zero_redundancy, dp=dp, is_fast=True)
    default = partial(_zero_redundancy, dp=dp, is_fast=False)
    stages: Engines = {
        f"labpkg:stage {stage}{where}": partial(_stage_1_or_2, mesh=mesh, stage=stage)
        for stage in (1, 2)
        for where, mesh in meshes.items()
    }
    tables = {
        BASE: {
            BASE: fast,
            "torch ZeroRedundancyOptimizer + DDP (default)": default,
            **stages,
        }
    }
    for base, is_freed in ((FREED, True), (KEPT, False)):
        own = "labpkg:stage 3" if is_freed else "labpkg:stage 3, kept"
        tables[base] = {base: partial(_fsdp2, dp=dp, is_freed=is_freed)}
        for where, mesh in meshes.items():
            tables[base][own + where] = partial(_stage_3, mesh=mesh, is_freed=is_freed)
    return tables


def _zero_redundancy(model: GPT, *, dp: DeviceMesh, is_fast: bool) -> Trained:
    group = dp.get_group()
    replica = DistributedDataParallel(
        model,
        process_group=group,
        gradient_as_bucket_view=is_fast,
        static_graph=is_fast,
    )
    optimizer = ZeroRedundancyOptimizer(
        replica.parameters(),
        AdamW,
        process_group=group,
        parameters_as_bucket_view=is_fast,
        lr=LEARNING_RATE,
        fused=True,
    )
    return Trained(replica, optimizer)


def _fsdp2(model: GPT, *, dp: DeviceMesh, is_freed: bool) -> Trained:
    # By default the root module keeps its parameters: backward needs them at once.
    reshard = None if is_freed else False
    for module in (*model.blocks, model):
        fsdp2_fully_shard(module, mesh=dp, reshard_after_forward=reshard)
    return with_adamw(model)


def _stage_1_or_2(model: GPT, *, mesh: DeviceMesh, stage: int) -> Trained:
    optimizer = ZeroOptimizer(
        model.parameters(), AdamW, mesh, stage=stage, lr=LEARNING_RATE, fused=True
    )
    return Trained(model, optimizer)


def _stage_3(model: GPT, *, mesh: DeviceMesh, is_freed: bool) -> Trained:
    return with_adamw(fully_shard(model, mesh, reshard_after_forward=is_freed))
