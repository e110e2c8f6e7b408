"""How far the ranks of the parity matrix are from one plain process."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import labpkg as lab
from tests.parity.matrix import (
    LENGTH,
    MAX_NORM,
    NUM_STEPS,
    TOLERANCE,
    WIDTH,
    Setting,
    Trace,
    alone,
    train_all,
)

QUANTITIES = ("output", "loss", "gradients", "norm", "parameters")


@dataclass(frozen=True)
class Result:
    """How far the ranks of a setting are from one process.

    Attributes:
        setting: What was trained.
        refusal: Its message, or None.
        deviations: By quantity; relative norms, the largest of all tensors and ranks.
        bounds: By quantity.
    """

    setting: Setting
    refusal: str | None
    deviations: Mapping[str, float] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)

    @property
    def problem(self) -> str | None:
        """What is wrong, or None."""
        rule = self.setting.impossible
        if self.refusal is not None or rule is not None:
            if rule is not None and self.refusal is not None and rule in self.refusal:
                return None
            return f"{self.setting}: expected refusal {rule!r}, got {self.refusal!r}"
        for name in QUANTITIES:
            if not self.deviations[name] <= self.bounds[name]:  # also refuses nan
                far, bound = self.deviations[name], self.bounds[name]
                return f"{self.setting}: {name} is {far:.2g} off, more than {bound:.2g}"
        return None


def measure(world: lab.World, settings: Sequence[Setting]) -> list[Result]:
    """Train settings on the ranks of a world, and alone, and compare.

    Args:
        world: Of as many ranks as the layouts have.
        settings: What to train.
    """
    ranks = world.run(train_all, list(settings), timeout_s=300 + 5 * len(settings))
    return [
        compare(setting, list(traces))
        for setting, traces in zip(settings, zip(*ranks, strict=True), strict=True)
    ]


def compare(setting: Setting, ranks: list[Any]) -> Result:
    """Compare what all ranks show of a setting with one process.

    Args:
        setting: What was trained.
        ranks: Of each rank its trace, or the message of its refusal.
    """
    refusals = [trace for trace in ranks if isinstance(trace, str)]
    if refusals:
        assert len(refusals) == len(ranks), f"{setting}: some ranks refuse: {refusals}"
        return Result(setting, refusals[0])
    first = ranks[0]
    for trace in ranks:  # all ranks tell the same
        for part in ("start", "gradients", "end"):
            assert _distance(getattr(trace, part), getattr(first, part)) == 0, setting
        for part in ("losses", "counts", "norms", "evaluated"):
            assert getattr(trace, part) == getattr(first, part), (setting, part)
    found = replace(first, output=_whole_output(setting, ranks))
    want = _reference(
        setting, first.start, _whole_kept(setting, ranks), setting.is_rough
    )
    if "clipping" in setting.features:
        assert min(want.norms) > MAX_NORM
    if not setting.is_rough:
        bounds = dict.fromkeys(QUANTITIES, TOLERANCE)
    else:  # twice how far one process is from the truth
        kept = _whole_kept(setting, ranks)
        truth = _reference(setting, first.start, kept, False)
        bounds = {k: 2 * far for k, far in _deviations(want, truth).items()}
        # In a single number errors may cancel.
        bounds |= {"loss": bounds["output"], "norm": bounds["gradients"]}
    assert found.counts == want.counts
    assert found.evaluated[1] == want.evaluated[1]
    return Result(setting, None, _deviations(found, want), bounds)


def _deviations(found: Trace, want: Trace) -> dict[str, float]:
    losses = [(*t.losses, t.evaluated[0]) for t in (found, want)]
    return {
        "output": _distance({"": found.output}, {"": want.output}),
        "loss": _distance(*map(_as_tensors, losses)),
        "gradients": _distance(found.gradients, want.gradients),
        "norm": _distance(*map(_as_tensors, (found.norms, want.norms))),
        "parameters": _distance(found.end, want.end),
    }


def _as_tensors(numbers: Sequence[float]) -> dict[str, Tensor]:
    return {"": torch.tensor(numbers, dtype=torch.float64)}


def _distance(found: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """Return the largest relative norm of a difference."""
    assert found.keys() == want.keys(), found.keys() ^ want.keys()
    largest = 0.0
    for name, tensor in want.items():
        assert found[name].shape == tensor.shape, name
        difference = (found[name].double() - tensor.double()).norm().item()
        if difference != 0:
            far = difference / tensor.double().norm().item()
            largest = max(largest, far if far == far else math.inf)
    return largest


def _whole_output(setting: Setting, ranks: list[Trace]) -> Tensor:
    """Put the samples of all places on dp together; pp and tp must have the same."""
    outputs: dict[int, Tensor] = {}
    for trace in ranks:
        other = outputs.setdefault(trace.place[1], trace.output)
        assert torch.equal(trace.output, other), setting
    return torch.cat([outputs[dp] for dp in sorted(outputs)])


def _whole_kept(setting: Setting, ranks: list[Trace]) -> list[dict[str, Tensor]]:
    """Put together, by step, what the dropouts of all ranks have kept."""
    steps = []
    for step in range(NUM_STEPS):
        parts: dict[str, dict[int, list[Tensor]]] = {}
        for trace in sorted(ranks, key=lambda trace: trace.place):
            for name, kept in trace.kept[step].items():
                by_dp = parts.setdefault(name, {})
                by_dp.setdefault(trace.place[1], []).append(kept)
        steps.append(
            {
                name: torch.cat([_joined(by_dp[dp], name) for dp in sorted(by_dp)])
                for name, by_dp in parts.items()
            }
        )
    return steps


def _joined(slices: list[Tensor], name: str) -> Tensor:
    """Join what ranks of tp have kept, of features, of positions, or all the same."""
    length, width = slices[0].shape[1:]
    if length < LENGTH:
        return torch.cat(slices, 1)
    if name.endswith("inner") and width < 4 * WIDTH:
        return torch.cat(slices, 2)
    assert all(torch.equal(other, slices[0]) for other in slices), name
    return slices[0]


_REFERENCES: dict[Any, tuple[Mapping[str, Tensor], Trace]] = {}


def _reference(
    setting: Setting, start: dict[str, Tensor], kept: Any, is_rough: bool
) -> Trace:
    """Return the trace of one process; layouts with the same start share one."""
    if "dropout" in setting.features:
        return alone(setting, start, kept, is_rough=is_rough)
    features = setting.features - {"accumulation", "recomputation"}
    key = setting.num_layers, setting.on_meta, features, is_rough
    if key not in _REFERENCES:
        _REFERENCES[key] = start, alone(setting, start, kept, is_rough=is_rough)
    known, trace = _REFERENCES[key]
    assert _distance(start, known) == 0, (
        f"{setting} starts elsewhere than other layouts"
    )
    return trace
