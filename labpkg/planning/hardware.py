"""GPUs, nodes and networks: the numbers of a machine, each with its source.

Rates are in FLOP/s and bytes/s, sizes in bytes: 80 GB is 80e9 bytes, 80 GiB is 80 x
2^30. Bandwidths of collectives are bus bandwidths: what a ring sends per rank and
second, whatever the number of ranks.

Standard library only. Chapter: planning/planner.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Describe a cluster of equal nodes.

    Args:
        name: How it is called.
        gpus_per_node: GPUs that share the fast links of a node.
        memory_bytes: What one GPU offers to a program.
        memory_bytes_per_s: Of the GPU's own memory.
        peak_flops: Dense peak of one GPU by precision (bf16, fp16, fp32).
        matmul_fraction: Part of the peak that large matrix products reach.
        node_bytes_per_s: Bus bandwidth of a collective inside a node, per GPU.
        network_bytes_per_s: Bus bandwidth per GPU between nodes, by the number of nodes
            that take part, all GPUs of a node together in one collective.
        node_latency_s: Of one message inside a node.
        network_latency_s: Of one message between nodes.
        sources: Where each number comes from, by the name of its field.
    """

    name: str
    gpus_per_node: int
    memory_bytes: float
    memory_bytes_per_s: float
    peak_flops: Mapping[str, float]
    matmul_fraction: float
    node_bytes_per_s: float
    network_bytes_per_s: Mapping[int, float]
    node_latency_s: float
    network_latency_s: float
    sources: Mapping[str, str] = field(default_factory=dict)
