"""Ray Train as the launcher: python with_ray.py.

Ray forms torch's process group before it calls the function; the mesh then uses it.
"""

import ray.train
from job import train
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def rank() -> None:
    """Be a rank of Ray's process group."""
    result = train()
    if ray.train.get_context().get_world_rank() == 0:
        print(result)


if __name__ == "__main__":
    TorchTrainer(
        rank,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2),
    ).fit()
