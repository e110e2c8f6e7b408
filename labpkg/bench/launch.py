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
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

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
        Rows as in `labpkg.bench.run`, seconds per launch: the peer, the first World
        (`labpkg:first`), later runs (`labpkg`, the median) and the slow ones among
        them (`labpkg:p95`). CPU-seconds are those of the processes that were started.
    """
    num_first, num_later = (1, 3) if quick else (3, 20)
    peer = [_measure(_spawn, _children_s) for _ in range(num_first)]
    first = []
    for _ in range(num_first):
        ForkServer.get().close()
        first.append(_measure(_launch_first, _server_s, starts_at_zero=True))
    with World(_NUM_RANKS, device="cpu") as world:
        launch = lambda: world.run(_work, show=None)
        launch()
        later = [_measure(launch, _server_s) for _ in range(num_later)]
    base = _medians(peer)
    slow = sorted(wall_s for wall_s, _ in later)[math.ceil(0.95 * num_later) - 1]
    found = {
        BASE: (len(peer), base),
        "labpkg:first": (len(first), _medians(first)),
        "labpkg": (len(later), _medians(later)),
        "labpkg:p95": (len(later), (slow, _medians(later)[1])),
    }
    return [
        {
            "config": f"{_NUM_RANKS} ranks on the CPU (gloo), one all_reduce",
            "variant": name,
            "wall_ratio": wall_s / base[0],
            "cpu_ratio": cpu_s / base[1],
            "samples": num_samples,
            "value": wall_s,
            "unit": "s",
        }
        for name, (num_samples, (wall_s, cpu_s)) in found.items()
    ]


def _measure(
    launch: Callable[[], object],
    cpu_clock: Callable[[], float],
    *,
    starts_at_zero: bool = False,
) -> tuple[float, float]:
    """Return wall and CPU-seconds of a launch."""
    cpu_s = 0.0 if starts_at_zero else cpu_clock()
    start_s = time.perf_counter()
    launch()
    wall_s = time.perf_counter() - start_s
    return wall_s, cpu_clock() - cpu_s


def _medians(samples: list[tuple[float, float]]) -> tuple[float, float]:
    wall_s, cpu_s = zip(*samples, strict=True)
    return statistics.median(wall_s), statistics.median(cpu_s)


def _work() -> float:
    return all_reduce(torch.ones(1)).item()


def _launch_first() -> None:
    with World(_NUM_RANKS, device="cpu") as world:
        world.run(_work, show=None)


def _server_s() -> float:
    times = psutil.Process(ForkServer.get().pid).cpu_times()
    return times.user + times.system + times.children_user + times.children_system


def _spawn() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_spawned, (folder,), nprocs=_NUM_RANKS)


def _spawned(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", _NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=_NUM_RANKS)
    _work()
    dist.destroy_process_group()


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
