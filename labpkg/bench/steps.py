"""Training steps that engines are compared by: one model, one batch, one loss.

A GPT of 10.9M parameters learns by AdamW. All engines start alike, see the same batches
and must end with the same loss.

# Note [a step ends with forward]
An engine may leave a transfer in flight when its optimizer has ended, for the next
forward to wait for. So a step here is backward, optimizer, then the next forward: what
one variant has started it ends itself, and each sample holds as much as any other.

Chapter: planning/measuring.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import AdamW, Optimizer

from labpkg.foundations.losses import cross_entropy
from labpkg.foundations.models import GPT, GPTConfig
from labpkg.processes import transport

LARGE = GPTConfig(num_layers=6, width=384, num_heads=6, sequence_length=128, tied=False)
SMALL = GPTConfig(num_layers=2, width=64, num_heads=2, sequence_length=32)
LEARNING_RATE = 1e-4


class Trained(NamedTuple):
    """A model under an engine.

    Attributes:
        model: What is called.
        optimizer: What steps.
        after_backward: What is to be done between backward and the step.
    """

    model: nn.Module
    optimizer: Optimizer
    after_backward: Callable[[], object] = lambda: None


Engine = Callable[[GPT], Trained]


def with_adamw(
    model: nn.Module, after_backward: Callable[[], object] = lambda: None
) -> Trained:
    """Return a model that torch's fastest AdamW trains."""
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    return Trained(model, optimizer, after_backward)


def mesh_of_messages() -> DeviceMesh:
    """Return an axis of all ranks that gets no shared memory, as between hosts.

    Every rank calls it. The mesh has a group of its own: a mesh of all ranks would
    share their first group, and the shared memory with it.
    """
    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)  # every rank is in it
    transport.use_messages(group)
    return DeviceMesh.from_group(group, "cpu", mesh_dim_names=("dp",))


def training_step(
    engine: Engine,
    config: GPTConfig,
    micro_batch_size: int,
    losses: dict[str, Tensor],
    name: str,
    *,
    is_replicated: bool = False,
) -> Callable[[], None]:
    """Return a function that takes a step and leaves its loss in `losses[name]`.

    Args:
        engine: Wraps the model.
        config: Of the model.
        micro_batch_size: Sequences on each rank.
        losses: Where the loss goes.
        name: Its key there.
        is_replicated: All ranks see the same batch, not each its own.
    """
    generator = torch.Generator(torch.get_default_device())
    generator.manual_seed(0 if is_replicated else dist.get_rank())
    shape = (micro_batch_size, config.sequence_length + 1)
    text = torch.randint(config.vocab_size, shape, generator=generator)
    x, y = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    torch.manual_seed(0)
    model, optimizer, after_backward = engine(GPT(config))
    loss = cross_entropy(model(x), y)

    def step() -> None:
        nonlocal loss
        loss.backward()
        after_backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        losses[name] = loss.detach()

    return step


def check_losses(losses: dict[str, float], *, base: str, limit: str = "") -> None:
    """Raise if a variant did other work than the base: fast and wrong is no result.

    Args:
        losses: The last loss of each variant.
        base: The variant that is right.
        limit: A variant that may be wrong.

    Raises:
        RuntimeError: If a loss differs by more than 1 %.
    """
    for name, loss in losses.items():
        same = math.isclose(loss, losses[base], rel_tol=1e-2)
        if name != limit and not same:
            raise RuntimeError(
                f"{name} ends with loss {loss:.6f}, {base} with {losses[base]:.6f}; "
                "they do not train alike, so their times say nothing"
            )
