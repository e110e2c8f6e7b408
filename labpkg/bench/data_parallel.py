"""`DataParallel` against torch's DistributedDataParallel, in the same ranks.

A 10.9M-parameter GPT takes training steps with AdamW on two ranks of one thread each.
With micro batch 1 the step is bound by communication, with 8 by arithmetic. The base is
DDP at its fastest documented setting; its default, the two naive versions of this
library and the model without any communication (the limit) are measured beside it. On
the CPU `labpkg` averages through shared memory and `labpkg:messages` by gloo. Gradients
that travel in bfloat16 are compared with DDP's own compression.

Chapter: parallelism/data_parallel. Reference: Li et al. 2020, PVLDB 13(12):3005-3018,
arXiv:2006.15704.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from labpkg.bench.measure import Sample, alternate, compare
from labpkg.bench.steps import (
    LARGE,
    SMALL,
    Engine,
    Trained,
    check_losses,
    mesh_of_messages,
    training_step,
    with_adamw,
)
from labpkg.foundations.models import GPT, GPTConfig
from labpkg.parallelism.data_parallel import (
    DataParallel,
    average_gradients,
    average_gradients_bucketed,
)
from labpkg.processes.mesh import make_mesh
from labpkg.processes.world import World

BASE = "torch DDP (gradient_as_bucket_view, static_graph)"
BASE_BF16 = "torch DDP (gradient_as_bucket_view, static_graph, bf16_compress_hook)"
LIMIT = "no communication"

_GRADIENTS = {BASE: "", BASE_BF16: ", gradients sent in bfloat16"}


def rows(*, quick: bool = False) -> list[dict[str, Any]]:
    """Measure training steps of all variants.

    Args:
        quick: A small model and few rounds: the form of the answer, not its numbers.

    Returns:
        Rows as in `labpkg.bench.run`, milliseconds per step.

    Raises:
        RuntimeError: If a variant ends with another loss than the base.
    """
    config = SMALL if quick else LARGE
    size = f"{config.shape.num_parameters / 1e6:.1f}M GPT"
    found = []
    with World(2, timeout_s=None) as world:
        tables = world.run(lambda: {b: list(e) for b, e in _engines().items()})[0]
        for micro_batch_size in (1, 8):
            samples = world.run(_measure, config, micro_batch_size, quick)[0]
            where = f"{size}, 2 ranks on {world.device}"
            for base, names in tables.items():
                label = f"{where}, micro batch {micro_batch_size}{_GRADIENTS[base]}"
                table = {name: samples[name] for name in names}
                found += compare(table, base=base, config=label)
    return found


def _measure(
    config: GPTConfig, micro_batch_size: int, quick: bool
) -> dict[str, list[Sample]]:
    losses: dict[str, Tensor] = {}
    steps = {
        name: training_step(engine, config, micro_batch_size, losses, name)
        for table in _engines().values()
        for name, engine in table.items()
    }
    rounds, most = (2, 2) if quick else (12, 24)
    samples = alternate(
        steps, num_rounds=rounds, max_rounds=most, sample_s=0.01 if quick else 0.5
    )
    found = {name: loss.item() for name, loss in losses.items()}
    check_losses(found, base=BASE, limit=LIMIT)
    return samples


def _engines() -> dict[str, dict[str, Engine]]:
    """Return what is compared, by base; every rank calls it."""
    dp = make_mesh(dp=2)["dp"]
    fast = partial(_ddp, dp=dp, gradient_as_bucket_view=True, static_graph=True)
    meshes = {"": dp}
    if torch.get_default_device().type == "cpu":
        meshes[":messages"] = mesh_of_messages()
    tables: dict[str, dict[str, Engine]] = {
        BASE: {BASE: fast, "torch DDP (default)": partial(_ddp, dp=dp)},
        # DDP refuses this hook on gloo, by its name, though gloo adds bfloat16.
        BASE_BF16: {
            BASE_BF16: partial(fast, hook=lambda *bucket: bf16_compress_hook(*bucket))
        },
    }
    for where, mesh in meshes.items():
        tables[BASE]["labpkg" + where] = partial(_data_parallel, mesh=mesh)
        tables[BASE_BF16]["labpkg:bfloat16" + where] = partial(
            _data_parallel, mesh=mesh, reduce_dtype=torch.bfloat16
        )
    for average in (average_gradients, average_gradients_bucketed):
        tables[BASE][f"labpkg:{average.__name__}"] = lambda model, average=average: (
            with_adamw(model, partial(average, model, dp))
        )
    tables[BASE][LIMIT] = with_adamw
    return tables


def _ddp(model: GPT, *, dp: DeviceMesh, hook: Any = None, **options: Any) -> Trained:
    group = dp.get_group()
    replica = DistributedDataParallel(model, process_group=group, **options)
    if hook is not None:
        replica.register_comm_hook(group, hook)
    return with_adamw(replica)


def _data_parallel(model: GPT, *, mesh: DeviceMesh, **options: Any) -> Trained:
    return with_adamw(DataParallel(model, mesh, **options))
