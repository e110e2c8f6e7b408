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
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType

from labpkg.planning.configuration import PRECISIONS


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
        power_limited: Whether the GPU draws as much as it may (700 W and more) in long
            runs, so that its clock falls below that of a short benchmark.
        sources: Where each number comes from, by the name of its field.

    Raises:
        ValueError: If a number is not positive and finite, the fraction is above 1,
            a table lacks an entry, or something has another type.
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
    power_limited: bool = False
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        self._check_tables()
        for name, value in self._numbers():
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ValueError(
                    f"{name}={value!r} of {self.name!r} must be a positive, finite "
                    "number; give bytes, FLOP/s, bytes/s and seconds"
                )
        for name, kind, what in (
            ("gpus_per_node", int, "a whole number"),
            ("power_limited", bool, "true or false"),
        ):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} of {self.name!r}; give {what}"
                )
        if self.matmul_fraction > 1:
            raise ValueError(
                f"matmul_fraction={self.matmul_fraction} of {self.name!r} is above 1, "
                "but no product is faster than the peak; give 0.8 for 80 %"
            )

    def _check_tables(self) -> None:
        for name in ("peak_flops", "network_bytes_per_s", "sources"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} of {self.name!r} must map names, "
                    "or numbers of nodes, to values; give a dictionary"
                )
        missing = [name for name in PRECISIONS if name not in self.peak_flops]
        if missing:
            raise ValueError(
                f"peak_flops of {self.name!r} has no {', '.join(missing)}; give the "
                f"dense peak for each of {', '.join(PRECISIONS)}"
            )
        counts = self.network_bytes_per_s
        if not counts or not all(isinstance(n, int) and n >= 1 for n in counts):
            raise ValueError(
                f"network_bytes_per_s={self.network_bytes_per_s} of {self.name!r} "
                "needs bytes/s by number of nodes, such as {2: 400e9}"
            )

    def _numbers(self) -> Iterator[tuple[str, object]]:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in ("peak_flops", "network_bytes_per_s"):
                yield from ((f"{entry.name}[{key!r}]", v) for key, v in value.items())
            elif entry.name not in ("name", "power_limited", "sources"):
                yield entry.name, value

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


# Entries. Estimates say that they are some; everything else was looked up or measured.

_GIB = 2**30
_SHEETS = {
    "a100": "datasheet of the A100 (SXM), https://www.nvidia.com/content/dam/en-zz/"
    "Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
    "h100": "datasheet of the H100, "
    "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet",
    "h200": "datasheet of the H200, https://www.nvidia.com/en-us/data-center/h200/",
    "b200": "datasheet of the HGX B200, "
    "https://nvdam.widen.net/s/wwnsxrhm2w/blackwell-datasheet-3384703",
    "mi300x": "datasheet of the MI300X, "
    "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html",
}
_CAPACITY = "total capacity that PyTorch reports when memory runs out"
_BEKMAN = "Bekman, ML Engineering, https://github.com/stas00/ml-engineering"
_MATMUL = f"best product of a search over shapes in PyTorch, {_BEKMAN}, accelerator"
_RING = f"all-reduce of 16 GiB on 8 x H200 without SHARP, {_BEKMAN}, network"
_NCCL = "latency of a ring (Simple) in NCCL's own model, src/graph/tuning.cc"
_CARDS = f"80 % of the network cards (the best to expect: {_BEKMAN}, network): "
_DGX = (
    "8 x 400 Gb/s, https://docs.nvidia.com/dgx-basepod/reference-architecture-"
    "infrastructure-foundation-enterprise-ai/latest/core-components.html"
)
_PLAYBOOK = (
    "fitted to all-gathers and reduce-scatters of 256 MB on 1 to 64 nodes (all 14 "
    "points within 22 %): Tazi et al. 2025, The Ultra-Scale Playbook, "
    "https://huggingface.co/spaces/nanotron/ultrascale-playbook"
)


def _sources(sheet: str, **others: str) -> dict[str, str]:
    own = _SHEETS[sheet]
    found: dict[str, str] = dict.fromkeys(("gpus_per_node", "memory_bytes_per_s"), own)
    found |= dict.fromkeys(("node_latency_s", "network_latency_s"), _NCCL)
    found["peak_flops"] = f"without sparsity (half of that with), {own}"
    found["power_limited"] = f"estimate from the power in the {own}"
    return {**found, "memory_bytes": _CAPACITY, **others}


def _flops(half: float, single: float) -> dict[str, float]:
    return {"bf16": half, "fp16": half, "fp32": single}


_H100 = Hardware(
    name="h100",
    gpus_per_node=8,
    memory_bytes=79.1 * _GIB,
    memory_bytes_per_s=3.35e12,
    peak_flops=_flops(989.4e12, 66.9e12),
    matmul_fraction=0.803,
    node_bytes_per_s=367.6e9,
    network_bytes_per_s={2: 330e9},
    node_latency_s=3.4e-6,
    network_latency_s=38e-6,
    power_limited=True,
    sources=_sources(
        "h100",
        matmul_fraction=_MATMUL,
        node_bytes_per_s=f"{_RING}; the H100 has the same NVLink",
        network_bytes_per_s=_PLAYBOOK,
        network_latency_s=_PLAYBOOK,
    ),
)
_A100 = Hardware(
    name="a100-80gb",
    gpus_per_node=8,
    memory_bytes=79.14 * _GIB,
    memory_bytes_per_s=2.039e12,
    peak_flops=_flops(312e12, 19.5e12),
    matmul_fraction=0.869,
    node_bytes_per_s=235e9,
    network_bytes_per_s={2: 160e9},
    node_latency_s=3.4e-6,
    network_latency_s=14e-6,
    sources=_sources(
        "a100",
        matmul_fraction=_MATMUL,
        node_bytes_per_s=f"all-reduce on 8 GPUs, {_BEKMAN}, network",
        network_bytes_per_s=f"{_CARDS}8 x 200 Gb/s, as the clusters of MosaicML, "
        "https://github.com/mosaicml/llm-foundry/tree/main/scripts/train/benchmarking",
    ),
)
_A100_40 = replace(
    _A100,
    name="a100-40gb",
    memory_bytes=42405855232,
    memory_bytes_per_s=1.555e12,
    sources={
        **_A100.sources,
        "memory_bytes": "deviceQuery of an A100-SXM4-40GB, https://upb-pc2.atlassian.net"
        "/wiki/spaces/PC2DOK/pages/1900609/NVIDIA+A100+40GB+with+NVLINK",
    },
)
_H200 = replace(
    _H100,
    name="h200",
    memory_bytes=139.8 * _GIB,
    memory_bytes_per_s=4.8e12,
    network_bytes_per_s={2: 320e9},
    network_latency_s=14e-6,
    sources=_sources(
        "h200",
        matmul_fraction=f"{_MATMUL}, of the H100 (same chip)",
        node_bytes_per_s=_RING,
        network_bytes_per_s=_CARDS + _DGX,
    ),
)
_B200 = replace(
    _H200,
    name="b200",
    memory_bytes=178.35 * _GIB,
    memory_bytes_per_s=7.67e12,
    peak_flops=_flops(2250e12, 80e12),
    matmul_fraction=0.776,
    node_bytes_per_s=680e9,
    sources=_sources(
        "b200",
        memory_bytes_per_s="7,680 bits at 3,996 MHz, as the driver says (the datasheet "
        "rounds to 8 TB/s), https://github.com/pytorch/ao/pull/4002",
        matmul_fraction=_MATMUL,
        node_bytes_per_s="mean of an all-gather and a reduce-scatter of 16 GiB on 8 x "
        f"B200 (668.28, 692.63), {_BEKMAN}, network/benchmarks",
        network_bytes_per_s=_CARDS + _DGX,
    ),
)
_MI300X = replace(
    _H200,
    name="mi300x",
    memory_bytes=191.98 * _GIB,
    memory_bytes_per_s=5.3e12,
    peak_flops=_flops(1307.4e12, 163.4e12),
    matmul_fraction=0.511,
    node_bytes_per_s=312.9e9,
    sources=_sources(
        "mi300x",
        matmul_fraction=f"{_MATMUL}, ROCm 6.3",
        node_bytes_per_s=f"all-reduce of 4 GB on 8 GPUs (2 GPUs alone reach 47.7e9), "
        f"{_BEKMAN}, network",
        network_bytes_per_s=f"{_CARDS}8 x 400 Gb/s, {_BEKMAN}, network",
        node_latency_s=f"{_NCCL} for NVLink; RCCL derives from it",
    ),
)
_H100_PCIE = replace(
    _H100,
    name="h100-pcie",
    memory_bytes_per_s=2.0e12,
    peak_flops=_flops(756e12, 51e12),
    matmul_fraction=0.656,
    node_bytes_per_s=40e9,
    network_bytes_per_s={2: 35e9},
    node_latency_s=5.7e-6,
    network_latency_s=14e-6,
    power_limited=False,  # its best product was measured at the limit
    sources=_sources(
        "h100",
        matmul_fraction="best of five square products (0.806 for the H100 SXM), "
        "https://github.com/zzc0721/torch-performance-test-data/issues/95",
        node_bytes_per_s="8 cards without bridges, 35 to 45 GB/s, "
        "https://docs.alayanew.com/en/docs/tech-blog/2026-05-06-nccl-tests",
        network_bytes_per_s="all-reduce on 2 nodes of 8 H200 NVL with 4 x 400 Gb/s, "
        "https://kubernetes.recipes/recipes/ai/nccl-all-reduce-perf-benchmark-multi-node",
    ),
)
_H100_NVL = replace(
    _H100_PCIE,
    name="h100-nvl",
    memory_bytes=93.0 * _GIB,
    memory_bytes_per_s=3.9e12,
    peak_flops=_flops(835.5e12, 60e12),
    sources={**_H100_PCIE.sources, "matmul_fraction": "estimate: as the H100 PCIe"},
)
_EPYC = "measured by labpkg bench hardware, 2 ranks on two cores of an AMD EPYC"
_LAPTOP = Hardware(
    name="laptop",
    gpus_per_node=2,
    memory_bytes=12.6e9,
    memory_bytes_per_s=17e9,
    peak_flops={"bf16": 250e9, "fp16": 2e9, "fp32": 90e9},
    matmul_fraction=1.0,
    node_bytes_per_s=3.9e9,
    network_bytes_per_s={2: 0.1e9},
    node_latency_s=77e-6,
    network_latency_s=200e-6,
    sources={
        **dict.fromkeys(("gpus_per_node", "memory_bytes", "memory_bytes_per_s"), _EPYC),
        "power_limited": "estimate: two busy cores keep their clock",
        **dict.fromkeys(("node_bytes_per_s", "node_latency_s"), _EPYC),
        "peak_flops": f"{_EPYC}: the best product, the nominal peak is not known",
        "matmul_fraction": "1, since the peak is what products reach",
        "network_bytes_per_s": "estimate: 80 % of 1 Gb/s Ethernet",
        "network_latency_s": "estimate for TCP over Ethernet",
    },
)

_GPUS = (_A100, _A100_40, _H100, _H100_PCIE, _H100_NVL, _H200, _B200, _MI300X)
HARDWARE: Mapping[str, Hardware] = MappingProxyType(
    {entry.name: entry for entry in (*_GPUS, _LAPTOP)}
)
"""What `find_hardware` knows, by name."""

_ALIASES = {"a100": "a100-80gb", "h100-sxm": "h100", "h100-80gb": "h100"}


def find_hardware(name: str) -> Hardware:
    """Return the entry of a name, or the one that a JSON file describes.

    Args:
        name: A key of `HARDWARE` in any case, spaces and underscores for hyphens, or
            `a100`, `h100-sxm`; or the path of a file that ends in `.json`, as
            `hardware_json` and `labpkg bench hardware --json` write it.

    Returns:
        The entry; change a number with `dataclasses.replace`.

    Raises:
        ValueError: If there is no such entry, or the file is none.
    """
    if name.lower().endswith(".json"):
        return _read(Path(name))
    wanted = re.sub(r"[\s_]+", "-", name.strip().lower())
    found = HARDWARE.get(_ALIASES.get(wanted, wanted))
    if found is None:
        near = difflib.get_close_matches(wanted, HARDWARE, n=3, cutoff=0.4)
        raise ValueError(
            f"hardware {name!r} is unknown; choose one of {', '.join(near or HARDWARE)}"
            ", or give a file NAME.json"
        )
    return found


def hardware_json(hardware: Hardware) -> str:
    """Return an entry as text that `find_hardware` reads from a file.

    Args:
        hardware: The entry.

    Returns:
        JSON with a field for each of its fields.
    """
    described = {
        entry.name: getattr(hardware, entry.name) for entry in fields(hardware)
    }
    return json.dumps(described, indent=2, default=dict) + "\n"


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
