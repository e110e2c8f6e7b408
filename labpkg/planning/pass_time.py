"""What one micro-batch costs a rank: a layer, and the ends of the model.

A GPU works on matrix products at the rate of the hardware, on everything between them
at the speed of its memory, and on the collectives inside a layer. Its host launches all
of that meanwhile; the slower of both sets the pace.

Letters: B sequences of a micro-batch, T sequence length, D width, F feed-forward width,
V vocabulary, N parameters. Standard library only.

Chapter: planning/planner. References: Williams et al. 2009, doi:10.1145/1498765.1498785
(roofline); Korthikanti et al. 2022, arXiv:2205.05198 (recomputation); Qi et al. 2024,
arXiv:2401.10241 (split backward).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from labpkg.planning.configuration import Configuration
from labpkg.planning.constants import Constants
from labpkg.planning.hardware import Hardware
from labpkg.planning.network import GRADIENT_ITEMSIZE, ITEMSIZE
from labpkg.planning.stages import layer_elements

COLLECTIVES_PER_LAYER = 10
"""Calls of a tensor-parallel layer in a pass, with sequence parallelism."""

SPLIT_BACKWARD = 1.05
"""Work of a stage whose backward runs in two halves, as a multiple."""

LOGIT_BYTES = 4
"""Bytes of a logit in the loss, which is computed in float32."""


class Work(NamedTuple):
    """Seconds that a rank spends on one micro-batch, forward and backward.

    Attributes:
        products: Matrix products.
        weights: The part of them that gives gradients of weights.
        memory: What is between products, and adding up gradients.
        tp: Collectives of tensor parallelism.
        cp: Messages of context parallelism that attention does not hide.
        again: Recomputation.
        host: Launches, which run beside all others.
    """

    products: float = 0.0
    weights: float = 0.0
    memory: float = 0.0
    tp: float = 0.0
    cp: float = 0.0
    again: float = 0.0
    host: float = 0.0

    @property
    def gpu_s(self) -> float:
        """Seconds of the GPU."""
        return self.products + self.memory + self.tp + self.cp + self.again

    @property
    def seconds(self) -> float:
        """Seconds until the next micro-batch."""
        return max(self.gpu_s, self.host)


def product_rate(job: Configuration, hardware: Hardware, constants: Constants) -> float:
    """Return the FLOP/s of large matrix products in a long run.

    Args:
        job: Its precision counts.
        hardware: The machine; it must know the precision.
        constants: The fitted numbers.
    """
    clock = constants.sustained_clock if hardware.power_limited else 1.0
    return clock * hardware.matmul_fraction * hardware.peak_flops[job.precision]


def _products_s(
    job: Configuration,
    hardware: Hardware,
    constants: Constants,
    matrices: Sequence[tuple[float, float]],
) -> float:
    """Return the seconds of forward through matrices (inputs, outputs) of one rank.

    A product costs its FLOPs, and all of its three operands pass through memory once:
    narrow matrices and few tokens are slower per FLOP.
    """
    tokens = _tokens(job)
    multiplied = sum(k * n for k, n in matrices)
    ends = sum(k + n for k, n in matrices)
    operands = ITEMSIZE[job.precision] * (tokens * ends + multiplied)
    rate = product_rate(job, hardware, constants)
    return 2 * tokens * multiplied / rate + operands / hardware.memory_bytes_per_s


def _tokens(job: Configuration) -> float:
    return job.micro_batch_size * job.model.sequence_length / job.cp


def _split_factor(job: Configuration) -> float:
    return SPLIT_BACKWARD if job.pp > 1 and job.schedule.startswith("zb") else 1.0


def layer_work(
    job: Configuration,
    hardware: Hardware,
    constants: Constants,
    traffic: Mapping[tuple[str, str], float],
) -> Work:
    """Return what a layer costs for one micro-batch.

    Args:
        job: The job.
        hardware: The machine.
        constants: The fitted numbers.
        traffic: Seconds of its traffic by axis and phase, as in `Traffic`.
    """
    model, tp = job.model, job.tp
    D, F = model.width, model.ffn_width / tp
    keys_and_values = 2 * model.head_width * max(model.num_kv_heads / tp, 1)
    up = [(D, F)] * (2 if model.gated_mlp else 1)
    matrices = [(D, D / tp + keys_and_values), (D / tp, D), *up, (F, D)]
    products = _products_s(job, hardware, constants, matrices)
    scores = 4 * _tokens(job) * model.sequence_length * D / tp
    scores /= constants.attention_efficiency * product_rate(job, hardware, constants)
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
    return Work(
        products=3 * split * (products + scores),
        weights=split * products,
        memory=split * memory + accumulated,
        tp=traffic["tp", "layer"],
        cp=max(0.0, traffic["cp", "layer"] - 3 * scores),  # hidden by attention
        again=again[job.recompute],
        host=_host_s(job, hardware, constants),
    )


def head_work(
    job: Configuration,
    hardware: Hardware,
    constants: Constants,
    traffic: Mapping[tuple[str, str], float],
) -> Work:
    """Return what the output matrix and the loss cost for one micro-batch.

    Args:
        job: The job.
        hardware: The machine.
        constants: The fitted numbers.
        traffic: Seconds of its traffic by axis and phase, as in `Traffic`.
    """
    vocabulary = job.model.vocab_size / job.tp
    matrix = (job.model.width, vocabulary)
    products = _products_s(job, hardware, constants, [matrix])
    logits = constants.activation_passes * LOGIT_BYTES * _tokens(job) * vocabulary
    memory = logits / hardware.memory_bytes_per_s
    accumulated = _accumulation_s(job, hardware, job.model.width * vocabulary)
    split = _split_factor(job)
    return Work(
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
    seconds = constants.launch_s * (1 if job.tp == 1 else 2)
    if job.recompute == "full":
        seconds *= 4 / 3
    if job.tp > 1 and job.pp > 1 and job.nodes > 1:
        waits = constants.pipeline_wait * hardware.network_latency_s
        seconds += COLLECTIVES_PER_LAYER * job.tp * waits
    return seconds
