"""What a training step sends, and how long a collective takes where its ranks sit.

Two questions, apart: `step_traffic` counts payloads and calls of one step by axis, from
the configuration alone; `collective_s` turns one call into seconds. Ranks of an axis
are a fixed stride apart (tp innermost, then cp, dp, pp), so `place_axis` says how many
of them share a node. A ring that leaves the node pays the latency of the network in
each round, and only its share of the network cards: groups of the other GPUs of the
node use them at the same time.

Letters: B sequences of a micro-batch, T sequence length, D width, K key/value heads, H
head width, n ranks of the axis, S payload. Standard library only.

Chapter: planning/planner. References: Thakur et al. 2005,
doi:10.1177/1094342005051521 (rings); Korthikanti et al. 2022, arXiv:2205.05198
(sequence parallelism); Liu et al. 2023, arXiv:2310.01889 (ring attention).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from labpkg.planning.configuration import Configuration
from labpkg.planning.cost import wire_bytes
from labpkg.planning.hardware import Hardware
from labpkg.planning.shapes import ModelShape
from labpkg.planning.stages import stage_elements, stage_shares, stages_per_rank

BUCKET_BYTES = 512e6
"""Payload of one call where gradients or weights of many layers travel together."""

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of one number of the precision in which a model computes."""

GRADIENT_ITEMSIZE = 4
"""Bytes of a gradient that is added up over micro-batches and ranks, always fp32."""


class AxisPlace(NamedTuple):
    """Where the ranks of one axis sit.

    Attributes:
        n: Ranks that communicate.
        per_node: How many of them share a node.
        nodes: Over how many nodes they spread.
        gpus_per_node: GPUs of a node, those of other groups, too.
    """

    n: int
    per_node: int
    nodes: int
    gpus_per_node: int


class Traffic(NamedTuple):
    """Equal calls of one collective in a step, on a rank that makes the most of them.

    Attributes:
        axis: Over which ranks: tp, cp, pp, or dp (the data-parallel ranks, with those
            of cp).
        phase: When. For each micro-batch: `layer` (each of them), `ends` (embedding,
            output matrix and loss), `border` of a stage, `pass` (weights and gradients
            of the whole rank). Once in a step: `step` (gradients after the last
            backward) and `update` (weights after the optimizer).
        op: Name of the collective, as `labpkg.count_comms` has it.
        payload_bytes: S of one call.
        calls: How often in its phase.
    """

    axis: str
    phase: str
    op: str
    payload_bytes: float
    calls: int


def place_axis(configuration: Configuration, axis: str) -> AxisPlace:
    """Return where the ranks of an axis sit.

    Args:
        configuration: The job.
        axis: tp, cp, dp (with cp: the ranks that share gradients) or pp.

    Raises:
        ValueError: For another axis.
    """
    job, g = configuration, configuration.gpus_per_node
    known = {
        "tp": (1, job.tp),
        "cp": (job.tp, job.cp),
        "dp": (job.tp, job.cp * job.dp),
        "pp": (job.tp * job.cp * job.dp, job.pp),
    }
    if axis not in known:
        raise ValueError(f"axis={axis!r} is unknown; choose one of {', '.join(known)}")
    stride, n = known[axis]
    per_node = min(n, max(1, g // stride))
    return AxisPlace(n, per_node, math.ceil(n / per_node), g)


def collective_s(
    op: str,
    payload_bytes: float,
    place: AxisPlace,
    hardware: Hardware,
    *,
    share: float = 1.0,
) -> float:
    """Return the seconds of one collective over the ranks of an axis.

    A ring takes n - 1 rounds, each with the latency of its slowest link, and sends
    `wire_bytes` at the bus bandwidth. All groups of the axis run at once, so of what a
    node sends a group gets the share of its GPUs. Libraries run an all_reduce as trees
    or as two rings that overlap: measured ones pay half the latency of a ring.

    Args:
        op: As in `wire_bytes`; a `send` is one message.
        payload_bytes: S.
        place: Of the axis.
        hardware: The machine.
        share: What it reaches of the bandwidth between nodes.

    Returns:
        Seconds, 0 for one rank.

    Raises:
        ValueError: For an unknown `op`.
    """
    n = place.n
    if n == 1:
        return 0.0
    if place.nodes == 1:
        latency, rate = hardware.node_latency_s, hardware.node_bytes_per_s
    else:
        share *= place.per_node / place.gpus_per_node
        rate = share * hardware.network_rate(place.nodes)
        latency, rate = hardware.network_latency_s, min(rate, hardware.node_bytes_per_s)
    rounds = {"send": 1, "all_reduce": (n - 1) / 2}.get(op, n - 1)
    return rounds * latency + wire_bytes(op, payload_bytes, n) / rate


def step_traffic(configuration: Configuration) -> tuple[Traffic, ...]:
    """Return what a rank sends in a step, as equal calls by axis and phase.

    With sequence parallelism a block gathers the input of both its halves and scatters
    the sums of both outputs; backward does the reverse, and gathers both inputs again
    for the gradients of the weights: ten calls of S = 2 B T D bytes. Without, there are
    four all_reduces.

    Args:
        configuration: The job.
    """
    job = configuration
    found = [*_tensor_parallel(job), *_context_parallel(job)]
    if job.pp > 1:
        cut = job.tp if job.cuts_sequence else 1
        found.append(Traffic("pp", "border", "send", _stream_bytes(job) / cut, 2))
    return (*found, *_data_parallel(job))


def held_elements(configuration: Configuration) -> int:
    """Return the parameters of the rank of the pipeline that holds most.

    Args:
        configuration: The job; ZeRO does not count here.
    """
    job = configuration
    v = stages_per_rank(job)
    return _held_elements(job.model, job.pp, v, job.tp, job.schedule == "zb-v")


@lru_cache(maxsize=4096)
def _held_elements(
    model: ModelShape, P: int, v: int, tp: int, down_and_up: bool
) -> int:
    held = [0] * P
    for stage, share in enumerate(stage_shares(model, P * v)):
        mirrored = down_and_up and stage >= P
        held[2 * P - 1 - stage if mirrored else stage % P] += stage_elements(
            share, model, tp=tp
        )
    return max(held)


def _stream_bytes(job: Configuration) -> float:
    """Return the bytes of the activations between two blocks, B T D numbers."""
    tokens = job.micro_batch_size * job.model.sequence_length / job.cp
    return ITEMSIZE[job.precision] * tokens * job.model.width


def _tensor_parallel(job: Configuration) -> list[Traffic]:
    if job.tp == 1:
        return []
    stream = _stream_bytes(job)
    again = 2 if job.recompute == "full" else 1  # forwards of each layer
    if not job.cuts_sequence:
        return [
            Traffic("tp", "layer", "all_reduce", stream, 2 * again + 2),
            Traffic("tp", "ends", "all_reduce", stream, 2),
        ]
    return [
        Traffic("tp", "layer", "all_gather", stream, 2 * again + 4),
        Traffic("tp", "layer", "reduce_scatter", stream, 2 * again + 2),
        Traffic("tp", "ends", "all_gather", stream, 3),
        Traffic("tp", "ends", "reduce_scatter", stream, 2),
    ]


def _context_parallel(job: Configuration) -> list[Traffic]:
    """Return the messages of ring attention: keys and values, and their gradients."""
    if job.cp == 1:
        return []
    model = job.model
    heads = max(1, model.num_kv_heads / job.tp)
    tokens = job.micro_batch_size * model.sequence_length / job.cp
    pair = 2 * ITEMSIZE[job.precision] * tokens * heads * model.head_width
    passes = 4 if job.recompute == "full" else 3  # backward sends gradients along
    return [Traffic("cp", "layer", "send", pair, passes * (job.cp - 1))]


def _data_parallel(job: Configuration) -> list[Traffic]:
    """Return the traffic of gradients and weights, of the rank that holds most.

    Gradients that are divided (ZeRO 2 and 3) have to leave after every micro-batch.
    """
    if job.dp * job.cp == 1:
        return []
    held = held_elements(job)
    weights, gradients = ITEMSIZE[job.precision] * held, GRADIENT_ITEMSIZE * held
    if job.zero == 0:
        return [_in_buckets("step", "all_reduce", gradients)]
    if job.zero < 3:
        phase = "step" if job.zero == 1 else "pass"
        return [
            _in_buckets(phase, "reduce_scatter", gradients),
            _in_buckets("update", "all_gather", weights),
        ]
    # Layer by layer: gathered before forward and again before backward.
    layers = math.ceil(job.model.num_layers / job.pp)
    return [
        Traffic("dp", "pass", "reduce_scatter", gradients / layers, layers),
        Traffic("dp", "pass", "all_gather", weights / layers, 2 * layers),
    ]


def _in_buckets(phase: str, op: str, payload: float) -> Traffic:
    calls = max(1, math.ceil(payload / BUCKET_BYTES))
    return Traffic("dp", phase, op, payload / calls, calls)
