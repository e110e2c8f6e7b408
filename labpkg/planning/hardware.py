"""GPUs, nodes and networks: the numbers of a machine, each with its source.

Rates are in FLOP/s and bytes/s, sizes in bytes: 80 GB is 80e9 bytes, 80 GiB is 80 x
2^30. A bandwidth is the bus bandwidth of large messages: what a ring sends per rank and
second, in one direction, whatever the number of ranks. What a collective of many ranks
loses beyond that is latency: a ring over n ranks has n - 1 steps.

Standard library only. Chapter: planning/planner. Reference:
https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md (bus bandwidth).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

REQUIRED_PRECISIONS = ("bf16", "fp16", "fp32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Describe a cluster of equal nodes.

    Change an entry with `dataclasses.replace`; nobody has to accept ours.

    Args:
        name: How it is called.
        gpus_per_node: GPUs that share the fast links of a node.
        memory_bytes: What one GPU offers to a program.
        memory_bytes_per_s: Of the GPU's own memory.
        peak_flops: Dense peak of one GPU by precision: bf16, fp16, fp32 at least.
        matmul_fraction: Part of the bf16 peak that the best large matrix product
            reaches.
        node_bytes_per_s: Bus bandwidth of a collective inside a node, per GPU.
        network_bytes_per_s: What a node sends to others, all its network cards
            together, by the least number of nodes for which it holds. It is also the
            bus bandwidth of one collective over all GPUs; g collectives side by side,
            of one GPU per node each, get a g-th of it.
        node_latency_s: Of one step of a ring inside a node.
        network_latency_s: Of one step of a ring that spans nodes.
        sources: Where each number comes from, by the name of its field.

    Raises:
        ValueError: If a number is not positive and finite, the fraction is above 1, a
            precision is missing, or there is no bandwidth between nodes.
    """

    name: str
    gpus_per_node: int
    memory_bytes: float
    memory_bytes_per_s: float
    peak_flops: Mapping[str, float] = field(hash=False)
    matmul_fraction: float
    node_bytes_per_s: float
    network_bytes_per_s: Mapping[int, float] = field(hash=False)
    node_latency_s: float
    network_latency_s: float
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)

    def network_rate(self, nodes: int) -> float:
        """Return what a node sends per second when so many nodes take part.

        Args:
            nodes: Nodes of the collective, at least 1.

        Returns:
            The bytes/s listed for the largest number of nodes that is not above
            `nodes`, else for the smallest.

        Raises:
            ValueError: If `nodes` is below 1.
        """
        if nodes < 1:
            raise ValueError(f"nodes={nodes} must be at least 1; give a number of nodes")
        listed = sorted(self.network_bytes_per_s)
        below = [count for count in listed if count <= nodes]
        return self.network_bytes_per_s[below[-1] if below else listed[0]]
