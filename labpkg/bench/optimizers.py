"""AdamW against torch's three forms of it: loop, lists of tensors, fused.

A step of AdamW computes little and moves much. Written as a chain of operations it
reads and writes every parameter-sized tensor again and again, 18 elements per parameter
here and 20 in torch's loop and lists; the fused kernel moves 7. A loop runs the chain
for one tensor at a time, which stays in the cache if it is small; lists need few
kernels, which counts on a GPU.

Chapter: foundations/gradient_descent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from labpkg.bench.measure import Sample, alternate, compare
from labpkg.foundations.models import GPT, GPTConfig
from labpkg.foundations.optimizers import AdamW
from labpkg.processes.world import World
from labpkg.runs.config import MODELS

BASE = "torch:fused"

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    BASE: lambda params, **given: torch.optim.AdamW(params, fused=True, **given),
    "torch:foreach": lambda params, **given: torch.optim.AdamW(
        params, foreach=True, **given
    ),
    "torch:loop": lambda params, **given: torch.optim.AdamW(
        params, foreach=False, **given
    ),
    "labpkg": AdamW,
}


def rows(*, quick: bool = False) -> list[dict[str, Any]]:
    """Measure optimizer steps on one rank, without forward and backward.

    Args:
        quick: A small model and few rounds: the form of the answer.

    Returns:
        Rows as in `labpkg.bench.run`, milliseconds per step. The base is torch's fused
        kernel. torch's default is its loop on the CPU and its lists on a GPU; `labpkg`
        is written with lists, like `torch:foreach`.
    """
    name = "gpt-1m" if quick else "gpt-10m"
    with World(1, timeout_s=None) as world:
        samples = world.run(_measure, name, quick)[0]
        label = f"AdamW, parameters of {name}, {world.device}"
    return compare(samples, base=BASE, config=label)


def _measure(name: str, quick: bool) -> dict[str, list[Sample]]:
    config = GPTConfig(**MODELS[name].sizes)
    steps = {key: _step(config, make) for key, make in _OPTIMIZERS.items()}
    rounds, most = (2, 2) if quick else (15, 45)
    sample_s = 0.01 if quick else 0.5
    return alternate(steps, num_rounds=rounds, max_rounds=most, sample_s=sample_s)


def _step(
    config: GPTConfig, make: Callable[..., torch.optim.Optimizer]
) -> Callable[[], object]:
    torch.manual_seed(0)
    model = GPT(config)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return make(model.parameters(), lr=1e-4).step
