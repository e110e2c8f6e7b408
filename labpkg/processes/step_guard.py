"""Refuse optimizers that cannot train slices, at their first step.

An optimizer that looks at a whole parameter, such as one that takes its norm, would
train slices without an error, and wrongly. Engines that make the optimizer themselves
try it out first; where the user makes it, torch calls this module before each step.

Chapter: parallelism/zero.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from labpkg.foundations.optimizers import elementwise_defaults
from labpkg.processes.flat import shard_of

_NO_OPTIONS = ("params", "param_names", "initial_lr")


@functools.cache
def guard_steps() -> None:
    """Try each optimizer of slices at its first step, from now on in this process.

    A slice is a parameter that is the local part of its own `Shard`. An optimizer is
    tried on small tensors of its own, see `elementwise_defaults`, with its options in
    each group. One that its `defaults` do not suffice to make, such as a wrapper of
    another, is not tried: what it wraps is, at its own step.
    """
    # For good: torch goes through all such hooks at each step, and none may vanish
    # meanwhile, as with a model that the garbage collector finds then.
    register_optimizer_step_pre_hook(_guard)


def _guard(optimizer: Optimizer, *_: Any) -> None:
    groups = optimizer.param_groups
    if getattr(optimizer, "_labpkg_num_tried", None) == len(groups):
        return
    tried = []
    for group in groups:
        first = next((p for p in group["params"] if _is_slice(p)), None)
        options = {k: v for k, v in group.items() if k not in _NO_OPTIONS}
        options.pop("lr", None)  # 0 at the start of a warm-up, which hides all
        if first is not None and options not in tried:
            _try(optimizer, options, first.device.type)
            tried.append(options)
    optimizer._labpkg_num_tried = len(groups)  # pyright: ignore


def _is_slice(parameter: nn.Parameter) -> bool:
    shard = shard_of(parameter)
    return shard is not None and shard.local is parameter


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
