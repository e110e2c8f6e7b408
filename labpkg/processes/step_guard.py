"""Refuse optimizers that cannot train slices, at their first step.

An optimizer that looks at a whole parameter, such as one that takes its norm, would
train slices without an error, and wrongly. Engines that make the optimizer themselves
try it out first; where the user makes it, torch calls this module before each step.

Chapter: parallelism/zero.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from labpkg.foundations.optimizers import elementwise_defaults

_NO_OPTIONS = ("params", "param_names", "initial_lr")


def guard_steps(owner: object, slices: Iterable[Tensor]) -> None:
    """Try each optimizer of these slices at its first step, while `owner` lives.

    It is tried on small tensors of its own, see `elementwise_defaults`, with its
    options in each group. One that its `defaults` do not suffice to make, such as a
    wrapper of another, is not tried: what it wraps is, at its own step.

    Args:
        owner: The engine, which keeps the slices alive.
        slices: What an optimizer may only update element by element.
    """
    handle = register_optimizer_step_pre_hook(_StepGuard(slices))
    weakref.finalize(owner, handle.remove).atexit = False


class _StepGuard:
    def __init__(self, slices: Iterable[Tensor]) -> None:
        self._slices = frozenset(id(p) for p in slices)
        # How many groups each had when it was tried.
        self._tried: weakref.WeakKeyDictionary[Optimizer, int]
        self._tried = weakref.WeakKeyDictionary()

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        groups = optimizer.param_groups
        if self._tried.get(optimizer) == len(groups):
            return
        tried = []
        for group in groups:
            first = next((p for p in group["params"] if id(p) in self._slices), None)
            options = {k: v for k, v in group.items() if k not in _NO_OPTIONS}
            options.pop("lr", None)  # 0 at the start of a warm-up, which hides all
            if first is not None and options not in tried:
                _try(optimizer, options, first.device.type)
                tried.append(options)
        self._tried[optimizer] = len(groups)


def _try(optimizer: Optimizer, group: dict[str, Any], device: str) -> None:
    cls = type(optimizer)
    accepted = inspect.signature(cls).parameters
    # The group has all options; what else `**options` takes, its base may refuse.
    options = {k: v for k, v in optimizer.defaults.items() if k in accepted}
    takes_more = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    if "lr" in optimizer.defaults and ("lr" in accepted or takes_more):
        options["lr"] = 0.1
    with torch.enable_grad():
        try:
            cls([{**group, "params": [nn.Parameter(torch.ones(2, 2))]}], **options)
        except Exception:
            return
        elementwise_defaults(cls, options, group=group, device=device)
