"""Start the process that forks the ranks, before anything slow is imported.

Importing torch takes a second, and what the first optimizer needs another one. A fork
server does it while the launcher checks the options; ranks are then forked from it in
milliseconds. This module imports the standard library only, so that the server can be
started first of all.

Chapter: processes/ranks.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing import forkserver

_MODULES = (
    "torch",
    "torch._dynamo",  # the first optimizer imports it
    "torch.distributed.elastic.multiprocessing.api",
    "torch.utils.tensorboard",
    "tqdm",
    "labpkg.runs.trainer",
    "labpkg.runs.launch",
)
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # Else asking for GPUs initializes CUDA, and no forked rank could use it.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


def start_fork_server() -> None:
    """Start multiprocessing's fork server with all that a rank imports; do not wait.

    It ends with this process. Call it from the main thread, before threads are started.
    """
    multiprocessing.set_forkserver_preload(list(_MODULES))
    # The terminal sends Ctrl-C to all processes, and a batch system its notice of the
    # end: a server that is still importing would answer with a traceback, and one that
    # is gone takes the exit codes of its ranks along. What is ignored here stays so.
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in _IGNORED}
    try:
        with _environment(_ENVIRONMENT):
            forkserver.ensure_running()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
