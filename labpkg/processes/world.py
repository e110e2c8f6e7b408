"""`World`: ranks behind a notebook.

`World(4).run(train, steps=10)` starts four processes that form one process group, calls
the function in each and returns the values in rank order. Every run gets fresh ranks,
forked from a warm fork server in about 0.1 s, so nothing leaks from one run into the
next; a run that fails is a `RankError` that names the rank that failed first.

The kernel (a notebook, a script, a test) keeps the time, prints what the ranks print,
and kills all ranks together when all have reported, one has failed, the time is up, or
the user interrupts. No rank ends early, so no peer loses a connection in a good run.

Chapter: processes/ranks.
"""

from __future__ import annotations

import inspect
import math
import os
import socket
import sys
from collections.abc import Callable
from types import EllipsisType, TracebackType
from typing import Any

import torch

from labpkg.processes.diagnosis import RankError
from labpkg.processes.fork_server import ForkServer
from labpkg.processes.interrupts import Interrupts
from labpkg.processes.mesh import Placement, choose_placement
from labpkg.processes.parcels import dump
from labpkg.processes.rank import Job
from labpkg.processes.run import Run

__all__ = ["RankError", "World"]


class World:
    """Processes on this machine that run a function together.

    A World holds no processes: each run forks its ranks and ends them. The first World
    of a process starts the fork server, which imports torch in the background; modules
    of labpkg that are edited later are seen by ranks after a restart of the kernel.

    Args:
        world_size: Number of ranks; None means one per GPU with two or more GPUs,
            else 2.
        device: `"cuda"` (with fewer GPUs than ranks they share them), `"cpu"`, or None
            for CUDA with one GPU per rank if there are enough, else the CPU.
        backend: `"nccl"`, `"gloo"`, or None to choose.
        timeout_s: Default limit of a run in seconds; None waits for ever.
        seed: Every run starts the generators of Python, NumPy and torch from it, alike
            on all ranks: repeating a run repeats its result.
        check: Compare the collectives of all ranks before each one runs. A mismatch is
            then a readable error instead of an abort; every collective gets slower, and
            gloo's reduce_scatter rounds differently.
        max_result_bytes: A larger pickled result of a rank is an error.

    Raises:
        ValueError: If the request cannot be met on this machine.
        RuntimeError: Inside a rank, whoever started it.

    Example:
        >>> world = World(4)
        World: 4 ranks on cpu (gloo): torch sees no GPU
        >>> world.run(lambda: torch.distributed.get_rank() ** 2)
        [0, 1, 4, 9]
    """

    def __init__(
        self,
        world_size: int | None = None,
        *,
        device: str | None = None,
        backend: str | None = None,
        timeout_s: float | None = 60,
        seed: int = 0,
        check: bool = False,
        max_result_bytes: int = 2**30,
    ) -> None:
        _refuse_inside_a_rank()
        if world_size is None:
            num_gpus = 0 if device == "cpu" else torch.cuda.device_count()
            world_size = num_gpus if num_gpus > 1 else 2
        self.placement: Placement = choose_placement(
            world_size, device=device, backend=backend
        )
        self.world_size, self.device = world_size, self.placement.device
        self.backend = self.placement.backend
        self._timeout_s = _valid_timeout(timeout_s)
        self._seed, self._check = _valid_seed(seed), check
        if max_result_bytes < 1:
            raise ValueError(
                f"max_result_bytes={max_result_bytes} is not positive; choose more"
            )
        self._max_result_bytes = max_result_bytes
        self._closed = False
        ForkServer.get()
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
        print(
            f"World: {ranks} on {self.device} ({self.backend}): {self.placement.reason}"
        )

    def run(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        timeout_s: float | EllipsisType | None = ...,
        show: int | str | None = 0,
        **kwargs: Any,
    ) -> list[Any]:
        """Call `fn(*args, **kwargs)` on every rank and return the values in rank order.

        Functions, closures and classes of notebook cells travel by value. In the ranks
        the process group is ready, `RANK`, `WORLD_SIZE`, `LOCAL_RANK` and
        `LOCAL_WORLD_SIZE` are set and torch's default device is the rank's own. Threads
        and handlers of `atexit` do not outlive the call.

        Args:
            fn: The function. What it returns is pickled: tensors arrive on the CPU, a
                small view without the storage behind it, parameters without `.grad`.
            *args: Its arguments, pickled once for all ranks.
            timeout_s: Limit of the run in seconds, from the moment when all ranks have
                joined the group; None waits for ever; by default the World's.
            show: The rank whose output appears here, live, with the prefix `[rank]`;
                `"all"` or None.
            **kwargs: Its keyword arguments.

        Returns:
            One value per rank.

        Raises:
            RankError: If a rank raises, exits, is killed, or the time is up.
            ValueError: If `fn` has a parameter `timeout_s` or `show`, which it would
                never get, or if an argument makes no sense.
            RuntimeError: If the World is closed, or the fork server cannot start.
        """
        _refuse_inside_a_rank()
        if self._closed:
            raise RuntimeError("this World is closed; make a new one")
        _refuse_hidden_parameters(fn)
        self._check_show(show)
        limit_s = self._timeout_s if timeout_s is ... else _valid_timeout(timeout_s)
        with socket.create_server(("127.0.0.1", 0), backlog=self.world_size) as store:
            job = self._job(port=store.getsockname()[1])
            with dump(job, (fn, args, kwargs)) as payload, Interrupts() as interrupts:
                run = Run(self.world_size, show, is_checked=self._check)
                try:
                    with interrupts.let_through():
                        run.start(payload, store)
                        return run.collect(limit_s)
                finally:
                    run.end()

    def close(self) -> None:
        """Refuse further runs; closing twice is fine."""
        self._closed = True

    def __enter__(self) -> World:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return (
            f"World({self.world_size}, device={self.device!r}, "
            f"backend={self.backend!r}{state})"
        )

    def _check_show(self, show: int | str | None) -> None:
        is_rank = type(show) is int and 0 <= show < self.world_size
        if not is_rank and show not in ("all", None):
            raise ValueError(
                f"show={show!r} is neither a rank below world_size={self.world_size} "
                f"nor 'all' nor None; choose one of these"
            )

    def _job(self, port: int) -> Job:
        loopback = next(
            (name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo"
        )
        environment = {
            **os.environ,
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": loopback,
            "NCCL_SOCKET_IFNAME": loopback,
            "TORCH_FR_BUFFER_SIZE": "256",  # the flight recorder, for the diagnosis
        }
        if self._check:
            environment["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
        return Job(
            world_size=self.world_size,
            device=self.device,
            backend=self.backend,
            port=port,
            seed=self._seed,
            max_result_bytes=self._max_result_bytes,
            environment=environment,
            path=sys.path[:],
            directory=os.getcwd(),
        )


def _refuse_inside_a_rank() -> None:
    if "RANK" in os.environ:
        raise RuntimeError(
            f"this process is rank {os.environ['RANK']} of a job (RANK is set), and a "
            f"World starts ranks itself; make the World outside the function that the "
            f"ranks run, or start the script without torchrun"
        )


def _refuse_hidden_parameters(fn: Callable[..., Any]) -> None:
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):  # some built-in functions have no signature
        return
    for name in ("timeout_s", "show"):
        if name in parameters:
            raise ValueError(
                f"the function has a parameter {name!r}, which `run` takes for itself; "
                f"rename it, or wrap it in a lambda"
            )


def _valid_seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed!r} is no int from 0 to 2**64 - 1; choose one")
    return seed


def _valid_timeout(timeout_s: Any) -> float:
    if timeout_s is None:
        return math.inf
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)):
        raise ValueError(
            f"timeout_s={timeout_s!r} is no number; choose seconds or None"
        )
    if not timeout_s > 0:
        raise ValueError(f"timeout_s={timeout_s} is not positive; choose more, or None")
    return float(timeout_s)
