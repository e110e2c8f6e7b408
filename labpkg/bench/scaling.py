"""Strong and weak scaling: a training step on 1, 2, 4, ... ranks.

The batch is the same for all numbers of ranks (strong), or grows with them (weak).

Every number of ranks that divides the World is a mesh of its own. The ranks of its
first group train, the others wait until they are through; so all numbers take turns in
the same processes. One rank trains the plain model, without any engine: a slower
program there would flatter all others.

Chapter: planning/measuring. References: Amdahl 1967, doi:10.1145/1465482.1465560;
Gustafson 1988, doi:10.1145/42411.42415.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from labpkg.bench.measure import Sample, alternate, compare
from labpkg.bench.steps import LARGE, SMALL, Trained, training_step, with_adamw
from labpkg.foundations.models import GPT, GPTConfig
from labpkg.parallelism.data_parallel import DataParallel
from labpkg.planning.scaling import parallel_efficiency
from labpkg.processes.mesh import make_mesh
from labpkg.processes.world import World

BASE = "1 rank"

_SEQUENCES_PER_RANK = 8  # where all ranks work


def rows(*, quick: bool = False) -> list[dict[str, Any]]:
    """Measure data-parallel steps on all GPUs and fewer, or on 1 and 2 CPU ranks.

    Args:
        quick: A small model and few rounds: the form of the answer, not its numbers.

    Returns:
        Rows as in `labpkg.bench.run`, milliseconds per step, with `efficiency`: of n
        ranks for the same work, and for n times the work.
    """
    config = SMALL if quick else LARGE
    with World(timeout_s=None) as world:
        samples = world.run(_measure, config, quick)[0]
        where = f"{config.shape.num_parameters / 1e6:.1f}M GPT on {world.device}"
        size = world.world_size
    whole = _SEQUENCES_PER_RANK * size
    counts = _divisors(size)
    found = []
    for what, is_grown in ((f"{whole} sequences", False), ("8 sequences a rank", True)):
        table = {
            _name(n): samples[_variant(n, whole // (size if is_grown else n))]
            for n in counts
        }
        for n, row in zip(
            counts, compare(table, base=BASE, config=f"{where}, {what}"), strict=True
        ):
            work = n if is_grown else 1
            row["efficiency"] = parallel_efficiency(work, row["wall_ratio"], n)
            found.append(row)
    return found


def _measure(config: GPTConfig, quick: bool) -> dict[str, list[Sample]]:
    size = dist.get_world_size()
    whole = _SEQUENCES_PER_RANK * size
    losses: dict[str, Tensor] = {}
    variants: dict[str, Callable[[], object]] = {}
    for n in _divisors(size):
        mesh = make_mesh(pp=size // n, dp=n)  # the groups along dp are side by side
        engine = with_adamw if n == 1 else partial(_data_parallel, mesh=mesh["dp"])
        for share in dict.fromkeys((whole // n, whole // size)):
            name = _variant(n, share)
            variants[name] = _wait
            if mesh["pp"].get_local_rank() == 0:
                variants[name] = training_step(engine, config, share, losses, name)
    rounds, most = (2, 2) if quick else (12, 24)
    return alternate(
        variants, num_rounds=rounds, max_rounds=most, sample_s=0.01 if quick else 0.5
    )


def _divisors(size: int) -> list[int]:
    return [n for n in range(1, size + 1) if size % n == 0]


def _name(n: int) -> str:
    return BASE if n == 1 else f"{n} ranks"


def _variant(n: int, sequences: int) -> str:
    return f"{_name(n)}, {sequences} each"


def _wait() -> None:
    """Do nothing: the harness lets all ranks meet after each sample."""


def _data_parallel(model: GPT, *, mesh: Any) -> Trained:
    return with_adamw(DataParallel(model, mesh))
