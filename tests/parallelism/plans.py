"""How the models of the laws are cut by tensor parallelism, and the same in slices.

`in_slices` is tensor parallelism from scratch: one process computes what each rank
would, slice by slice, and adds up in the order of the ranks. So an engine that adds up
in this order has to agree with it bit by bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labpkg.parallelism.tensor_parallel import gpt_tensor_parallel_plan
from tests.parallelism.models import GPT_CONFIG

Plan = Mapping[str, str]

# `one_parameter` and `odd` have no layer that ranks can divide: a plan for them would
# be empty, which is an error.
PLANS: dict[str, Plan] = {
    "mlp": {"0": "column", "2": "row"},
    "gpt": gpt_tensor_parallel_plan(GPT_CONFIG),
    "convolution": {"out": "column_gather"},
    "recurrent": {"out": "column_gather"},
    "tied": {"embed": "vocab", "head": "column_gather"},
    "branches": {"sometimes": "column_gather", "never": "column_gather"},
    "frozen": {"backbone": "column", "head": "row"},
    "nested": {"*.layers.up": "column", "*.layers.down": "row"},
    "odd_beside": {"2": "column", "4": "row"},
    "bfloat16": {"0": "column", "2": "row"},
}

SEQUENCES: Plan = {
    "conv": "whole",
    "widen": "whole",
    "enter": "sequence_scatter",
    "norm": "sequence",
    "up": "column",
    "down": "row",
    "frozen": "sequence",
    "never": "sequence",
    "out": "column_gather",
}

# The other models have no sequence, or one that a recurrence must see whole.
SEQUENCE_PLANS: dict[str, Plan] = {
    "gpt": gpt_tensor_parallel_plan(GPT_CONFIG, sequence_parallel=True),
    "tied": {"embed": "vocab_sequence", "body": "sequence", "head": "column_gather"},
    "sequences": SEQUENCES,
    "sequences_bfloat16": SEQUENCES,
}


def named_layers(model: nn.Module, plan: Plan) -> dict[str, tuple[nn.Module, str]]:
    """Return the modules that a plan names, each with the kind of its value."""
    return {
        name: (module, value.partition(":")[0])
        for name, module in model.named_modules()
        for pattern, value in plan.items()
        if fnmatchcase(name, pattern)
    }


def in_slices(model: nn.Module, plan: Plan, n: int) -> nn.Module:
    """Let one process compute the layers of a plan as n ranks would, in place.

    Tables of tokens are left alone: of each row one slice has the numbers, the others
    zeros, so nothing is rounded.
    """
    forwards: dict[str, Callable[..., Tensor]] = {
        "column": _column,
        "column_gather": _column,
        "row": _row,
        "sequence": _sequence,
    }
    for module, kind in named_layers(model, plan).values():
        if kind in forwards:
            whole = copy.copy(module)  # the same parameters, with its own forward
            module.forward = partial(forwards[kind], whole, n)
    return model


class _Enter(torch.autograd.Function):
    """One value for n slices; their gradients are added up in order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> tuple[Tensor, ...]:
        return tuple(x.clone() for _ in range(n))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return sum(grads[1:], grads[0]), None


def _column(layer: nn.Linear, n: int, x: Tensor) -> Tensor:
    weights = layer.weight.chunk(n)
    biases = [None] * n if layer.bias is None else layer.bias.chunk(n)
    slices = zip(_Enter.apply(x, n), weights, biases, strict=True)
    return torch.cat([F.linear(*each) for each in slices], -1)


def _row(layer: nn.Linear, n: int, x: Tensor) -> Tensor:
    slices = zip(x.chunk(n, -1), layer.weight.chunk(n, 1), strict=True)
    first, *others = (F.linear(part.contiguous(), w.contiguous()) for part, w in slices)
    y = sum(others, first)
    return y if layer.bias is None else y + layer.bias


def _sequence(module: nn.Module, n: int, x: Tensor) -> Tensor:
    named = {name: _Enter.apply(p, n) for name, p in module.named_parameters()}
    outputs = []
    for i, part in enumerate(x.chunk(n, 1)):
        own = {name: copies[i] for name, copies in named.items()}
        outputs.append(torch.func.functional_call(module, own, part.contiguous()))
    return torch.cat(outputs, 1)
