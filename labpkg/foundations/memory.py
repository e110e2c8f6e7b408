"""How many bytes of tensors this process holds, counted, not estimated.

The resident memory of a process says little about a model: it holds libraries, pools of
the allocator and pages that were freed long ago. A storage is what tensors really
occupy, and several tensors may be views of one; `live_tensor_bytes` counts each once.

Chapter: parallelism/zero.
"""

from __future__ import annotations

import gc

import torch
from torch import Tensor


def live_tensor_bytes(device: torch.device | str | None = None) -> int:
    """Return the bytes of all distinct tensor storages alive in this process.

    Python's garbage collector knows all tensors that Python has met; their `.grad` are
    added. Between two steps of training these are weights, gradients, optimizer state
    and data: for float32 and AdamW 4 + 4 + 8 bytes for each parameter of a replica.

    It cannot see what only C++ holds: workspaces of kernels, transfers in flight, and
    after a forward pass those saved tensors of autograd that no Python variable ever
    named. It leaves out sparse tensors and raises inside `torch.vmap`. CPU ranks of one
    host map 4 MiB of each other as tensors at their first collective; subtract a count
    taken after it, before there is a model.

    Args:
        device: count storages there only; "cuda" means all GPUs. By default all
            devices but "meta", whose tensors occupy nothing.

    Returns:
        Bytes; an empty or freed storage counts nothing.
    """
    gc.collect()  # what only a dead cycle holds is not alive
    wanted = torch.device(device) if device is not None else None
    with torch._C.DisableTorchFunctionSubclass():  # which may refuse to be looked at
        return sum(_storages(wanted).values())


def _storages(wanted: torch.device | None) -> dict[tuple[str, int], int]:
    """Return the bytes of each storage, by device and address."""
    # By type: isinstance would ask lazy proxies, which may import or warn.
    found: list[Tensor] = [
        o for o in gc.get_objects() if issubclass(type(o), Tensor) and _has_memory(o)
    ]
    found += [t.grad for t in found if t.is_leaf and t.grad is not None]
    storages: dict[tuple[str, int], int] = {}
    for storage in (t.untyped_storage() for t in found if _has_memory(t)):
        if _is_on(storage.device, wanted):
            storages[str(storage.device), storage.data_ptr()] = storage.nbytes()
    return storages


def _has_memory(tensor: Tensor) -> bool:
    # A wrapper such as DTensor has none: what it wraps is a tensor of its own.
    return (
        tensor.layout == torch.strided
        and not hasattr(tensor, "__tensor_flatten__")
        and tensor.untyped_storage().device.type != "meta"
    )


def _is_on(device: torch.device, wanted: torch.device | None) -> bool:
    if wanted is None:
        return True
    return device.type == wanted.type and wanted.index in (None, device.index)
