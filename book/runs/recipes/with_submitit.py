"""Submitit: the same call on this machine or through Slurm. Start it in this folder.

python with_submitit.py          starts two ranks here
python with_submitit.py slurm    submits a job of two nodes with eight ranks each
"""

import sys

import submitit
from job import train


def rank() -> dict[str, float]:
    """Be a rank: Submitit knows the numbers, and exports them under torch's names."""
    submitit.helpers.TorchDistributedEnvironment().export(
        set_cuda_visible_devices=False
    )
    return train()


def main(cluster: str = "local", folder: str = "submitit_logs") -> None:
    """Submit the job, wait, and print what rank 0 returns."""
    executor = submitit.AutoExecutor(folder, cluster=cluster)
    nodes, ranks_per_node = (1, 2) if cluster == "local" else (2, 8)
    executor.update_parameters(
        nodes=nodes, tasks_per_node=ranks_per_node, timeout_min=10, name="labpkg"
    )
    print(executor.submit(rank).results()[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
