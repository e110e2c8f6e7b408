"""A rank joins its job: device, process group, and the way out.

The same function runs as a rank of `labpkg train`, under torchrun, Slurm or mpirun
(RANK is set), inside `World.run` (the group exists), or alone: `joined` finds out.

# Note [leaving]
A process group must outlive the engines that use it: gloo can deadlock when it is
destroyed under them. So a group is left after the function has returned and its garbage
is collected; after an error, when peers may hang in a collective, it is not left at
all: whoever started the rank ends it.

Chapter: processes/ranks.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from labpkg.processes.mesh import start_group


@contextmanager
def joined(device: str | None = None) -> Iterator[torch.device]:
    """Join the job that this process belongs to, for the time of a `with` block.

    Starts the process group unless there is one, and makes the device of this rank
    torch's default; both end with the block. See Note [leaving].

    Args:
        device: "cpu", "cuda", or None to choose.

    Yields:
        The device of this rank.

    Raises:
        ValueError: If the device cannot be had, or an existing job runs on another one.
    """
    owns_group = not dist.is_initialized()
    if owns_group:
        kind = start_group(device).device
    else:
        kind = (
            "cuda" if dist.get_backend() == "nccl" else torch.get_default_device().type
        )
    if device not in (None, kind):
        raise ValueError(
            f"device={device!r}, but this job runs on {kind}; start it on {device}"
        )
    here = torch.device("cpu")
    if kind == "cuda":
        here = torch.device("cuda", torch.cuda.current_device())
    # The CPU is the default already, and naming it slows down every call of torch.
    is_default = here.type == "cpu" == torch.get_default_device().type
    with nullcontext() if is_default else here:
        try:
            yield here
        except BaseException as error:
            if owns_group and dist.get_world_size() == 1:
                traceback.clear_frames(error.__traceback__)  # they hold the engines
                _leave_group()
            raise
        if owns_group:
            _leave_group()


def call_in_file(
    path: str,
    function: str,
    device: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """Import a file as a rank, call a function of it, and return the value as JSON.

    JSON, because no other process may know the classes of the file; what JSON does not
    know is written as text.

    Args:
        path: The file; imports find its neighbours.
        function: Name of a function.
        device: As for `joined`.
        arguments: Keyword arguments of the function.
    """
    sys.path.insert(0, os.path.dirname(path))
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with joined(device):
        spec.loader.exec_module(module)
        value = getattr(module, function)(**(arguments or {}))
        return json.dumps(value, default=str)


def _leave_group() -> None:
    gc.collect()
    dist.destroy_process_group()
