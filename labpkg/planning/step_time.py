"""How long one training step takes, as a sum of terms with formulas.

`labpkg.planning.pass_time` says what a micro-batch costs a rank. The slowest stage sets
the pace of a pipeline; the others add the bubble. Once in a step come the traffic of
gradients and weights that nothing hides, and the optimizer.

The closed form of the pipeline equals `simulate` for equal stages and is an upper bound
for unequal ones; `labpkg.planning.simulator` shows each action.

Letters: B sequences of a micro-batch, T sequence length, D width, F feed-forward width,
V vocabulary, L layers, M micro-batches, P stages, v stages of a rank, N parameters of a
rank, n data-parallel ranks. Standard library only.

Chapter: planning/planner. References: Williams et al. 2009, doi:10.1145/1498765.1498785
(roofline); Korthikanti et al. 2022, arXiv:2205.05198 (recomputation, traffic of tensor
parallelism); Qi et al. 2024, arXiv:2401.10241 (split backward).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from labpkg.planning.configuration import Configuration
from labpkg.planning.constants import FITTED, Constants
from labpkg.planning.hardware import Hardware
from labpkg.planning.network import (
    GRADIENT_ITEMSIZE,
    Traffic,
    collective_s,
    held_elements,
    place_axis,
    step_traffic,
)
from labpkg.planning.pass_time import Work, head_work, layer_work, product_rate
from labpkg.planning.shapes import ModelShape
from labpkg.planning.stages import (
    stage_shares,
    stages_per_rank,
)
from labpkg.planning.terms import Term, total

STATE_BYTES = 12
"""Bytes of a parameter's master copy and both moments of Adam."""

_SOURCES = {
    "matrix products": "roofline; sustained_clock, attention_efficiency are fitted",
    "activations": "activation_passes is fitted",
    "tensor-parallel traffic": "rings; Korthikanti et al. 2022",
    "context-parallel traffic": "Liu et al. 2023, arXiv:2310.01889",
    "recomputation": "Korthikanti et al. 2022",
    "waiting for the host": "launch_s and pipeline_wait are fitted",
    "pipeline bubble": "labpkg.simulate; Narayanan et al. 2021, arXiv:2104.04473",
    "pipeline messages": "latency and bandwidth of the link",
    "data-parallel traffic": "rings; overlap and network_share are fitted",
    "optimizer": "optimizer_passes is fitted",
}


@dataclass(frozen=True, slots=True)
class StepTime:
    """Say what a step takes.

    Args:
        terms: Seconds, term by term.
    """

    terms: tuple[Term, ...]

    @property
    def seconds(self) -> float:
        """Seconds of one optimizer step."""
        return total(self.terms)


class _Costs(NamedTuple):
    """What one layer, both ends of the model, and traffic take."""

    layer: Work
    head: Work
    traffic: dict[tuple[str, str], float]

    def of(self, num_layers: int, *, head: bool) -> Work:
        ends = self.head if head else Work()
        pairs = zip(self.layer, ends, strict=True)
        return Work(*(num_layers * layer + end for layer, end in pairs))


class _Pipeline(NamedTuple):
    """What the ranks do, and which of them sets the pace.

    Attributes:
        slowest: Of one micro-batch on that rank.
        num_layers: On that rank.
        others_s: A pass of each other rank, together.
        filled_s: How long it waits for them.
        extra_s: How long it waits besides, for want of micro-batches or launches, less
            what of its own work fills the time.
    """

    slowest: Work
    num_layers: int
    others_s: float
    filled_s: float
    extra_s: float


def step_time(
    configuration: Configuration, hardware: Hardware, constants: Constants = FITTED
) -> StepTime:
    """Predict the seconds of one optimizer step.

    Args:
        configuration: The job.
        hardware: The machine; it must know the precision.
        constants: The fitted numbers.

    Returns:
        The terms, which add up; about 60 microseconds.
    """
    costs = _costs(configuration, hardware, constants)
    pipeline = _pipeline(configuration, costs)
    return StepTime(
        (
            *_work_terms(configuration, hardware, constants, pipeline),
            *_pipeline_terms(configuration, costs, pipeline),
            *_step_terms(configuration, hardware, constants, costs, pipeline),
        )
    )


def layer_seconds(
    configuration: Configuration, hardware: Hardware, constants: Constants = FITTED
) -> float:
    """Return what one layer takes for one micro-batch, forward and backward.

    It depends on neither dp nor `grad_accum_steps`, and on pp, zero and the schedule
    only in whether there is a pipeline, whole gradients, and a split backward.

    Args:
        configuration: The job.
        hardware: The machine.
        constants: The fitted numbers.
    """
    return _costs(configuration, hardware, constants).layer.seconds


def _costs(job: Configuration, hardware: Hardware, constants: Constants) -> _Costs:
    traffic = _traffic_s(job, hardware, constants, step_traffic(job))
    return _Costs(
        layer_work(job, hardware, constants, traffic),
        head_work(job, hardware, constants, traffic),
        traffic,
    )


def _traffic_s(
    job: Configuration,
    hardware: Hardware,
    constants: Constants,
    sent: Iterable[Traffic],
) -> dict[tuple[str, str], float]:
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for axis, phase, op, payload, calls in sent:
        place = place_axis(job, axis)
        scattered = axis == "dp" and op != "all_reduce"
        share = constants.network_share if scattered else 1.0
        once = collective_s(op, payload, place, hardware, share=share)
        seconds[axis, phase] += calls * once
    return seconds


@lru_cache(maxsize=4096)
def _loads(
    model: ModelShape, P: int, v: int, down_and_up: bool
) -> tuple[tuple[int, bool, int], ...]:
    """Return the different loads (layers, head) of ranks, each with its number."""
    layers, head = [0] * P, [False] * P
    for stage, share in enumerate(stage_shares(model, P * v)):
        mirrored = down_and_up and stage >= P
        rank = 2 * P - 1 - stage if mirrored else stage % P
        layers[rank] += share.num_layers
        head[rank] |= share.head
    counted = Counter(zip(layers, head, strict=True))
    return tuple((n, ends, times) for (n, ends), times in counted.items())


def _pipeline(job: Configuration, costs: _Costs) -> _Pipeline:
    v, down_and_up = stages_per_rank(job), job.schedule == "zb-v"
    loads = [
        (costs.of(n, head=head), n, times)
        for n, head, times in _loads(job.model, job.pp, v, down_and_up)
    ]
    waits = [_waits(job, work) for work, _, _ in loads]
    own_s = [
        job.grad_accum_steps * work.seconds + extra_s - filled_s
        for (work, _, _), (filled_s, extra_s) in zip(loads, waits, strict=True)
    ]
    pace = max(range(len(loads)), key=own_s.__getitem__)
    work, num_layers, _ = loads[pace]
    passes_s = sum(times * load.seconds for load, _, times in loads)
    fills_s = sum(n * wait[0] for (_, _, n), wait in zip(loads, waits, strict=True))
    filled_s, extra_s = waits[pace]
    others = passes_s - work.seconds, fills_s - filled_s
    return _Pipeline(work, num_layers, *others, extra_s)


def _waits(job: Configuration, work: Work) -> tuple[float, float]:
    """How long another rank waits for one with this work, and how long that one does.

    The latter is besides what it waits for others, of which there are P - 1.
    """
    P, M, v = job.pp, job.grad_accum_steps, stages_per_rank(job)
    if job.schedule == "interleaved":
        return work.seconds / v, (v - 1) / v * max(0, P - M) * work.seconds
    if P == 1 or not job.schedule.startswith("zb"):
        return work.seconds, 0.0
    # A rank waits for F and I of the others, and fills that time with its own W, as far
    # as there are micro-batches. Each half waits for its launches.
    weights = max(work.weights, work.host / 3)
    others = max(work.gpu_s - work.weights, 2 / 3 * work.host)
    missing = max(0, P - M) if v == 1 else max(0, 3 * P - 1 - 2 * M) / 2
    filled = ((P - 1) / v - missing) * weights
    return others / v, M * (others + weights - work.seconds) - filled


def _terms(rows: Iterable[tuple[str, float, str]]) -> list[Term]:
    return [Term(*row, source=_SOURCES[row[0]]) for row in rows if row[1]]


def _work_terms(
    job: Configuration, hardware: Hardware, constants: Constants, pipeline: _Pipeline
) -> list[Term]:
    M, work = job.grad_accum_steps, pipeline.slowest
    rate = product_rate(job, hardware, constants) / 1e12
    memory = f"{hardware.memory_bytes_per_s / 1e12:.2f} TB/s"
    passes = f"{constants.activation_passes:.1f} passes between products"
    launches = f"launches take {work.host * 1e3:.1f} ms of a micro-batch"
    products = f"3 x 2 B T K N / {rate:.0f} TFLOP/s + operands / {memory}"
    waits = work.seconds - work.gpu_s
    rows = (
        ("matrix products", work.products, products),
        ("activations", work.memory, f"{passes}, sums of gradients, / {memory}"),
        ("tensor-parallel traffic", work.tp, f"rings of {job.tp}, S = 2 B T D"),
        ("context-parallel traffic", work.cp, f"K, V around {job.cp}, less attention"),
        ("recomputation", work.again, f"forward again, {job.recompute}"),
        ("waiting for the host", waits, f"{launches}, the GPU {work.gpu_s * 1e3:.1f}"),
    )
    each = f"M={M} micro-batches x {pipeline.num_layers} layers: "
    return _terms((name, M * once, each + formula) for name, once, formula in rows)


def _pipeline_terms(
    job: Configuration, costs: _Costs, pipeline: _Pipeline
) -> list[Term]:
    P, M, v = job.pp, job.grad_accum_steps, stages_per_rank(job)
    if P == 1:
        return []
    borders = M * v * (P - 1) / P + P - 1
    waited = (
        f"{pipeline.filled_s / pipeline.others_s:.2f} x a pass of each of {P - 1} "
        f"other ranks {pipeline.extra_s / pipeline.slowest.seconds:+.1f} own passes "
        f"({job.schedule}, P={P}, M={M}, v={v})"
    )
    sent = borders * costs.traffic["pp", "border"]
    return _terms(
        (
            ("pipeline bubble", pipeline.filled_s + pipeline.extra_s, waited),
            ("pipeline messages", sent, f"{borders:.0f} borders, there and back"),
        )
    )


def _step_terms(
    job: Configuration,
    hardware: Hardware,
    constants: Constants,
    costs: _Costs,
    pipeline: _Pipeline,
) -> list[Term]:
    M, n, traffic = job.grad_accum_steps, job.dp * job.cp, costs.traffic
    a_pass = pipeline.slowest.seconds
    hidden = constants.overlap * a_pass * 2 / 3
    gradients = max(0.0, traffic["dp", "step"] - hidden)
    # Divided weights and gradients travel layer by layer, all through a pass.
    passes = M * max(0.0, traffic["dp", "pass"] - a_pass)
    held = held_elements(job)
    state = STATE_BYTES * held / (n if job.zero else 1)
    state += GRADIENT_ITEMSIZE * held / (n if job.zero > 1 else 1)
    state *= constants.optimizer_passes
    exposed = gradients + traffic["dp", "update"] + passes
    spread = f"zero={job.zero} over n={n} ranks, N={held / 1e9:.3f}e9 a rank"
    bytes_each = f"{STATE_BYTES} N / n + {GRADIENT_ITEMSIZE} N bytes"
    return _terms(
        (
            ("data-parallel traffic", exposed, f"{spread}, less what passes hide"),
            (
                "optimizer",
                state / hardware.memory_bytes_per_s,
                f"{constants.optimizer_passes:.1f} passes over {bytes_each}",
            ),
        )
    )
