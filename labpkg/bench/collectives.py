"""Collectives of this library against torch's, in the same ranks, for three sizes.

The base is torch's own call on the backend of the ranks, gloo or NCCL. On the CPU
`labpkg` moves data through shared memory and `labpkg:messages` by messages, as between
hosts; ring, tree and recursive doubling are the all-reduces of the chapter. All-reduces
of torch and of the library work in place, everything else makes its result anew. What
a variant returns is compared with the base before it is timed.

The bus bandwidth is the bytes that a rank sends on a ring, 2 (n - 1) / n of the tensor
for an all-reduce and (n - 1) / n for the others, divided by the time: it compares
collectives and numbers of ranks with the speed of the link.

Chapter: processes/collectives. Reference: Patarasuk and Yuan 2009, JPDC 69(2):117-124;
https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md (bus bandwidth).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from labpkg.bench.measure import Sample, alternate, compare
from labpkg.bench.steps import mesh_of_messages
from labpkg.planning.cost import wire_bytes
from labpkg.processes import transport
from labpkg.processes.algorithms import (
    recursive_doubling_all_reduce,
    ring_all_reduce,
    tree_all_reduce,
)
from labpkg.processes.collectives import (
    all_gather,
    reduce_scatter,
)
from labpkg.processes.in_place import all_reduce_
from labpkg.processes.world import World

BASE = "torch.distributed"
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather")

_SIZES = {"64 KiB": 2**16, "1 MiB": 2**20, "16 MiB": 2**24}
Variant = Callable[[Tensor], Tensor]


def rows(
    *,
    quick: bool = False,
    collectives: Sequence[str] = COLLECTIVES,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Measure collectives on all GPUs, or on two ranks on the CPU.

    Args:
        quick: The two smaller sizes and few rounds: the form of the answer.
        collectives: Which of the three.
        device: `cpu` for the CPU even where there are GPUs.

    Returns:
        Rows as in `labpkg.bench.run`, milliseconds per call, and three more keys that
        `labpkg.plot.bandwidth` draws: `collective`, `num_bytes` (of the full tensor)
        and `bus_gb_per_s`.

    Raises:
        RuntimeError: If a variant returns something else than the base.
    """
    found = []
    with World(device=device, timeout_s=None) as world:
        place = f"{world.world_size} ranks on {world.device} ({world.backend})"
        for collective in collectives:
            for size, num_bytes in list(_SIZES.items())[: 2 if quick else None]:
                samples = world.run(_measure, collective, num_bytes, quick)[0]
                label = f"{collective} of {size}, {place}"
                sent = wire_bytes(collective, num_bytes, world.world_size)
                found += [
                    {
                        **row,
                        "collective": collective,
                        "num_bytes": num_bytes,
                        "bus_gb_per_s": sent / row["value"] / 1e6,
                    }
                    for row in compare(samples, base=BASE, config=label)
                ]
    return found


def _measure(collective: str, num_bytes: int, quick: bool) -> dict[str, list[Sample]]:
    n, rank = dist.get_world_size(), dist.get_rank()
    numel = num_bytes // 4 // n * n
    x = torch.arange(numel, dtype=torch.float32) % 97 + rank
    if collective == "all_gather":
        x = x[: numel // n]
    variants = _variants(collective)
    _check({name: variant(x.clone()) for name, variant in variants.items()})
    work = torch.zeros_like(x)  # zeros stay zeros, however often they are summed
    calls = {name: partial(variant, work) for name, variant in variants.items()}
    rounds, most = (5, 5) if quick else (12, 24)
    return alternate(
        calls, num_rounds=rounds, max_rounds=most, sample_s=0.01 if quick else 0.2
    )


def _variants(collective: str) -> dict[str, Variant]:
    """Return what is compared; on a GPU there is neither shared memory nor its rest."""
    own = {
        "all_reduce": _all_reduce_in_place,
        "reduce_scatter": reduce_scatter,
        "all_gather": all_gather,
    }[collective]
    peer = partial(transport.by_torch, collective)
    variants: dict[str, Variant] = {BASE: peer, "labpkg": own}
    if torch.get_default_device().type == "cpu":
        variants["labpkg:messages"] = partial(own, mesh=mesh_of_messages())
    if collective == "all_reduce":
        variants["labpkg:ring"] = ring_all_reduce
        variants["labpkg:tree"] = tree_all_reduce
        variants["labpkg:doubling"] = recursive_doubling_all_reduce
    return variants


def _all_reduce_in_place(x: Tensor, mesh: Any = None) -> Tensor:
    all_reduce_(x, mesh).wait()
    return x


def _check(results: dict[str, Tensor]) -> None:
    """Raise if a variant computes something else: fast and wrong is no result."""
    for name, result in results.items():
        if not torch.allclose(result, results[BASE]):
            raise RuntimeError(
                f"{name} returns {result.flatten()[:3].tolist()}..., {BASE} "
                f"{results[BASE].flatten()[:3].tolist()}...; their times say nothing"
            )
