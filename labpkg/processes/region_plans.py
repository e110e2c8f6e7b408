"""Plans of tensor parallelism, read: which module of a model gets which value.

The keys of a plan are patterns over the names of modules, the values words such as
`row` or `column:64`; `apply_tensor_parallel` says what each means.

Chapter: parallelism/tensor_parallel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

SEES_WHOLE = ("whole", "sequence_scatter", "sequence_gather")
"""Values of modules inside which all positions are seen."""
_CUTS = ("column", "column_gather", "row", "vocab", "vocab_sequence")
_WORDS = (*_CUTS, "region", "partial", "dropout", "sequence", *SEES_WHOLE)
_UNITS = re.compile(r"(column|row):([1-9]\d*)")
_FUSED = re.compile(r"column_fused:([1-9]\d*(?:\+[1-9]\d*)*)(?::([1-9]\d*))?")


@dataclass(frozen=True, slots=True)
class Rule:
    """A value of a plan.

    Attributes:
        kind: The word before the colon.
        unit: Rows that stay together.
        num_blocks: Equal matrices that are stacked.
        blocks: Lengths of matrices that are stacked, if they were given.
    """

    kind: str
    unit: int = 1
    num_blocks: int = 1
    blocks: tuple[int, ...] = ()


class Match(NamedTuple):
    """A module that a plan names: its name, the pattern, the module, the value."""

    name: str
    pattern: str
    module: nn.Module
    rule: Rule


def match_plan(model: nn.Module, plan: Mapping[str, str]) -> list[Match]:
    """Return the modules that a plan names, each once.

    Args:
        model: The model.
        plan: Patterns and values.

    Raises:
        ValueError: If the plan is empty, for an unknown value, a pattern that matches
            nothing, or a module with two values.
    """
    if not plan:
        raise ValueError("the plan is empty; name a layer, e.g. {'up': 'column'}")
    modules = list(model.named_modules(remove_duplicate=False))
    names = [name for name, _ in modules]
    found: dict[nn.Module, Match] = {}
    for pattern, value in plan.items():
        rule, is_used = _read(pattern, value), False
        for name, module in modules:
            if not fnmatchcase(name, pattern):
                continue
            is_used = True
            first = found.setdefault(module, Match(name, pattern, module, rule))
            if first.rule != rule:
                raise ValueError(
                    f"{name} is named twice, by {first.pattern!r} as "
                    f"{plan[first.pattern]!r} and by {pattern!r} as {value!r}; make "
                    "one pattern narrower"
                )
        elsewhere = getattr(model, "module_names", ())  # in other stages
        if not is_used and not any(fnmatchcase(name, pattern) for name in elsewhere):
            near = get_close_matches(pattern, names, n=3, cutoff=0.4)
            hint = f"; the nearest names are {', '.join(near)}" if near else ""
            raise ValueError(
                f"no module of the model matches {pattern!r}{hint}; look at "
                "[name for name, _ in model.named_modules()]"
            )
    return list(found.values())


def _read(pattern: str, value: str) -> Rule:
    """Read a value of the plan."""
    value = str(value)
    if value in _WORDS:
        return Rule(value)
    if units := _UNITS.fullmatch(value):
        return Rule(units[1], unit=int(units[2]))
    if fused := _FUSED.fullmatch(value):
        blocks, unit = tuple(map(int, fused[1].split("+"))), int(fused[2] or 1)
        if len(blocks) == 1:
            return Rule("column_fused", unit=unit, num_blocks=blocks[0])
        return Rule("column_fused", unit=unit, blocks=blocks)
    raise ValueError(
        f"{pattern!r}: {value!r} is no value of a plan; choose one of "
        f"{', '.join(_WORDS)}, with whole rows as in column:64 or row:64, with blocks "
        "as in column_fused:3 or column_fused:64+16+16, with both as in column_fused:"
        "64+16+16:16"
    )


def inside(matches: list[Match], kinds: tuple[str, ...]) -> set[nn.Module]:
    """Return all modules inside those that a plan names with these values.

    Args:
        matches: What the plan names.
        kinds: The values.
    """
    named = [match.module for match in matches if match.rule.kind in kinds]
    return {inner for module in named for inner in module.modules()}
