"""Running a module forward more often than the model says, without a trace.

A pipeline tries its stages to learn shapes, and may run forward twice to save memory.
Neither may move buffers or random numbers, or leave casts behind; nor may a step that
is skipped move buffers.

Chapter: parallelism/pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def remember_buffers(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Return a function that gives all buffers the values that they have now.

    Args:
        modules: Whose buffers.
    """
    layers = [layer for module in modules for layer in module.modules()]
    buffers = [dict(layer._buffers) for layer in layers]
    copies = [
        (buffer, buffer.detach().clone())
        for own in buffers
        for buffer in own.values()
        if buffer is not None
    ]

    def restore() -> None:
        for layer, own in zip(layers, buffers, strict=True):
            layer._buffers.update(own)  # also where forward assigned another tensor
        with torch.no_grad():
            for buffer, copy in copies:
                buffer.copy_(copy)

    return restore


@contextmanager
def undisturbed(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Give buffers and random numbers back after the block.

    Args:
        modules: What runs inside.
        device: Where it runs.
    """
    restore = remember_buffers(modules)
    try:
        with torch.random.fork_rng(_gpus(device)):
            yield
    finally:
        restore()


@contextmanager
def without_gradients() -> Iterator[None]:
    """Build no graph inside the block.

    Autocast may keep the weights that it has cast here for later, where those without a
    graph would have no gradient (torch 2.13 looks whether they have one).
    """
    with torch.no_grad():
        yield
    torch.clear_autocast_cache()


@dataclass(frozen=True, slots=True)
class RandomState:
    """Where the generators of the CPU and of a GPU stood."""

    states: tuple[Tensor, ...]
    device: torch.device

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers inside the block once more."""
        with torch.random.fork_rng(_gpus(self.device)):
            torch.set_rng_state(self.states[0])
            for state in self.states[1:]:
                torch.cuda.set_rng_state(state, self.device)
            yield


def random_state(device: torch.device) -> RandomState:
    """Return where the generators stand.

    Args:
        device: That of the computation.
    """
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return RandomState(tuple(states), device)


def _gpus(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
