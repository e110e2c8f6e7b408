"""What all ranks agree on before a step: that samples fit, and how many targets count.

One all_reduce of three numbers tells each rank whether any other has found something
wrong, so that all of them raise and none waits for one that has given up.

Chapter: planning/device_mesh.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes.collectives import all_reduce
from labpkg.processes.messages import all_gather_object
from labpkg.runs.objective import num_counted


def agree_on_samples(
    x: Tensor, y: Tensor | None, mesh: DeviceMesh, problem: str | None
) -> int:
    """Return how many targets count in the global batch.

    Args:
        x: The samples of this rank.
        y: Their targets, or None.
        mesh: All ranks; those of one place on `dp` must have the same samples.
        problem: What this rank finds wrong with its samples, or None.

    Raises:
        ValueError: On every rank, with the problem of the first that has one, or if
            ranks of one place have other samples.

    Communication: an all_reduce of three numbers over all ranks.
    """
    # Slices of a mesh, such as mesh["pp"], are made anew each time, at 0.1 ms each.
    names = mesh.mesh_dim_names or ()
    place = dict(zip(names, mesh.get_coordinate() or (), strict=True))
    sizes = dict(zip(names, mesh.shape, strict=True))
    is_first = not (place["pp"] or place["tp"])
    num_peers = sizes["pp"] * sizes["tp"]
    count = known = 0
    if problem is None and is_first and y is not None:
        count = num_counted(y)
    if problem is None and num_peers > 1:
        # The first of a place says what all others of it should say together, each
        # place with a factor of its own: two that swap samples must not cancel out.
        share = num_peers - 1 if is_first else -1
        known = _fingerprint(x, y) * share * (place["dp"] + 1)
    numbers = torch.tensor([count, problem is not None, known], device=device_of(mesh))
    count, num_problems, difference = all_reduce(numbers).tolist()
    if num_problems:
        problems = all_gather_object(problem)
        rank = next(r for r, text in enumerate(problems) if text is not None)
        raise ValueError(f"rank {rank}: {problems[rank]}")
    if difference:
        raise ValueError(
            "ranks of pp or tp were given other samples than their peers; the samples "
            'of a rank follow from dp alone: batches(shard=mesh["dp"])'
        )
    return count


def _fingerprint(*tensors: Tensor | None) -> int:
    """Return a number that differs for tensors of other shapes or bytes."""
    number = 0
    for tensor in tensors:
        if tensor is not None:
            kind = f"{tuple(tensor.shape)} {tensor.dtype}"
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            number = zlib.crc32(data.numpy().data, zlib.crc32(kind.encode(), number))
    return number


def device_of(mesh: DeviceMesh) -> torch.device:
    """Return the device of this rank.

    Args:
        mesh: A mesh on which it is.
    """
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)
