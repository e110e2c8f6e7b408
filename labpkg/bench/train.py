"""The single-process training step against its matrix products alone.

A matrix product is what the hardware does best and what a Transformer cannot avoid; the
rest of a step (norms, GELU, softmax, loss, optimizer) only moves memory. The ratio of
the two says how close a step is to the limit, on any machine: at 1 memory is free.

The products are those of the model with the same shapes, forward and backward, on one
thread: for a Linear y = x W^T, dx = g W and dW = g^T x; for attention Q K^T and P V and
the two gradients of each, over the full T x T square. They write into buffers that
exist already.

Chapter: planning/measuring. Reference: Williams, Waterman, Patterson 2009, Roofline,
CACM 52(4):65-76, doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from labpkg.bench.measure import Sample, alternate, compare
from labpkg.foundations.losses import cross_entropy
from labpkg.foundations.models import GPT, GPTConfig
from labpkg.foundations.optimizers import AdamW
from labpkg.planning.shapes import ModelShape
from labpkg.processes.world import World
from labpkg.runs.config import MODELS

BASE = "matrix products"

_BATCH_SIZES = {"gpt-1m": 32, "gpt-10m": 4}


def rows(*, quick: bool = False) -> list[dict[str, Any]]:
    """Measure training steps on one CPU thread.

    Args:
        quick: One sequence and few rounds: the form of the answer, not its numbers.

    Returns:
        Rows as in `labpkg.bench.run`, milliseconds per step. The base is the matrix
        products; beside `labpkg` stands the same model with torch's own loss and fused
        AdamW.
    """
    found = []
    batch_sizes = {"gpt-1m": 1} if quick else _BATCH_SIZES
    with World(1, device="cpu", timeout_s=None) as world:
        for name, batch_size in batch_sizes.items():
            samples = world.run(_measure, name, batch_size, quick)[0]
            label = f"{name}, batch {batch_size}, 1 thread"
            found += compare(samples, base=BASE, config=label)
    return found


def _measure(name: str, batch_size: int, quick: bool) -> dict[str, list[Sample]]:
    config = GPTConfig(**MODELS[name].sizes)
    shape = (batch_size, config.sequence_length + 1)
    text = torch.randint(config.vocab_size, shape)
    torch_loss = lambda logits, y: F.cross_entropy(logits.flatten(0, 1), y.flatten())
    torch_adamw = lambda params, **kwargs: torch.optim.AdamW(
        params, fused=True, **kwargs
    )
    variants = {
        BASE: _matrix_products(config.shape, batch_size),
        "labpkg": _training_step(config, text, cross_entropy, AdamW),
        "torch": _training_step(config, text, torch_loss, torch_adamw),
    }
    rounds, most = (2, 2) if quick else (12, 24)
    return alternate(
        variants, num_rounds=rounds, max_rounds=most, sample_s=0.01 if quick else 0.5
    )


def _training_step(
    config: GPTConfig,
    text: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer_cls: Callable[..., torch.optim.Optimizer],
) -> Callable[[], None]:
    torch.manual_seed(0)
    model = GPT(config)
    optimizer = optimizer_cls(model.parameters(), lr=1e-4)
    x, y = text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def step() -> None:
        loss_fn(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _matrix_products(shape: ModelShape, batch_size: int) -> Callable[[], None]:
    """Return a call that runs every matrix product of one training step."""
    tokens, width = batch_size * shape.sequence_length, shape.width
    sizes = [
        (width, 3 * width),
        (width, width),
        (width, shape.ffn_width),
        (shape.ffn_width, width),
    ] * shape.num_layers + [(width, shape.vocab_size)]
    linears = [_Linear(tokens, fan_in, fan_out) for fan_in, fan_out in sizes]
    attentions = [_Attention(shape, batch_size) for _ in range(shape.num_layers)]

    def run() -> None:
        for product in (*linears, *attentions):
            product()

    return run


class _Linear:
    """The products of a Linear layer: y = x W^T, dx = g W, dW = g^T x."""

    def __init__(self, num_tokens: int, fan_in: int, fan_out: int) -> None:
        self.x, self.dx = torch.randn(2, num_tokens, fan_in)
        self.w, self.dw = torch.randn(2, fan_out, fan_in)
        self.g, self.y = torch.randn(2, num_tokens, fan_out)

    def __call__(self) -> None:
        torch.mm(self.x, self.w.t(), out=self.y)
        torch.mm(self.g, self.w, out=self.dx)
        torch.mm(self.g.t(), self.x, out=self.dw)


class _Attention:
    """The products of attention over B N heads, forward and backward."""

    def __init__(self, shape: ModelShape, batch_size: int) -> None:
        num_heads, length = batch_size * shape.num_heads, shape.sequence_length
        self.q, self.k, self.v, self.out = torch.randn(
            4, num_heads, length, shape.head_width
        )
        self.p, self.s = torch.randn(2, num_heads, length, length)

    def __call__(self) -> None:
        k, v = self.k.transpose(1, 2), self.v.transpose(1, 2)
        torch.bmm(self.q, k, out=self.s)
        torch.bmm(self.p, self.v, out=self.out)
        torch.bmm(self.p.transpose(1, 2), self.q, out=self.out)  # dV = P^T dO
        torch.bmm(self.q, v, out=self.s)  # dP = dO V^T
        torch.bmm(self.p, self.k, out=self.out)  # dQ = dS K
        torch.bmm(self.p.transpose(1, 2), self.q, out=self.out)  # dK = dS^T Q
