"""The peak of the bytes that tensors occupy, exactly, whoever allocates them.

Every operation of torch is watched as it returns: its storages live until the last
tensor on them dies, wherever that happens. So buckets that C++ code of torch makes
count, and activations that only the graph of autograd holds. What an operation frees
before it returns does not count, nor do the buffers of a transport: gloo's own, or
shared memory.

Chapter: planning/measuring.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all tensors that are made inside the block.

    Tensors from before it count once an operation returns them, as those in place do.
    One at a time.

    Attributes:
        now: Bytes alive.
        peak: The most that `now` has been; set it to `now` to begin anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._storages: dict[int, weakref.ref] = {}

    def __enter__(self) -> LiveBytes:
        # FSDP2 frees and restores memory by resizing storages: that is no operation.
        self._resize = resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._see(storage)
            return result

        torch.UntypedStorage.resize_ = resize_  # pyright: ignore
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter((result,)):
            if isinstance(tensor, Tensor):
                # A DTensor wraps the tensor that has the memory.
                inner = getattr(tensor, "_local_tensor", tensor)
                self._see(inner.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type == "meta":
            return  # it says how large it would be, and has no memory
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            self._storages[key] = weakref.ref(storage, lambda _: self._forget(key))
        self.now += storage.nbytes() - self._sizes[key]
        self._sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
        del self._storages[key]


def peak_bytes(make: Callable[[], Callable[[], object]], *, warm_up: int = 2) -> int:
    """Return the most bytes that tensors occupy during one call, on this rank.

    Args:
        make: Returns what is to be called; all that it makes is counted too.
        warm_up: Calls before that one: the first ones allocate what stays.

    Returns:
        Bytes of tensors, with those that were there when the call began.
    """
    with LiveBytes() as live:
        call = make()
        for _ in range(warm_up):
            call()
        live.peak = live.now
        call()
        return live.peak
