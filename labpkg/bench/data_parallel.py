"""`DataParallel` against torch's DistributedDataParallel, in the same ranks.

A 10.9M-parameter GPT takes training steps with AdamW on two ranks of one thread each.
With micro batch 1 the step is bound by communication, with 8 by arithmetic. The base is
DDP at its fastest documented setting; its default, the two naive versions of this
library and the model without any communication (the limit) are measured beside it.
All variants start alike, see the same batches and must end with the same loss.

Chapter: parallelism/data_parallel. Reference: Li et al. 2020, PVLDB 13(12):3005-3018,
arXiv:2006.15704.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from labpkg.bench.measure import Sample, alternate, compare
from labpkg.foundations.losses import cross_entropy
from labpkg.foundations.models import GPT, GPTConfig
from labpkg.parallelism.data_parallel import (
    DataParallel,
    average_gradients,
    average_gradients_bucketed,
)
from labpkg.processes.mesh import make_mesh
from labpkg.processes.world import World

BASE = "torch DDP (gradient_as_bucket_view, static_graph)"
LIMIT = "no communication"

_LARGE = GPTConfig(
    num_layers=6, width=384, num_heads=6, sequence_length=128, tied=False
)
_SMALL = GPTConfig(num_layers=2, width=64, num_heads=2, sequence_length=32)


def rows(*, quick: bool = False) -> list[dict[str, Any]]:
    """Measure training steps of all variants.

    Args:
        quick: A small model and few rounds: the form of the answer, not its numbers.

    Returns:
        Rows as in `labpkg.bench.run`, milliseconds per step.

    Raises:
        RuntimeError: If a variant ends with another loss than the base.
    """
    config = _SMALL if quick else _LARGE
    size = f"{config.shape.num_parameters / 1e6:.1f}M GPT"
    found = []
    with World(2, timeout_s=None) as world:
        for micro_batch_size in (1, 8):
            samples = world.run(_measure, config, micro_batch_size, quick)[0]
            where = f"{size}, 2 ranks on {world.device}"
            label = f"{where}, micro batch {micro_batch_size}"
            found += compare(samples, base=BASE, config=label)
    return found


def _measure(
    config: GPTConfig, micro_batch_size: int, quick: bool
) -> dict[str, list[Sample]]:
    dp = make_mesh(dp=2)["dp"]
    generator = torch.Generator(torch.get_default_device())
    generator.manual_seed(dp.get_local_rank())
    shape = (micro_batch_size, config.sequence_length + 1)
    text = torch.randint(config.vocab_size, shape, generator=generator)
    losses: dict[str, Tensor] = {}
    steps = {
        name: _training_step(name, make, config, dp, text, losses)
        for name, make in _variants(dp).items()
    }
    rounds, most = (2, 2) if quick else (12, 24)
    samples = alternate(
        steps, num_rounds=rounds, max_rounds=most, sample_s=0.05 if quick else 0.5
    )
    _check_losses({name: loss.item() for name, loss in losses.items()})
    return samples


def _variants(dp: DeviceMesh) -> dict[str, tuple[Callable, Callable]]:
    """Return for each variant how to wrap the model and what to do after backward."""
    ddp = lambda model, **options: DistributedDataParallel(
        model, process_group=dp.get_group(), **options
    )
    fast = lambda model: ddp(model, gradient_as_bucket_view=True, static_graph=True)
    nothing = lambda model: None
    return {
        BASE: (fast, nothing),
        "torch DDP (default)": (ddp, nothing),
        "labpkg": (lambda model: DataParallel(model, dp), nothing),
        "labpkg:average_gradients": (
            lambda model: model,
            lambda model: average_gradients(model, dp),
        ),
        "labpkg:average_gradients_bucketed": (
            lambda model: model,
            lambda model: average_gradients_bucketed(model, dp),
        ),
        LIMIT: (lambda model: model, nothing),
    }


def _training_step(
    name: str,
    variant: tuple[Callable, Callable],
    config: GPTConfig,
    dp: DeviceMesh,
    text: Tensor,
    losses: dict[str, Tensor],
) -> Callable[[], None]:
    wrap, after_backward = variant
    torch.manual_seed(0)
    model: nn.Module = wrap(GPT(config))
    optimizer = AdamW(model.parameters(), lr=1e-4, fused=True)
    x, y = text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def step() -> None:
        loss = cross_entropy(model(x), y)
        loss.backward()
        after_backward(model)
        optimizer.step()
        optimizer.zero_grad()
        losses[name] = loss.detach()

    return step


def _check_losses(losses: dict[str, float]) -> None:
    """Raise if a variant did other work than the base: fast and wrong is no result."""
    for name, loss in losses.items():
        same = math.isclose(loss, losses[BASE], rel_tol=1e-2)
        if name != LIMIT and not same:
            raise RuntimeError(
                f"{name} ends with loss {loss:.6f}, {BASE} with {losses[BASE]:.6f}; "
                "they do not train alike, so their times say nothing"
            )
