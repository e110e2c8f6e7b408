"""The laws of every engine: which runs they look at, and how far two runs differ.

A `Run` is trained under an engine on some ranks, and alone in one process; either gives
a `Trace`, what can be seen of a run from outside. The laws compare traces. The process
alone is that of the tests, which computes with one thread, as a rank does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import labpkg as lab
from labpkg.processes.traffic import CommLog, off
from tests.parallelism.adapter import ANOTHER_MODEL, OptimizerChoice, Reference, Traffic
from tests.parallelism.deep_models import DEEP, DEEP_UNTUNED
from tests.parallelism.engines import ENGINES
from tests.parallelism.model_engines import assemble_stages
from tests.parallelism.models import DIVISIBLE, TUNED, UNTUNED
from tests.parallelism.plans import PLANS, SEQUENCE_PLANS, in_slices

TOLERANCE = 1e-12
SEED = 42
NUM_STEPS = 5
EXACT_SIZES = (2, 4)  # numbers of ranks by which a division is exact
CASES = TUNED | UNTUNED | DIVISIBLE | DEEP | DEEP_UNTUNED
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
        num_steps: After so many steps a law looks at it for the last time.
        num_passes: Backward passes in a step.
        in_order: Whether the engine gets its option to add up in an order.
        is_silent: Whether collectives are switched off.
        seed_stride: Rank r starts from `SEED + r * seed_stride`.
    """

    case: str
    optimizer: str
    dtype: torch.dtype | None = None
    num_steps: int = NUM_STEPS
    num_passes: int = 1
    in_order: bool = False
    is_silent: bool = False
    seed_stride: int = 1

    @property
    def alone(self) -> Run:
        """The same without what only an engine can do."""
        return Run(
            case=self.case,
            optimizer=self.optimizer,
            dtype=self.dtype,
            num_steps=self.num_steps,
        )


def runs_of(
    cases: Iterable[str], *, optimizers: Iterable[str] = OPTIMIZERS, **options: Any
) -> tuple[Run, ...]:
    """Return a run of each model with each optimizer."""
    return tuple(
        Run(case=case, optimizer=optimizer, **options)
        for case in cases
        for optimizer in optimizers
    )


COUNTED = (*TUNED, "convolution", "tied", "odd", "odd_beside", "frozen", "sequences")
COUNTED += ("deep_mlp", "deep_gpt", "deep_tied", "deep_odd")
# Of long chains two are enough: they take long, and a pass sends what the others send.
COUNTED_TWICE = tuple(case for case in COUNTED if case not in ("deep_gpt", "deep_odd"))


class Runs:
    """What an engine trains, by the laws that look at it.

    Attributes:
        plain: Each model.
        silent: Those of the book, with communication switched off.
        counted: Those of which the bytes are predicted.
        of_two_passes: Some of these, with two backward passes in a step.
        in_order: Those of which one process can repeat the sums.
    """

    def __init__(self, engine: str) -> None:
        kind = ENGINES[engine]
        self.plain = (
            *runs_of(kind.tuned),
            *runs_of(kind.untuned, optimizers=kind.optimizers_of_untuned),
        )
        self.silent = runs_of(
            kind.tuned, optimizers=["SGD"], num_steps=2, is_silent=True, seed_stride=0
        )
        self.counted = tuple(run for run in self.plain if run.case in COUNTED)
        self.of_two_passes = tuple(
            replace(run, num_passes=2)
            for run in self.counted
            if run.case in COUNTED_TWICE and run.optimizer == "AdamW"
        )
        exact = [run for run in self.plain if run.case in kind.exact]
        exact += [
            replace(run, dtype=torch.float32)
            for run in exact
            if run.case in kind.tuned and run.optimizer in kind.optimizers_of_untuned
        ]
        in_order = bool(kind.options_in_order)
        self.in_order = tuple(replace(run, in_order=in_order) for run in exact)


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


@functools.cache  # the groups of a mesh take as long as a short run
def _mesh(engine: str) -> DeviceMesh:
    return lab.make_mesh(**ENGINES[engine].meshes[dist.get_world_size()])


def _train(engine: str, run: Run) -> Trace:
    kind, case = ENGINES[engine], CASES[run.case]
    mesh = _mesh(engine)
    silence = off if run.is_silent else nullcontext
    options = kind.options_in_order if run.in_order else {}
    model = case.model(SEED + dist.get_rank() * run.seed_stride, run.dtype)
    with silence():
        trial = kind(run.case, model, OPTIMIZERS[run.optimizer], mesh, **options)
    trace = Trace(_copies(trial.state()))
    for step in range(run.num_steps):
        x, y = case.batch(step, run.dtype)
        with lab.count_comms() as log:
            with silence():
                output = trial.backward(x, y, case.loss, run.num_passes)
            if step == 0:
                trace.output = output
                trace.gradients = _copies(trial.gradients())
            with silence():
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


def on_rank(engine: str, runs: Sequence[Run]) -> tuple[list[Trace], dict[str, bool]]:
    """Return the traces of this rank, and what the engine refuses."""
    refused = refusals(engine)
    return train_all(engine, runs), refused


def refusals(engine: str) -> dict[str, bool]:
    """Tell which bad inputs raise, without messages, and whether ranks then train."""
    kind, mesh = ENGINES[engine], _mesh(engine)
    is_refused = {}
    for problem, call in kind.bad_inputs(mesh).items():
        with lab.count_comms() as log:
            try:
                call()
                is_refused[problem] = False
            except ValueError:
                is_early = _is_control(log) if kind.asks else not log.axes
                is_refused[problem] = problem == ANOTHER_MODEL or is_early
    run = Run(case=kind.tuned[0], optimizer="SGD")
    trace = _train(engine, run)
    want = train_alone(run, kind.reference(dist.get_world_size()))
    is_refused["trains afterwards"] = deviation(trace.end, want.end) <= TOLERANCE
    return is_refused


def _is_control(log: CommLog) -> bool:
    """Tell whether ranks have only gathered what they know."""
    return all(log[axis].calls == log[axis, "all_gather"].calls for axis in log.axes)


# ---- in one process ----------------------------------------------------------------


@functools.cache  # many engines are compared with the same
def train_alone(run: Run, reference: Reference) -> Trace:
    """Train in this process, adding the gradients of the shards in their order."""
    case, choice = CASES[run.case], OPTIMIZERS[run.optimizer]
    model = _model(run, reference)
    optimizer = choice.kind(model.parameters(), **choice.options)
    trace = Trace(_copies(model.state_dict()))
    num_shards = reference.num_shards
    for step in range(run.num_steps):
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


def _model(run: Run, reference: Reference) -> nn.Module:
    """Return the model of rank 0, or one of which each stage is that of its rank."""
    case, origin = CASES[run.case], reference.origin
    model = case.model(SEED, run.dtype)
    if reference.num_slices > 1:
        plans = SEQUENCE_PLANS if reference.is_sequence else PLANS
        return in_slices(model, plans[run.case], reference.num_slices)
    if origin:
        models = [case.model(SEED + rank, run.dtype) for rank in origin]
        assemble_stages(model, models)
    return model


def _copies(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {k: None if t is None else t.detach().clone() for k, t in tensors.items()}


# ---- where the tests are -----------------------------------------------------------


class Job(NamedTuple):
    """What all ranks of a world showed of an engine.

    Attributes:
        traces: Those of all ranks, for each run.
        refusals: Of each rank; see `refusals`.
    """

    traces: dict[Run, list[Trace]]
    refusals: list[dict[str, bool]]


@functools.cache
def trained(engine: str, world_size: int) -> Job:
    """Train all runs under an engine in one job, after its bad inputs."""
    groups = Runs(engine)
    runs = (*groups.plain, *groups.silent, *groups.of_two_passes)
    if world_size in EXACT_SIZES:
        runs += groups.in_order
    runs = tuple(dict.fromkeys(runs))
    with lab.World(world_size, device="cpu", timeout_s=100) as world:
        ranks = world.run(on_rank, engine, runs)
    traces, refused = zip(*ranks, strict=True)
    return Job(
        dict(zip(runs, map(list, zip(*traces, strict=True)), strict=True)),
        list(refused),
    )


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
    if torch.equal(got, want):
        return 0.0
    difference = (got.double() - want.double()).norm()
    if difference == 0:
        return 0.0
    distance = float(difference / want.double().norm())
    return distance if distance == distance else math.inf  # NaN is infinitely far
