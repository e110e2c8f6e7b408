"""Messages between the kernel and a rank.

Each is one byte with the descriptor of an anonymous memory file that holds pickles, so
that no message is ever half read and a stopped rank cannot block the kernel: `v` value,
`f` failure, `s` where the function is (the answer to `?`). `j` alone says that the rank
has joined the group.

Chapter: processes/ranks.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import os
import pickle
import socket
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType
from typing import IO, Any

import cloudpickle
import torch


class _Pickler(cloudpickle.CloudPickler):
    """Pickle tensors as CPU tensors, and a small view without its large storage."""

    def reducer_override(self, obj: Any) -> Any:
        """Return how to rebuild `obj`; overrides `cloudpickle`'s choice."""
        if type(obj) is torch.Tensor and obj.layout is torch.strided:
            on_gpu = obj.device.type not in ("cpu", "meta")
            if on_gpu or obj.untyped_storage().nbytes() > 2 * obj.nbytes + 4096:
                copy = obj.detach().cpu().clone().requires_grad_(obj.requires_grad)
                return copy.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        # cloudpickle sends along the submodules that a function seems to name, but
        # knows plain modules only: torch.distributed.config is of another class.
        is_special = isinstance(obj, ModuleType) and type(obj) is not ModuleType
        if is_special and sys.modules.get(obj.__name__) is obj:
            return importlib.import_module, (obj.__name__,)
        return super().reducer_override(obj)


class _Bounded:
    """A file that refuses to grow beyond a limit."""

    def __init__(self, file: IO[bytes], max_bytes: int) -> None:
        self._file, self._max_bytes, self._left = file, max_bytes, max_bytes

    def write(self, data: Any) -> int:
        self._left -= memoryview(data).nbytes
        if self._left < 0:
            raise ValueError(
                f"the result exceeds max_result_bytes={self._max_bytes}; return less, "
                f"save it to a file, or make the World with a higher limit"
            )
        return self._file.write(data)


def dump(*values: Any, max_bytes: int | None = None) -> IO[bytes]:
    """Pickle values, each on its own, into an anonymous memory file.

    Args:
        *values: Anything that cloudpickle takes; tensors are moved to the CPU.
        max_bytes: Limit of the file; None for no limit.

    Raises:
        ValueError: If the file would exceed the limit.
    """
    if hasattr(os, "memfd_create"):
        file: IO[bytes] = os.fdopen(os.memfd_create("labpkg"), "w+b")
    else:  # macOS
        file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    try:
        target = file if max_bytes is None else _Bounded(file, max_bytes)
        for value in values:
            _Pickler(target, pickle.HIGHEST_PROTOCOL).dump(value)
        file.flush()
    except BaseException:
        file.close()
        raise
    return file


def load(fd: int) -> Iterator[Any]:
    """Yield the values of a message one after the other, and close it.

    Args:
        fd: Descriptor of the memory file; several processes may read it at a time.
    """
    with (
        open(fd, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
    ):
        while view.tell() < len(view):
            yield pickle.load(view)


def send_message(sock: socket.socket, kind: bytes, file: IO[bytes] | None) -> None:
    """Send a message; a receiver that has gone is not an error.

    Args:
        sock: Where to.
        kind: The one byte that says what it is.
        file: What `dump` returned, or None.
    """
    fds = [] if file is None else [file.fileno()]
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        socket.send_fds(sock, [kind], fds)
