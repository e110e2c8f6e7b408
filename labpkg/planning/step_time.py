"""How long one training step takes, as a sum of terms with formulas.

A micro-batch on one rank costs the larger of two times: what its GPU works (matrix
products at the rate of the hardware, everything between them at the speed of memory,
and the collectives inside a layer), and what its host needs to launch it. The slowest
stage sets the pace of a pipeline; the others add the bubble. Once in a step come the
traffic of gradients and weights that nothing hides, and the optimizer.

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
    ITEMSIZE,
    Traffic,
    collective_s,
    held_elements,
    place_axis,
    step_traffic,
)
from labpkg.planning.shapes import ModelShape
from labpkg.planning.stages import (
    layer_elements,
    stage_shares,
    stages_per_rank,
)
from labpkg.planning.terms import Term, total

COLLECTIVES_PER_LAYER = 10
"""Calls of a tensor-parallel layer in a pass, with sequence parallelism."""

SPLIT_BACKWARD = 1.05
"""Work of a stage whose backward runs in two halves, as a multiple."""

LOGIT_BYTES = 4
"""Bytes of a logit in the loss, which is computed in float32."""

STATE_BYTES = 12
"""Bytes of a parameter's master copy and both moments of Adam."""


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


class _Work(NamedTuple):
    """Seconds that a rank spends on one micro-batch, by what it does."""

    products: float = 0.0
    weights: float = 0.0  # of the products, the gradients of weights
    memory: float = 0.0
    tp: float = 0.0
    cp: float = 0.0
    again: float = 0.0
    host: float = 0.0  # runs beside all others

    @property
    def gpu_s(self) -> float:
        return self.products + self.memory + self.tp + self.cp + self.again

    @property
    def seconds(self) -> float:
        return max(self.gpu_s, self.host)


class _Costs(NamedTuple):
    """What one layer, both ends of the model, and traffic take."""

    layer: _Work
    head: _Work
    traffic: dict[tuple[str, str], float]

    def of(self, num_layers: int, *, head: bool) -> _Work:
        ends = self.head if head else _Work()
        pairs = zip(self.layer, ends, strict=True)
        return _Work(*(num_layers * layer + end for layer, end in pairs))


class _Pipeline(NamedTuple):
    """Which loads ranks have, and the slowest of them."""

    slowest: _Work
    others_s: float
    num_layers: int


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
        _layer_work(job, hardware, constants, traffic),
        _head_work(job, hardware, constants, traffic),
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
        once = collective_s(op, payload, place, hardware, constants)
        seconds[axis, phase] += calls * once
    return seconds


def _rate(job: Configuration, hardware: Hardware, constants: Constants) -> float:
    clock = constants.sustained_clock if hardware.power_limited else 1.0
    return clock * hardware.matmul_fraction * hardware.peak_flops[job.precision]


def _products_s(
    job: Configuration,
    hardware: Hardware,
    constants: Constants,
    matrices: Iterable[tuple[float, float]],
) -> float:
    """Return the seconds of forward through matrices (inputs, outputs) of one rank.

    A product costs its FLOPs, and all of its three operands pass through memory once:
    narrow matrices and few tokens are slower per FLOP.
    """
    tokens = _tokens(job)
    multiplied = sum(k * n for k, n in matrices)
    ends = sum(k + n for k, n in matrices)
    operands = ITEMSIZE[job.precision] * (tokens * ends + multiplied)
    rate = _rate(job, hardware, constants)
    return 2 * tokens * multiplied / rate + operands / hardware.memory_bytes_per_s


def _tokens(job: Configuration) -> float:
    return job.micro_batch_size * job.model.sequence_length / job.cp


def _split_factor(job: Configuration) -> float:
    return SPLIT_BACKWARD if job.pp > 1 and job.schedule.startswith("zb") else 1.0


def _layer_work(
    job: Configuration,
    hardware: Hardware,
    constants: Constants,
    traffic: dict[tuple[str, str], float],
) -> _Work:
    model, tp = job.model, job.tp
    D, F = model.width, model.ffn_width / tp
    keys_and_values = 2 * model.head_width * max(model.num_kv_heads / tp, 1)
    up = [(D, F)] * (2 if model.gated_mlp else 1)
    matrices = [(D, D / tp + keys_and_values), (D / tp, D), *up, (F, D)]
    products = _products_s(job, hardware, constants, matrices)
    scores = 4 * _tokens(job) * model.sequence_length * D / tp
    scores /= constants.attention_efficiency * _rate(job, hardware, constants)
    # Input and output of both norms and both residual sums; queries and what attention
    # returns, keys, values; each tensor of the feed-forward part.
    between = 4 * D / (tp if job.cuts_sequence else 1)
    between += 2 * D / tp + keys_and_values + (len(up) + 1) * F
    passed = constants.activation_passes * ITEMSIZE[job.precision] * between
    memory = passed * _tokens(job) / hardware.memory_bytes_per_s
    accumulated = _accumulation_s(job, hardware, layer_elements(model, tp=tp))
    again = {
        "none": 0.0,
        "selective": scores,
        "full": products + scores + memory / 3,
    }
    split = _split_factor(job)
    return _Work(
        products=3 * split * (products + scores),
        weights=split * products,
        memory=split * memory + accumulated,
        tp=traffic["tp", "layer"],
        cp=max(0.0, traffic["cp", "layer"] - 3 * scores),  # hidden by attention
        again=again[job.recompute],
        host=_host_s(job, hardware, constants),
    )


def _head_work(
    job: Configuration,
    hardware: Hardware,
    constants: Constants,
    traffic: dict[tuple[str, str], float],
) -> _Work:
    vocabulary = job.model.vocab_size / job.tp
    matrix = (job.model.width, vocabulary)
    products = _products_s(job, hardware, constants, [matrix])
    logits = constants.activation_passes * LOGIT_BYTES * _tokens(job) * vocabulary
    memory = logits / hardware.memory_bytes_per_s
    accumulated = _accumulation_s(job, hardware, job.model.width * vocabulary)
    split = _split_factor(job)
    return _Work(
        products=3 * split * products,
        weights=split * products,
        memory=split * memory + accumulated,
        tp=traffic["tp", "ends"],
    )


def _accumulation_s(job: Configuration, hardware: Hardware, elements: float) -> float:
    """Return the seconds to add the gradients of a micro-batch to those before."""
    if job.zero > 1 and job.dp * job.cp > 1:
        return 0.0  # an n-th of them, after they were sent
    read_and_written = ITEMSIZE[job.precision] + 2 * GRADIENT_ITEMSIZE
    return read_and_written * elements / hardware.memory_bytes_per_s


def _host_s(job: Configuration, hardware: Hardware, constants: Constants) -> float:
    if job.tp == 1:
        return constants.launch_s
    seconds = 2 * constants.launch_s
    if job.pp > 1 and job.nodes > 1:
        waits = constants.pipeline_wait * hardware.network_latency_s
        seconds += COLLECTIVES_PER_LAYER * job.tp * waits
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
    slowest, num_layers, _ = max(loads, key=lambda load: load[0].seconds)
    all_s = sum(times * work.seconds for work, _, times in loads)
    return _Pipeline(slowest, all_s - slowest.seconds, num_layers)


def _work_terms(
    job: Configuration, hardware: Hardware, constants: Constants, pipeline: _Pipeline
) -> list[Term]:
    M, work, n = job.grad_accum_steps, pipeline.slowest, pipeline.num_layers
    rate = _rate(job, hardware, constants) / 1e12
    memory = hardware.memory_bytes_per_s / 1e12
    passes = f"M={M} micro-batches x {n} layers"
    found = [
        Term(
            "matrix products",
            M * work.products,
            f"{passes} (and head): 3 x 2 B T K N / {rate:.0f} TFLOP/s + operands / "
            f"{memory:.2f} TB/s",
            "roofline; sustained_clock and attention_efficiency are fitted",
        ),
        Term(
            "activations",
            M * work.memory,
            f"{passes}: {constants.activation_passes:.1f} passes over tensors between "
            f"products, and sums of gradients, at {memory:.2f} TB/s",
            "activation_passes is fitted",
        ),
        Term(
            "tensor-parallel traffic",
            M * work.tp,
            f"{passes}: rings of {job.tp} ranks, S = 2 B T D",
            "Korthikanti et al. 2022",
        ),
        Term(
            "context-parallel traffic",
            M * work.cp,
            f"{passes}: keys and values around {job.cp} ranks, less attention",
            "Liu et al. 2023",
        ),
        Term(
            "recomputation",
            M * work.again,
            f"{passes}: forward again, {job.recompute}",
            "Korthikanti et al. 2022",
        ),
        Term(
            "waiting for the host",
            M * (work.seconds - work.gpu_s),
            f"{passes}: launches take {work.host * 1e3:.1f} ms, the GPU "
            f"{work.gpu_s * 1e3:.1f} ms",
            "launch_s and pipeline_wait are fitted",
        ),
    ]
    return [term for term in found if term.value]


class _Bubble(NamedTuple):
    """Idle time of the slowest rank.

    Attributes:
        fill: What it waits for each other rank, as a share of that rank's pass.
        extra: Own passes that it waits besides, for want of micro-batches.
    """

    fill: float
    extra: float


def _bubble(job: Configuration, work: _Work) -> _Bubble:
    P, M, v = job.pp, job.grad_accum_steps, stages_per_rank(job)
    if job.schedule == "interleaved":
        return _Bubble(1 / v, (v - 1) / v * max(0, P - M))
    if not job.schedule.startswith("zb"):
        return _Bubble(1.0, 0.0)
    # Filling and draining take F + I - W of each other stage instead of F + I + W.
    weights = 1 / 3 if work.host > work.gpu_s else work.weights / work.gpu_s
    fill = (1 - 2 * weights) / v
    missing = max(0, P - M) if v == 1 else max(0, 3 * P - 1 - 2 * M) / 2
    return _Bubble(fill, missing / 3)


def _pipeline_terms(
    job: Configuration, costs: _Costs, pipeline: _Pipeline
) -> list[Term]:
    P, M, v = job.pp, job.grad_accum_steps, stages_per_rank(job)
    if P == 1:
        return []
    fill, extra = _bubble(job, pipeline.slowest)
    borders = M * v * (P - 1) / P + P - 1
    return [
        Term(
            "pipeline bubble",
            fill * pipeline.others_s + extra * pipeline.slowest.seconds,
            f"{fill:.2f} x a pass of each of {P - 1} other ranks + {extra:.1f} own "
            f"passes ({job.schedule}, P={P}, M={M}, v={v})",
            "labpkg.simulate; Narayanan et al. 2021, arXiv:2104.04473",
        ),
        Term(
            "pipeline messages",
            borders * costs.traffic["pp", "border"],
            f"{borders:.0f} borders, forward and backward",
            "latency and bandwidth of the link",
        ),
    ]


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
    found = [
        Term(
            "data-parallel traffic",
            gradients + traffic["dp", "update"] + passes,
            f"zero={job.zero} over n={n} ranks, N={held / 1e9:.3f}e9 parameters a "
            "rank, less what backward hides",
            "rings; overlap and network_share are fitted",
        ),
        Term(
            "optimizer",
            state / hardware.memory_bytes_per_s,
            f"{constants.optimizer_passes:.1f} passes over {STATE_BYTES} N / n + "
            f"{GRADIENT_ITEMSIZE} N bytes",
            "optimizer_passes is fitted",
        ),
    ]
    return [term for term in found if term.value]
