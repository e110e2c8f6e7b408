"""Where ranks run, and the mesh that names their axes.

A mesh is torch's own `DeviceMesh` with the axes `pp, dp, cp, tp`, outer to inner, so
that neighbouring ranks share the axis that talks most. `mesh["dp"]` is the
communicator that every engine and every collective takes. `choose_placement` decides
which device and which backend a job of n ranks uses, and says why.

Chapter: processes/ranks, planning/device_mesh.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_TIMEOUT = timedelta(seconds=60)
_DEVICES = ("cpu", "cuda")
_BACKENDS = ("gloo", "nccl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where the ranks of one machine run.

    Attributes:
        device: `"cpu"` or `"cuda"`; rank r uses GPU `r % number of GPUs`.
        backend: `"gloo"` or `"nccl"`.
        reason: why this was chosen, as half a sentence.
    """

    device: str
    backend: str
    reason: str


def choose_placement(
    world_size: int, *, device: str | None = None, backend: str | None = None
) -> Placement:
    """Choose device and backend for ranks on this machine, or refuse what cannot be.

    One GPU per rank gives NCCL; otherwise the ranks use gloo on the CPU. Several ranks
    share a GPU only on request (`device="cuda"`), through gloo.

    Args:
        world_size: Number of ranks on this machine, at least 1.
        device: `"cpu"`, `"cuda"` or None to choose.
        backend: `"gloo"`, `"nccl"` or None to choose.

    Returns:
        The placement with its reason.

    Raises:
        ValueError: If the request cannot be met on this machine.
        RuntimeError: On Windows without WSL.
    """
    if sys.platform == "win32":
        raise RuntimeError("labpkg starts ranks on Linux and macOS; on Windows use WSL")
    if isinstance(world_size, bool) or not isinstance(world_size, int):
        raise ValueError(f"world_size={world_size!r} is not an int; choose 1 or more")
    if world_size < 1:
        raise ValueError(f"world_size={world_size} is below 1; choose 1 or more")
    for name, value, known in (
        ("device", device, _DEVICES),
        ("backend", backend, _BACKENDS),
    ):
        if value is not None and value not in known:
            raise ValueError(
                f"{name}={value!r} is unknown; choose {' or '.join(known)}"
            )
    num_gpus = torch.cuda.device_count()
    if device == "cuda" and num_gpus == 0:
        raise ValueError("device='cuda', but torch sees no GPU; choose device='cpu'")
    if backend == "nccl" and (device == "cpu" or world_size > num_gpus):
        raise ValueError(
            f"NCCL needs one GPU per rank, but {world_size} ranks were asked for on "
            f"{num_gpus} GPUs; choose backend='gloo' or fewer ranks"
        )
    if device is None:
        fits = 0 < world_size <= num_gpus
        device = "cuda" if fits and backend != "gloo" else "cpu"
    if backend is None:
        nccl = device == "cuda" and world_size <= num_gpus and dist.is_nccl_available()
        backend = "nccl" if nccl else "gloo"
    return Placement(
        device=device,
        backend=backend,
        reason=_reason(world_size, num_gpus, device, backend),
    )


def _reason(world_size: int, num_gpus: int, device: str, backend: str) -> str:
    if num_gpus == 0:
        return "torch sees no GPU"
    if device == "cpu" and world_size > num_gpus:
        return f"{num_gpus} GPUs are too few for one per rank"
    if device == "cpu":
        return "the CPU was asked for"
    if backend == "nccl":
        return f"one of {num_gpus} GPUs per rank"
    return f"{world_size} ranks share {num_gpus} GPUs"


def make_mesh(pp: int = 1, dp: int = 1, cp: int = 1, tp: int = 1) -> DeviceMesh:
    """Return the mesh of all ranks with the axes `pp, dp, cp, tp`, outer to inner.

    Starts the default process group when there is none: from RANK, WORLD_SIZE and
    MASTER_* when a launcher has set them, else as a single rank in memory. Only a group
    that was started here is closed at exit. On a GPU the rank also selects its device.

    Args:
        pp: Pipeline stages.
        dp: Data-parallel replicas or shards.
        cp: Context-parallel shards.
        tp: Tensor-parallel shards.

    Returns:
        torch's own `DeviceMesh`; `mesh["dp"]` is the communicator of one axis. Every
        axis exists, with size 1 by default.

    Raises:
        ValueError: If a size is not a positive int, or if the product differs from the
            world size.
    """
    sizes = {"pp": pp, "dp": dp, "cp": cp, "tp": tp}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r} is not a positive int; choose 1 or more")
    world_size = (
        dist.get_world_size()
        if dist.is_initialized()
        else int(os.environ.get("WORLD_SIZE", "1"))
    )
    product = pp * dp * cp * tp
    if product != world_size:
        factors = " * ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"{factors} = {product}, but there are {world_size} ranks; "
            f"choose factors whose product is {world_size}"
        )
    if not dist.is_initialized():
        _start_group(world_size)
    device = "cuda" if dist.get_backend() == "nccl" else torch.get_default_device().type
    return init_device_mesh(device, (pp, dp, cp, tp), mesh_dim_names=tuple(sizes))


def _start_group(world_size: int) -> None:
    if "RANK" in os.environ:
        num_local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        place = choose_placement(num_local)
        if place.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(place.backend, timeout=_TIMEOUT)
    else:
        place = choose_placement(1)
        store = dist.HashStore()
        dist.init_process_group(place.backend, store=store, rank=0, world_size=1)
    atexit.register(_close_group)


def _close_group() -> None:
    # Engines must die before the group that they use: the other order can deadlock.
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
