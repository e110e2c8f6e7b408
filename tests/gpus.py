"""Places for tests that go first to the CPU, then to as many GPUs as there are."""

import pytest
import torch

NUM_GPUS = torch.cuda.device_count()


def on_gpus(world_size, backend, num_gpus):
    """Return a place (device, ranks, backend) that is skipped without enough GPUs."""
    reason = f"needs {num_gpus} GPUs for {backend}, torch sees {NUM_GPUS}"
    marks = [pytest.mark.gpu, pytest.mark.skipif(num_gpus > NUM_GPUS, reason=reason)]
    return pytest.param("cuda", world_size, backend, marks=marks)


PLACES = [
    ("cpu", 2, "gloo"),
    on_gpus(1, "nccl", 1),
    on_gpus(2, "gloo", 1),
    on_gpus(4, "gloo", 1),
    on_gpus(2, "nccl", 2),
]
