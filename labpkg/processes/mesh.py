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
# Ranks per machine, as torchrun, Open MPI, MPICH and Slurm call it.
_LOCAL_SIZES = (
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "SLURM_NTASKS_PER_NODE",
)


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
    if backend == "nccl" and not dist.is_nccl_available():
        raise ValueError("this torch is built without NCCL; choose backend='gloo'")
    if backend == "nccl" and (device == "cpu" or world_size > num_gpus):
        raise ValueError(
            f"NCCL needs one GPU per rank, but {world_size} ranks were asked for on "
            f"{num_gpus} GPUs; choose backend='gloo' or fewer ranks"
        )
    asked = device is not None or backend is not None
    if device is None:
        fits = 0 < world_size <= num_gpus
        device = "cuda" if fits and backend != "gloo" else "cpu"
    if backend is None:
        nccl = device == "cuda" and world_size <= num_gpus and dist.is_nccl_available()
        backend = "nccl" if nccl else "gloo"
    return Placement(
        device=device,
        backend=backend,
        reason=_reason(world_size, num_gpus, device, asked),
    )


def _reason(world_size: int, num_gpus: int, device: str, asked: bool) -> str:
    gpus, are = (f"{num_gpus} GPUs", "are") if num_gpus > 1 else ("1 GPU", "is")
    if num_gpus == 0:
        return "torch sees no GPU"
    if device == "cpu":
        return "as asked for" if asked else f"{gpus} {are} too few for one per rank"
    if world_size <= num_gpus:
        return f"one of {gpus} per rank"
    return f"{world_size} ranks share {gpus}"


def make_mesh(pp: int = 1, dp: int = 1, cp: int = 1, tp: int = 1) -> DeviceMesh:
    """Return the mesh of all ranks with the axes `pp, dp, cp, tp`, outer to inner.

    Starts the default process group when there is none: from RANK, WORLD_SIZE and
    MASTER_* when a launcher has set them, else as a single rank in memory. Only a group
    that was started here is closed at exit. A rank that a launcher has put on a GPU
    gets that GPU as torch's default device.

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
        else int(os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else 1)
    )
    product = pp * dp * cp * tp
    if product != world_size:
        factors = " * ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"{factors} = {product}, but there are {world_size} ranks; "
            f"choose factors whose product is {world_size}"
        )
    if not dist.is_initialized():
        _start_for_mesh()
    device = "cuda" if dist.get_backend() == "nccl" else torch.get_default_device().type
    return init_device_mesh(device, (pp, dp, cp, tp), mesh_dim_names=tuple(sizes))


def _start_for_mesh() -> None:
    if "RANK" in os.environ:
        place = start_group()
        if place.device == "cuda":
            torch.set_default_device(f"cuda:{torch.cuda.current_device()}")
    else:  # alone: follow the device that tensors are made on
        start_group(torch.get_default_device().type)
    atexit.register(_close_group)


def start_group(device: str | None = None) -> Placement:
    """Start the default process group of this rank and select its GPU.

    From RANK, WORLD_SIZE and MASTER_* when a launcher has set them, else as a single
    rank in memory. All groups of the job, those of meshes too, give up after 60 s.

    Args:
        device: `"cpu"`, `"cuda"` or None to choose.

    Returns:
        The placement of the ranks of this machine.

    Raises:
        ValueError: If the device cannot be had, or if GPUs are there but the launcher
            does not tell how many ranks share them.
    """
    alone = "RANK" not in os.environ
    num_local = 1 if alone else _local_world_size(device)
    place = choose_placement(num_local, device=device)
    if place.device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    elif num_local > 1:
        torch.set_num_threads(1)  # ranks with more threads than cores slow each other
    # Else the groups of a mesh get 30 minutes.
    dist.distributed_c10d.default_pg_timeout = _TIMEOUT
    dist.distributed_c10d.default_pg_nccl_timeout = _TIMEOUT
    if alone:
        store = dist.HashStore()
        dist.init_process_group(place.backend, store=store, rank=0, world_size=1)
    else:
        _join(place.backend)
    if device is None and torch.cuda.is_available() and place.device == "cpu":
        _say_once(f"labpkg: ranks on the CPU (gloo), because {place.reason}")
    return place


def _join(backend: str) -> None:
    try:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    except RuntimeError as error:
        is_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if is_restart and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            error.add_note(
                "This job was restarted. torchrun gives new ranks the store of the old "
                "ones, in which they find dead addresses (pytorch issue 135712); set "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where you call torchrun."
            )
        raise


def _say_once(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, file=sys.stderr)


def _local_world_size(device: str | None) -> int:
    """Return how many ranks share the GPUs that this one sees."""
    if os.environ.get("SLURM_GPUS_PER_TASK"):
        return 1  # each rank sees its own
    for name in _LOCAL_SIZES:
        value = os.environ.get(name, "")
        if value.isdecimal():
            return int(value)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and device != "cpu" and torch.cuda.device_count():
        raise ValueError(
            f"{world_size} ranks in all, but no variable says how many of them are on "
            "this machine; set LOCAL_WORLD_SIZE, or choose device='cpu'"
        )
    return world_size


def _close_group() -> None:
    # Engines must die before the group that they use: the other order can deadlock.
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
