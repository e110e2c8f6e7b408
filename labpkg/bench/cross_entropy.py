"""The cross-entropy of a large vocabulary against torch's, forward and backward.

With V = 50,257 classes the logits of 1,024 tokens hold 200 MB, so the loss only moves
memory: the number of passes over the logits decides, and how many tensors of that size
stay alive until backward.

Chapter: foundations/cross_entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from labpkg.bench.measure import Sample, alternate, compare
from labpkg.foundations.losses import cross_entropy
from labpkg.processes.world import World

BASE = "torch"


def rows(*, quick: bool = False) -> list[dict[str, Any]]:
    """Measure loss and gradient of fp32 logits on one rank.

    Args:
        quick: A small vocabulary and few rounds: the form of the answer.

    Returns:
        Rows as in `labpkg.bench.run`, milliseconds for forward and backward. The base
        is torch's `cross_entropy`.
    """
    num_tokens, vocab_size = (64, 512) if quick else (1024, 50_257)
    with World(1, timeout_s=None) as world:
        samples = world.run(_measure, num_tokens, vocab_size, quick)[0]
        label = f"{num_tokens} tokens, {vocab_size} classes, {world.device}"
    return compare(samples, base=BASE, config=label)


def _measure(num_tokens: int, vocab_size: int, quick: bool) -> dict[str, list[Sample]]:
    logits = torch.randn(num_tokens, vocab_size, requires_grad=True)
    targets = torch.randint(vocab_size, (num_tokens,))

    def measured(loss_fn: Callable[..., torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            logits.grad = None
            loss_fn(logits, targets).backward()

        return call

    variants = {BASE: measured(F.cross_entropy), "labpkg": measured(cross_entropy)}
    rounds, most = (2, 2) if quick else (15, 45)
    sample_s = 0.01 if quick else 0.5
    return alternate(variants, num_rounds=rounds, max_rounds=most, sample_s=sample_s)
