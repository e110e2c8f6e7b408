"""What this machine does: products, memory, all-reduce, as an entry of the planner.

All ranks measure at once, because they share caches, memory and power. Of the matrix
products the best of several sizes counts; of the memory a copy, which reads and writes.
An all-reduce of S bytes on a ring of n ranks takes

    t(S) = 2 (n - 1) alpha + 2 (n - 1) / n S / B

so a small one tells the latency alpha of a step and a large one the bus bandwidth B.
What a machine cannot tell about itself is said in `sources`: the nominal peak of an
unknown processor, and the network to other machines.

Chapter: planning/measuring. Reference: Thakur, Rabenseifner, Gropp 2005, IJHPCA
19(1):49-66, doi:10.1177/1094342005051521.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist

from labpkg.bench.measure import alternate, compare
from labpkg.planning.cost import wire_bytes
from labpkg.planning.hardware import HARDWARE, Hardware, hardware_json
from labpkg.processes.in_place import all_reduce_
from labpkg.processes.world import World

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ENOUGH_S = 0.05  # a product that takes longer is not made larger
_UNITS = {"GFLOP/s": 1e9, "GB/s": 1e9, "GB": 1e9, "us": 1e-6, "": 1.0}
# What torch calls a GPU, without the vendor, and its entry. A slice of a GPU (MIG) or a
# relative, such as the H200 NVL, has a longer name and another peak.
_KNOWN = {
    "A100-SXM4-40GB": "a100-40gb",
    "A100-SXM4-80GB": "a100-80gb",
    "H100 PCIe": "h100-pcie",
    "H100 NVL": "h100-nvl",
    "H100 80GB HBM3": "h100",
    "H200": "h200",
    "B200": "b200",
    "MI300X": "mi300x",
}
_ETHERNET_BYTES_PER_S, _ETHERNET_LATENCY_S = 1e9, 50e-6


def measure_hardware(*, quick: bool = False, device: str | None = None) -> Hardware:
    """Measure this machine: all its GPUs, or two ranks on the CPU.

    Args:
        quick: Few repetitions of small work: the form of the answer.
        device: `cpu` for the CPU even where there are GPUs.

    Returns:
        An entry for the planner. A processor that the library does not know has the
        best product as its peak, so that a utilisation is one of what can be reached.
        The network between machines is assumed, not measured: put that of yours into
        `network_bytes_per_s` with `dataclasses.replace`.

    Raises:
        ValueError: If there is no such device.
    """
    return _entry(rows(quick=quick, device=device))


def rows(*, quick: bool = False, device: str | None = None) -> list[dict[str, Any]]:
    """Measure products, memory and all-reduces of this machine.

    Args:
        quick: Few repetitions of small work.
        device: `cpu` for the CPU even where there are GPUs.

    Returns:
        Rows as in `labpkg.bench.run` without ratios, since there is no peer, and with
        two more keys: the `field` of `Hardware` that the value is for, and the `key`
        in it.
    """
    num_gpus = 0 if device == "cpu" else torch.cuda.device_count()
    with World(
        num_gpus or 2, device="cuda" if num_gpus else device, timeout_s=None
    ) as world:
        return world.run(_measure, quick)[0]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the report of `labpkg.bench.run` has besides its rows.

    Args:
        rows: Of this benchmark.

    Returns:
        The key `hardware`: the entry that `labpkg.find_hardware` reads from a file with
        the report.
    """
    return {"hardware": json.loads(hardware_json(_entry(rows)))}


# In a rank ---------------------------------------------------------------------------


class _Measured(NamedTuple):
    """A value in the units of SI, and how many quiet samples are behind it."""

    value: float
    samples: int | None = None


def _measure(quick: bool) -> list[dict[str, Any]]:
    n, on_gpu = dist.get_world_size(), torch.get_default_device().type == "cuda"
    found = [_row("ranks", "gpus_per_node", "", _Measured(n))]
    for precision in _DTYPES:
        best = _best_product(
            precision, 256 if quick else 8192 if on_gpu else 2048, quick
        )
        found.append(_row(f"product in {precision}", "peak_flops", "GFLOP/s", best))
        found[-1]["key"] = precision
    copied = _copy(2**20 if quick else 2**30 if on_gpu else 2**27, quick)
    found.append(_row("copy", "memory_bytes_per_s", "GB/s", copied))
    found.append(_row("memory", "memory_bytes", "GB", _Measured(_capacity(n, on_gpu))))
    if n > 1:
        seconds, samples = _all_reduce_s(n * 4, quick)
        step = _Measured(seconds / (2 * (n - 1)), samples)
        found.append(_row("all_reduce, a step", "node_latency_s", "us", step))
        large = 2**20 if quick else 2**28 if on_gpu else 2**24
        seconds, samples = _all_reduce_s(large, quick)
        rate = _Measured(wire_bytes("all_reduce", large, n) / seconds, samples)
        found.append(_row("all_reduce", "node_bytes_per_s", "GB/s", rate))
    processor = torch.cuda.get_device_name() if on_gpu else "CPU, one thread per rank"
    return [{"config": processor, **row} for row in found]


def _row(what: str, field: str, unit: str, measured: _Measured) -> dict[str, Any]:
    return {
        "variant": f"labpkg:{what}",
        "wall_ratio": None,
        "cpu_ratio": None,
        "samples": measured.samples,
        "value": measured.value / _UNITS[unit],
        "unit": unit,
        "field": field,
        "key": None,
    }


def _seconds(call: Callable[[], object], quick: bool) -> _Measured:
    samples = alternate(
        {"": call}, num_rounds=3 if quick else 7, sample_s=0.0 if quick else 0.2
    )
    row = compare(samples, base="", config="")[0]
    return _Measured(row["value"] / 1e3, row["samples"])


def _best_product(precision: str, largest: int, quick: bool) -> _Measured:
    """Return the FLOP/s of the fastest square product, by doubling its size."""
    best, size, once_s = _Measured(0.0), 128, 0.0
    while size < largest and once_s < _ENOUGH_S:
        size *= 2
        a, b = (torch.randn(size, size).to(_DTYPES[precision]) for _ in range(2))
        once_s, samples = _seconds(lambda a=a, b=b: a @ b, quick)
        best = max(best, _Measured(2 * size**3 / once_s, samples))
    return best


def _copy(num_bytes: int, quick: bool) -> _Measured:
    source = torch.ones(num_bytes // 4)
    target = torch.empty_like(source)
    seconds, samples = _seconds(lambda: target.copy_(source), quick)
    return _Measured(2 * num_bytes / seconds, samples)


def _all_reduce_s(num_bytes: int, quick: bool) -> _Measured:
    x = torch.zeros(num_bytes // 4)  # zeros stay zeros, however often they are summed
    return _seconds(lambda: all_reduce_(x).wait(), quick)


def _capacity(num_ranks: int, on_gpu: bool) -> float:
    if on_gpu:
        return torch.cuda.get_device_properties(
            torch.cuda.current_device()
        ).total_memory
    return psutil.virtual_memory().total / num_ranks


# The entry ---------------------------------------------------------------------------


_ALONE = "assumed, and never used: one GPU sends nothing inside its node"
_ASSUMED = "assumed: 10 Gb/s Ethernet; replace it by your network"


def _entry(rows: list[dict[str, Any]]) -> Hardware:
    found: dict[str, Any] = {"peak_flops": {}}
    for row in rows:
        value = row["value"] * _UNITS[row["unit"]]
        if row["key"] is None:
            found[row["field"]] = value
        else:
            found[row["field"]][row["key"]] = value
    sources = dict.fromkeys(found, "measured by labpkg bench hardware")
    if "node_bytes_per_s" not in found:
        found["node_bytes_per_s"] = found["memory_bytes_per_s"] / 2
        found["node_latency_s"] = _ETHERNET_LATENCY_S
        sources |= dict.fromkeys(("node_bytes_per_s", "node_latency_s"), _ALONE)
    sources |= dict.fromkeys(("network_bytes_per_s", "network_latency_s"), _ASSUMED)
    processor = rows[0]["config"]
    model = processor.removeprefix("NVIDIA ").removeprefix("AMD Instinct ")
    known = HARDWARE[_KNOWN[model]] if model in _KNOWN else None
    peak, fraction, source = _peak(known, found["peak_flops"])
    sources |= {"peak_flops": source, "matmul_fraction": source}
    sources["power_limited"] = (
        "assumed: these products were measured for long enough"
        if known is None
        else known.sources["power_limited"]
    )
    return Hardware(
        **{**found, "gpus_per_node": round(found["gpus_per_node"]), "peak_flops": peak},
        name=f"this machine ({processor})",
        matmul_fraction=fraction,
        network_bytes_per_s={2: _ETHERNET_BYTES_PER_S},
        network_latency_s=_ETHERNET_LATENCY_S,
        power_limited=known is not None and known.power_limited,
        sources=sources,
    )


def _peak(
    known: Hardware | None, best: dict[str, float]
) -> tuple[dict[str, float], float, str]:
    """Return the peaks, the part that products reach, and where both are from."""
    if known is None:
        what = "measured; the nominal peak is unknown, so it is what we reach"
        return best, 1.0, what
    peak = dict(known.peak_flops)
    source = f"best product as measured, of the peak of the {known.name}"
    return peak, min(1.0, best["bf16"] / peak["bf16"]), source
