"""Replicas: equal models on all ranks of an axis, and who may train them.

Data parallelism rests on equal starts. `require_same_model` and `broadcast_state` make
them; `GradientHook` and `release` see to it that a parameter has one engine at a time.

Chapter: parallelism/data_parallel. Reference: Li et al. 2020, PVLDB 13(12):3005-3018,
arXiv:2006.15704.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes.in_place import broadcast_
from labpkg.processes.messages import all_gather_object


class _Engine(Protocol):
    @property
    def accumulated(self) -> Callable[..., None]: ...


class GradientHook:
    """What a parameter calls when its gradient is complete.

    The link to the engine is weak: Python's garbage collector cannot see through the
    hooks of a tensor, so a strong link would keep model and buckets for ever.

    Args:
        engine: What averages the gradient; its `accumulated(*place)` is called.
        place: How the engine finds the parameter.
    """

    def __init__(self, engine: _Engine, *place: Any) -> None:
        self.engine, self.name = weakref.ref(engine), type(engine).__name__
        self.place = place

    def __call__(self, _: Tensor) -> None:
        """Tell the engine."""
        engine = self.engine()
        if engine is None:
            raise RuntimeError(
                f"the {self.name} around this model is gone, so its gradients would "
                "not be averaged; keep the wrapper and call it, or train a deepcopy"
            )
        engine.accumulated(*self.place)


def release(name: str, parameter: Tensor) -> None:
    """Remove the hooks of engines that are gone; refuse a living one.

    Args:
        name: How a message calls the parameter.
        parameter: A parameter that an engine wants to take.

    Raises:
        ValueError: If another engine averages its gradient.
    """
    hooks = parameter._post_accumulate_grad_hooks or {}  # pyright: ignore
    for key, hook in list(hooks.items()):
        if isinstance(hook, GradientHook):
            if hook.engine() is not None:
                raise ValueError(
                    f"{name} belongs to another {hook.name} already, and would be "
                    "averaged twice; wrap a model once, or delete the other wrapper"
                )
            del hooks[key]


def require_same_model(module: nn.Module, mesh: DeviceMesh) -> None:
    """Raise on every rank if the models differ in names, shapes or dtypes.

    Args:
        module: The replica of this rank.
        mesh: The axis.

    Raises:
        ValueError: With the first difference.
    """
    mine = [
        (name, tuple(t.shape), str(t.dtype), t.requires_grad)
        for name, t in (*module.named_parameters(), *module.named_buffers())
    ]
    for rank, theirs in enumerate(all_gather_object(mine, mesh)):
        if theirs != mine:
            first = next(
                (a for a, b in zip(mine, theirs, strict=False) if a != b), None
            )
            raise ValueError(
                f"rank {rank} of the axis holds another model ({len(theirs)} tensors, "
                f"here {len(mine)}; first difference at {first}); build the same model "
                "on every rank"
            )


def broadcast_state(tensors: Iterable[Tensor], mesh: DeviceMesh) -> None:
    """Overwrite tensors, such as parameters and buffers, with those of rank 0.

    Args:
        tensors: The same on every rank, but for their values.
        mesh: The axis.

    Communication: one broadcast for each tensor.
    """
    with torch.no_grad():
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            broadcast_(whole, mesh).wait()
            if whole.data_ptr() != tensor.data_ptr():
                tensor.copy_(whole)
