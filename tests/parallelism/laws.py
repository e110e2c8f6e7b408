"""The laws of every engine: which runs they look at, and how far two runs differ.

A `Run` is trained under an engine on some ranks, and alone in one process; either gives
a `Trace`, what can be seen of a run from outside. The laws compare traces. The process
alone is the one rank of a `World`, so that it computes with as many threads as a rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import labpkg as lab
from labpkg.processes.traffic import CommLog, off
from tests.parallelism.engines import ANOTHER_MODEL, ENGINES, OptimizerChoice, Traffic
from tests.parallelism.models import CASES, TUNED

TOLERANCE = 1e-12
SEED = 42
NUM_STEPS = 5
EXACT_SIZES = (2, 4)  # numbers of ranks by which a division is exact
OPTIMIZERS = {
    "SGD": OptimizerChoice(lab.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": OptimizerChoice(lab.AdamW, {"lr": 0.01}),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is trained, and how.

    Attributes:
        case: Name of the model in `CASES`.
        optimizer: Name in `OPTIMIZERS`.
        dtype: None means that of the case.
        num_passes: Backward passes in a step.
        deterministic: Whether the engine adds in rank order.
        is_silent: Whether collectives are switched off.
        seed_stride: Rank r starts from `SEED + r * seed_stride`.
    """

    case: str
    optimizer: str
    dtype: torch.dtype | None = None
    num_passes: int = 1
    deterministic: bool = False
    is_silent: bool = False
    seed_stride: int = 1

    @property
    def alone(self) -> Run:
        """The same without what only an engine can do."""
        return Run(case=self.case, optimizer=self.optimizer, dtype=self.dtype)


def runs_of(
    cases: Iterable[str], *, optimizers: Iterable[str] = OPTIMIZERS, **options: Any
) -> tuple[Run, ...]:
    """Return a run of each model with each optimizer."""
    return tuple(
        Run(case=case, optimizer=optimizer, **options)
        for case in cases
        for optimizer in optimizers
    )


RUNS = runs_of(CASES)
SILENT_RUNS = runs_of(TUNED, optimizers=["SGD"], is_silent=True, seed_stride=0)
RUNS_OF_TWO_PASSES = runs_of(
    (*TUNED, "convolution", "tied", "odd", "frozen"),
    optimizers=["AdamW"],
    num_passes=2,
)
# Kernels round by alignment, and flat buffers move what has odd sizes.
ORDERED_RUNS = (
    *runs_of((case for case in CASES if case != "odd"), deterministic=True),
    *runs_of(TUNED, deterministic=True, dtype=torch.float32),
)


@dataclass
class Trace:
    """What one rank, or one process alone, shows of a run.

    Attributes:
        start: Parameters and buffers before the first step.
        output: Of the first step.
        gradients: Of the first step.
        end: Parameters and buffers after the last step.
        counted: Payload bytes of the last step.
        predicted: The same by formula.
    """

    start: dict[str, Tensor | None]
    output: Tensor | None = None
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    end: dict[str, Tensor | None] = field(default_factory=dict)
    counted: Traffic = field(default_factory=dict)
    predicted: Traffic = field(default_factory=dict)


# ---- on the ranks ------------------------------------------------------------------


def train_all(engine: str, runs: Sequence[Run]) -> list[Trace]:
    """Train one run after the other on this rank of a `World`."""
    traces = []
    for run in runs:
        try:
            traces.append(_train(engine, run))
        except Exception as error:
            error.add_note(f"in {run}")
            raise
    return traces


def _train(engine: str, run: Run) -> Trace:
    kind, case = ENGINES[engine], CASES[run.case]
    mesh = lab.make_mesh(**kind.meshes[dist.get_world_size()])
    with off() if run.is_silent else nullcontext():
        model = case.model(SEED + dist.get_rank() * run.seed_stride, run.dtype)
        trial = kind(
            model, OPTIMIZERS[run.optimizer], mesh, deterministic=run.deterministic
        )
        trace = Trace(_copies(trial.state()))
        for step in range(NUM_STEPS):
            x, y = case.batch(step, run.dtype)
            with lab.count_comms() as log:
                output = trial.backward(x, y, case.loss, run.num_passes)
                if step == 0:
                    trace.output = output
                    trace.gradients = _copies(trial.gradients())
                trial.step()
        trace.end = _copies(trial.state())
    trace.predicted = trial.predicted_bytes(run.num_passes)
    trace.counted = _count(log, trace.predicted)
    return trace


def _count(log: CommLog, predicted: Traffic) -> Traffic:
    """Return the counted bytes of the predicted collectives, and of all others."""
    counted = {key: log[key].payload_bytes for key in predicted}
    total = sum(log[axis].payload_bytes for axis in log.axes)
    return counted | {("other", "collectives"): total - sum(counted.values())}


def refusals(engine: str) -> dict[str, bool]:
    """Tell which bad inputs raise before communication, and whether ranks then train.

    Only `ANOTHER_MODEL` cannot be seen without asking the other ranks.
    """
    kind = ENGINES[engine]
    mesh = lab.make_mesh(**kind.meshes[dist.get_world_size()])
    is_refused = {}
    for problem, call in kind.bad_inputs(mesh).items():
        with lab.count_comms() as log:
            try:
                call()
                is_refused[problem] = False
            except ValueError:
                is_refused[problem] = problem == ANOTHER_MODEL or not log.axes
    trace = _train(engine, Run(case="mlp", optimizer="SGD"))
    want = _train_alone(Run(case="mlp", optimizer="SGD"), num_shards=1)
    is_refused["trains afterwards"] = deviation(trace.end, want.end) <= TOLERANCE
    return is_refused


# ---- in one process ----------------------------------------------------------------


def train_all_alone(runs: Sequence[Run], num_shards: int) -> list[Trace]:
    """Train in this process, adding the gradients of the shards in their order."""
    return [_train_alone(run, num_shards) for run in runs]


def _train_alone(run: Run, num_shards: int) -> Trace:
    case, choice = CASES[run.case], OPTIMIZERS[run.optimizer]
    model = case.model(SEED, run.dtype)
    optimizer = choice.kind(model.parameters(), **choice.options)
    trace = Trace(_copies(model.state_dict()))
    for step in range(NUM_STEPS):
        shards = (t.chunk(num_shards) for t in case.batch(step, run.dtype))
        outputs = []
        for x, y in zip(*shards, strict=True):
            outputs.append(model(x))
            (case.loss(outputs[-1], y) / num_shards).backward()
        if step == 0:
            trace.output = torch.cat(outputs).detach()
            trace.gradients = _copies({k: p.grad for k, p in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    trace.end = _copies(model.state_dict())
    return trace


def _copies(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {k: None if t is None else t.detach().clone() for k, t in tensors.items()}


# ---- where the tests are -----------------------------------------------------------


@functools.cache
def trained(engine: str, world_size: int) -> dict[Run, list[Trace]]:
    """Train all runs under an engine in one job; return the traces of all ranks."""
    runs = (*RUNS, *SILENT_RUNS, *RUNS_OF_TWO_PASSES)
    if world_size in EXACT_SIZES:
        runs += ORDERED_RUNS
    with lab.World(world_size, device="cpu", timeout_s=100) as world:
        ranks = world.run(train_all, engine, runs)
    return dict(zip(runs, map(list, zip(*ranks, strict=True)), strict=True))


@functools.cache
def trained_alone(num_shards: int = 1) -> dict[Run, Trace]:
    """Train all runs in one process; see `train_all_alone`."""
    runs = tuple(dict.fromkeys(run.alone for run in (*RUNS, *ORDERED_RUNS)))
    with lab.World(1, device="cpu", timeout_s=100) as world:
        (traces,) = world.run(train_all_alone, runs, num_shards)
    return dict(zip(runs, traces, strict=True))


def deviation(
    got: Mapping[str, Tensor | None], want: Mapping[str, Tensor | None]
) -> float:
    """Return the largest relative norm of a difference; inf where only one is None."""
    assert got.keys() == want.keys()
    return max(_distance(got[name], want[name]) for name in want)


def _distance(got: Tensor | None, want: Tensor | None) -> float:
    if got is None or want is None:
        return 0.0 if got is want else math.inf
    assert got.dtype == want.dtype
    difference = (got.double() - want.double()).norm()
    if difference == 0:
        return 0.0
    distance = float(difference / want.double().norm())
    return distance if distance == distance else math.inf  # NaN is infinitely far
