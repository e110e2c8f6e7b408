"""How long it takes until ranks have done something together.

A launch is complete when every rank has joined the group, taken part in one all_reduce
and returned its value. A notebook launches often, so two numbers count: the first World
of a kernel, which imports torch in its fork server, and every run after that. The peer
is torch's own launcher, which starts each rank as a new Python process.

Chapter: processes/ranks, planning/measuring.
"""

from __future__ import annotations

import math
import resource
import tempfile
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from labpkg.bench.measure import Sample, alternate, compare
from labpkg.processes.collectives import all_reduce
from labpkg.processes.fork_server import ForkServer
from labpkg.processes.world import World

BASE = "torch.multiprocessing.spawn"

_NUM_RANKS = 4


def rows(*, quick: bool = False) -> list[dict[str, Any]]:
    """Measure launches of 4 ranks on the CPU.

    Args:
        quick: One first launch and few later ones: the form of the answer.

    Returns:
        Rows as in `labpkg.bench.run`, milliseconds per launch: the peer, the first
        World (`labpkg:first`), a run after that (`labpkg`), and the slow ones among
        many such runs (`labpkg:p95`). CPU-seconds are those of all processes.
    """
    options: dict[str, Any] = {"warm_up": 0, "sample_s": 0.0, "cpu_clock": _family_s}
    with World(_NUM_RANKS, device="cpu") as world:
        launch = lambda: world.run(_work, show=None)

        def launch_first() -> None:
            ForkServer.get().close()
            launch()

        launch()
        variants = {BASE: _spawn, "labpkg:first": launch_first, "labpkg": launch}
        samples = alternate(variants, num_rounds=1 if quick else 5, **options)
        later = {"labpkg": launch}
        many = alternate(later, num_rounds=3 if quick else 20, **options)["labpkg"]
    config = f"{_NUM_RANKS} ranks on the CPU (gloo), one all_reduce"
    found = compare(samples, base=BASE, config=config)
    return [*found, _slow(many, of=found[0]["value"], like=found[-1])]


def _slow(samples: list[Sample], *, of: float, like: dict[str, Any]) -> dict[str, Any]:
    """Return the row of the 95th percentile, as a ratio to `of` milliseconds."""
    walls = sorted(sample.wall_s for sample in samples)
    slow_ms = walls[math.ceil(0.95 * len(walls)) - 1] * 1e3
    own = {"variant": "labpkg:p95", "wall_ratio": slow_ms / of, "value": slow_ms}
    return {**like, **own, "samples": len(walls)}


def _work() -> float:
    return all_reduce(torch.ones(1)).item()


def _family_s() -> float:
    """Return the CPU-seconds of what this process started: the ended, and the server.

    When the server ends, its time moves from the one to the other.
    """
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    server = psutil.Process(ForkServer.get().pid).cpu_times()
    alive_s = server.user + server.system
    alive_s += server.children_user + server.children_system
    return ended.ru_utime + ended.ru_stime + alive_s


def _spawn() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_spawned, (folder,), nprocs=_NUM_RANKS)


def _spawned(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", _NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=_NUM_RANKS)
    _work()
    dist.destroy_process_group()
