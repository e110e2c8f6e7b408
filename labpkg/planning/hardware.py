"""GPUs, nodes and networks: the numbers of a machine, each with its source.

Rates are in FLOP/s and bytes/s, sizes in bytes: 80 GB is 80e9 bytes, 80 GiB is 80 x
2^30. A bandwidth is the bus bandwidth of large messages: what a ring sends per rank and
second, in one direction, whatever the number of ranks. What a collective of many ranks
loses beyond that is latency: a ring over n ranks has n - 1 steps.

Standard library only. Chapter: planning/planner. Reference:
https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md (bus bandwidth).
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType

PRECISIONS = ("bf16", "fp16", "fp32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Describe a cluster of equal nodes.

    `dataclasses.replace` makes an entry of your own from one of these.

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
        network_latency_s: Of one step of a ring that crosses the network.
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

    def __post_init__(self) -> None:
        for name, value in self._numbers():
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ValueError(
                    f"{name}={value!r} of {self.name!r} must be a positive, finite "
                    "number; give bytes, FLOP/s, bytes/s and seconds"
                )
        if self.matmul_fraction > 1:
            raise ValueError(
                f"matmul_fraction={self.matmul_fraction} of {self.name!r} is above 1; "
                "no product is faster than the peak: give 0.8 for 80 %"
            )
        missing = [name for name in PRECISIONS if name not in self.peak_flops]
        if missing:
            raise ValueError(
                f"peak_flops of {self.name!r} has no {', '.join(missing)}; give the "
                f"dense peak for each of {', '.join(PRECISIONS)}"
            )
        if not self.network_bytes_per_s or min(self.network_bytes_per_s) < 1:
            raise ValueError(
                f"network_bytes_per_s={dict(self.network_bytes_per_s)} of "
                f"{self.name!r} needs bytes/s by number of nodes, such as {{2: 400e9}}"
            )

    def _numbers(self) -> list[tuple[str, object]]:
        numbers: list[tuple[str, object]] = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Mapping) and entry.name != "sources":
                numbers += [(f"{entry.name}[{key!r}]", v) for key, v in value.items()]
            elif entry.name not in ("name", "sources"):
                numbers.append((entry.name, value))
        return numbers

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
            raise ValueError(f"nodes={nodes} must be at least 1")
        listed = self.network_bytes_per_s
        return listed[max((n for n in listed if n <= nodes), default=min(listed))]


_H100 = Hardware(
    name="h100",
    gpus_per_node=8,
    memory_bytes=79.10 * 2**30,
    memory_bytes_per_s=3.35e12,
    peak_flops={"bf16": 989.4e12, "fp16": 989.4e12, "fp32": 66.9e12},
    matmul_fraction=0.80,
    node_bytes_per_s=330e9,
    network_bytes_per_s={2: 330e9},
    node_latency_s=3.4e-6,
    network_latency_s=38e-6,
)
_A100 = Hardware(
    name="a100-80gb",
    gpus_per_node=8,
    memory_bytes=79.15 * 2**30,
    memory_bytes_per_s=2.039e12,
    peak_flops={"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
    matmul_fraction=0.87,
    node_bytes_per_s=235e9,
    network_bytes_per_s={2: 185e9},
    node_latency_s=3.4e-6,
    network_latency_s=14e-6,
)
_A100_40 = Hardware(
    name="a100-40gb",
    gpus_per_node=8,
    memory_bytes=39.39 * 2**30,
    memory_bytes_per_s=1.555e12,
    peak_flops={"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
    matmul_fraction=0.87,
    node_bytes_per_s=235e9,
    network_bytes_per_s={2: 185e9},
    node_latency_s=3.4e-6,
    network_latency_s=14e-6,
)

HARDWARE: Mapping[str, Hardware] = MappingProxyType(
    {entry.name: entry for entry in (_H100, _A100, _A100_40)}
)


def find_hardware(name: str) -> Hardware:
    """Return the entry of a name, or the one that a JSON file describes.

    Args:
        name: A key of `HARDWARE` in any case, or the path of a file that ends in
            `.json`, as `hardware_json` writes it.

    Raises:
        ValueError: If there is no such entry, or the file is none.
    """
    if name.lower().endswith(".json"):
        return _read(Path(name))
    found = HARDWARE.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), HARDWARE, n=3, cutoff=0.4)
        raise ValueError(
            f"hardware {name!r} is unknown; choose one of {', '.join(near or HARDWARE)}"
            ", or give a file NAME.json"
        )
    return found


def hardware_json(hardware: Hardware) -> str:
    """Return an entry as text that `find_hardware` reads from a file.

    Args:
        hardware: The entry.
    """
    return json.dumps(asdict(hardware), indent=2) + "\n"


def _read(path: Path) -> Hardware:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        described = described.get("hardware", described)
        by_nodes = described["network_bytes_per_s"]
        by_nodes = {int(nodes): rate for nodes, rate in by_nodes.items()}
        return Hardware(**{**described, "network_bytes_per_s": by_nodes})
    except FileNotFoundError:
        raise ValueError(
            f"there is no file {path}; write one with hardware_json"
        ) from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        wanted = ", ".join(entry.name for entry in fields(Hardware))
        raise ValueError(
            f"{path} describes no hardware ({type(error).__name__}: {error}); it needs "
            f"the keys {wanted}"
        ) from error
