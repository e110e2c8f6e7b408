"""Dask as the launcher: one task for each rank, each pinned to a worker of its own.

Workers elsewhere must find `job`: start them in this folder.

python with_dask.py                        starts two workers here
python with_dask.py tcp://scheduler:8786   takes the workers of a cluster
"""

import os
import socket
import sys
from urllib.parse import urlparse

from dask.distributed import Client
from job import train


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("", 0)) as free:
        return free.getsockname()[1]


def rank(variables: dict[str, str]) -> dict[str, float]:
    """Be a rank: Dask has sent the numbers."""
    os.environ |= variables
    return train()


def main(scheduler: str | None = None) -> None:
    """Run one rank on each worker, and print what rank 0 returns."""
    here = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with Client(scheduler) if scheduler else Client(**here) as client:
        workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
        hosts = [str(urlparse(worker).hostname) for worker in workers]
        job = {
            "WORLD_SIZE": str(len(workers)),
            "MASTER_ADDR": hosts[0],
            "MASTER_PORT": str(client.submit(free_port, workers=workers[0]).result()),
        }
        tasks = []
        for r, worker in enumerate(workers):
            own = {
                "RANK": str(r),
                "LOCAL_RANK": str(hosts[:r].count(hosts[r])),
                "LOCAL_WORLD_SIZE": str(hosts.count(hosts[r])),
            }
            tasks += [client.submit(rank, job | own, workers=worker, pure=False)]
        print(client.gather(tasks)[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
