"""Say whether this machine can run the main job, what it would choose, what to repair.

Each check yields findings: ok, warn or fail, what is there and what to do about it.
Checks only look, except the last one, which runs two ranks. The answer names no user,
host or home folder, so it can go into a bug report as it is.

Chapter: foundations/setup.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json as json_format
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from labpkg.processes.world import World

OK, WARN, FAIL = "ok", "warn", "fail"

_OLDEST_PYTHON, _OLDEST_TORCH = (3, 11), (2, 11)
_NEEDED = ("cloudpickle", "numpy", "psutil", "safetensors", "tensorboard", "tqdm")
_NEEDED_BY_BOOK = ("matplotlib", "scikit-learn")
_GIB, _SHARED_MEMORY = 2**30, Path("/dev/shm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        name: What was looked at.
        status: `ok`, `warn` (works, but worse than it could) or `fail` (the main job
            cannot run).
        detail: What is there.
        advice: What to do; empty when nothing is wrong.
    """

    name: str
    status: str
    detail: str
    advice: str = ""


def main(json: bool = False) -> int:
    """Examine the machine, print what was found and return the exit code.

    Args:
        json: Print `{"can_run": ..., "findings": [...]}` instead of lines.

    Returns:
        1 if the main job cannot run here, else 0.
    """
    findings = examine()
    can_run = all(finding.status != FAIL for finding in findings)
    if json:
        rows = [asdict(finding) for finding in findings]
        print(json_format.dumps({"can_run": can_run, "findings": rows}, indent=2))
        return 0 if can_run else 1
    for finding in findings:
        print(f"{finding.status:4}  {finding.name:21}  {finding.detail}")
        if finding.advice:
            print(f"{'':29}-> {finding.advice}")
    print("The main job can run." if can_run else "The main job cannot run.")
    return 0 if can_run else 1


def examine() -> list[Finding]:
    """Run every check.

    Without a fitting system, Python or torch the other checks cannot even start.

    Returns:
        The findings in the order of the checks.
    """
    findings = [finding for check in _FIRST_CHECKS for finding in check()]
    if all(finding.status != FAIL for finding in findings):
        findings += [finding for check in _CHECKS for finding in check()]
    return [replace(finding, detail=_anonymous(finding.detail)) for finding in findings]


def _anonymous(text: str) -> str:
    home, host = str(Path.home()), platform.node()
    if len(home) > 1:
        text = text.replace(home, "~")
    return re.sub(rf"\b{re.escape(host)}\b", "<host>", text) if host else text


def _graded(name: str, detail: str, *problems: tuple[bool, str, str]) -> Finding:
    """Return the finding with status and advice of the first problem that is there."""
    for is_there, status, advice in problems:
        if is_there:
            return Finding(name=name, status=status, detail=detail, advice=advice)
    return Finding(name=name, status=OK, detail=detail)


def _system() -> Iterator[Finding]:
    name = platform.system()
    advice = "ranks are forked, which Windows cannot do: use WSL"
    detail = f"{name} {platform.release()} {platform.machine()}"
    yield _graded("system", detail, (name == "Windows", FAIL, advice))


def _python() -> Iterator[Finding]:
    wanted = ".".join(map(str, _OLDEST_PYTHON))
    advice = f"install Python {wanted} or newer and make a new environment"
    is_old = sys.version_info[:2] < _OLDEST_PYTHON
    yield _graded("python", platform.python_version(), (is_old, FAIL, advice))


def _torch() -> Iterator[Finding]:
    wanted = ".".join(map(str, _OLDEST_TORCH))
    advice = f"install it: pip install 'torch>={wanted}'"
    version = _version("torch")
    if version is None:
        yield Finding(name="torch", status=FAIL, detail="missing", advice=advice)
        return
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    detail = f"{version}, {_cuda_versions()}"
    yield _graded("torch", detail, (numbers < _OLDEST_TORCH, FAIL, advice))


def _cuda_versions() -> str:
    import torch
    import torch.cuda.nccl

    if torch.version.cuda is None:
        return "built for the CPU"
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return f"CUDA {torch.version.cuda}, NCCL {nccl}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    from labpkg import __version__

    yield Finding(name="labpkg", status=OK, detail=__version__)
    for names, status, user in (
        (_NEEDED, FAIL, "labpkg train"),
        (("tyro",), FAIL, "the command line"),
        (_NEEDED_BY_BOOK, WARN, "the book"),
    ):
        missing = [name for name in names if _version(name) is None]
        if missing:
            detail = f"{user} needs {', '.join(missing)}"
            advice = f"pip install {' '.join(missing)}"
            yield Finding(name="packages", status=status, detail=detail, advice=advice)


def _cores() -> Iterator[Finding]:
    in_all = os.cpu_count() or 1
    knows = hasattr(os, "sched_getaffinity")  # not macOS
    usable = len(os.sched_getaffinity(0)) if knows else in_all
    load = os.getloadavg()[0]
    yield _graded(
        "cores",
        f"{usable} of {in_all} usable, load {load:.1f}",
        (usable < 2, WARN, "ranks share one core: results are right, times say little"),
        (load > usable, WARN, "the cores are busy: measure when the machine is idle"),
    )


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    detail = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"
    advice = "a rank needs about 0.5 GiB: close programs or choose fewer ranks"
    yield _graded("memory", detail, (memory.available < 2 * _GIB, WARN, advice))


def _shared_memory() -> Iterator[Finding]:
    if not _SHARED_MEMORY.is_dir():  # macOS has none and needs none
        return
    total = shutil.disk_usage(_SHARED_MEMORY).total
    advice = (
        "NCCL and the workers of a DataLoader may die of a bus error; in a container: "
        "docker run --shm-size=1g"
    )
    detail = f"/dev/shm has {total / _GIB:.2f} GiB"
    yield _graded("shared memory", detail, (total < _GIB / 4, WARN, advice))


def _folder() -> Iterator[Finding]:
    free = shutil.disk_usage(".").free
    writable = os.access(".", os.W_OK)
    yield _graded(
        "current folder",
        f"{free / _GIB:.1f} GiB free, {'writable' if writable else 'read-only'}",
        (not writable, FAIL, "change to another folder, or use train --out DIR"),
        (free < _GIB, WARN, "checkpoints may not fit: use train --out DIR"),
    )


def _text() -> Iterator[Finding]:
    """The main job reads the source of Python's library; some images leave it out."""
    files = Path(sysconfig.get_path("stdlib")).glob("*.py")
    size = sum(file.stat().st_size for file in files)
    detail = f"{size / 1e6:.1f} MB of Python source beside the interpreter"
    advice = "give a text of your own: labpkg train --data FILE"
    yield _graded("training text", detail, (size < 1e6, FAIL, advice))


def _gpus() -> Iterator[Finding]:
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus == 0:
        yield _no_gpu([str(warning.message) for warning in caught])
    for i in range(num_gpus):
        gpu = torch.cuda.get_device_properties(i)
        detail = f"{gpu.name}, {gpu.total_memory / _GIB:.0f} GiB"
        detail += f", compute capability {gpu.major}.{gpu.minor}"
        yield Finding(name=f"gpu {i}", status=OK, detail=detail)


def _no_gpu(complaints: list[str]) -> Finding:
    import torch

    num_there = sum(line.startswith("GPU ") for line in _nvidia_smi("-L"))
    if num_there == 0:
        return Finding(name="gpus", status=OK, detail="none: ranks use the CPU")
    is_hidden = "CUDA_VISIBLE_DEVICES" in os.environ
    reason = complaints[0].splitlines()[0] if complaints else "update the driver"
    return _graded(
        "gpus",
        f"nvidia-smi lists {num_there}, torch sees none",
        (torch.version.cuda is None, WARN, "install a torch that is built for CUDA"),
        (is_hidden, WARN, "CUDA_VISIBLE_DEVICES hides them: unset it"),
        (True, WARN, reason),
    )


def _gpu_links() -> Iterator[Finding]:
    """Pairs that cannot reach each other's memory talk through the host."""
    import torch

    gpus = range(torch.cuda.device_count())
    if len(gpus) < 2:
        return
    reaches = torch.cuda.can_device_access_peer
    apart = [f"{a}-{b}" for a in gpus for b in gpus if a < b and not reaches(a, b)]
    detail = f"{', '.join(_links()) or 'unknown'}; "
    detail += f"no peer access: {', '.join(apart)}" if apart else "peer access: all"
    advice = "NCCL copies through the host there; look at nvidia-smi topo -m"
    yield _graded("gpu links", detail, (bool(apart), WARN, advice))


def _links() -> list[str]:
    """Return the kinds of links between GPUs, such as NV18, PIX or SYS."""
    rows = [line.split() for line in _nvidia_smi("topo", "-m")]
    rows = [row for row in rows if row and re.fullmatch(r"GPU\d+", row[0])]
    return sorted({cell for row in rows for cell in row[1 : len(rows) + 1]} - {"X"})


def _nvidia_smi(*arguments: str) -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    return done.stdout.splitlines() if done.returncode == 0 else []


_EFFECTS = {
    "RANK": "this process is a rank of a job: World refuses to start, train joins",
    "WORLD_SIZE": "make_mesh() expects so many ranks",
    "LOCAL_RANK": "chooses the GPU of a rank; unused without RANK",
    "MASTER_ADDR": "where ranks meet; unused without RANK",
    "MASTER_PORT": "where ranks meet; unused without RANK",
    "PYTHONPATH": "its folders come before installed packages, in ranks too",
    "OMP_NUM_THREADS": "threads of this process; CPU ranks always have one",
    "CUDA_VISIBLE_DEVICES": "the GPUs that torch may see",
    "CUDA_LAUNCH_BLOCKING": "1 waits for every GPU kernel: nothing overlaps",
    "GLOO_SOCKET_IFNAME": "network of gloo under a launcher; World takes loopback",
    "NCCL_SOCKET_IFNAME": "network of NCCL under a launcher; World takes loopback",
    "NCCL_P2P_DISABLE": "1 sends between GPUs through the host",
    "TORCH_DISTRIBUTED_DEBUG": "DETAIL compares all collectives before they run",
}
_PRIVATE = ("MASTER_ADDR", "PYTHONPATH")  # a host, folders
_SLOW = (
    ("CUDA_LAUNCH_BLOCKING", "1"),
    ("NCCL_P2P_DISABLE", "1"),
    ("TORCH_DISTRIBUTED_DEBUG", "DETAIL"),
)
_NO_LAUNCHER = "unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT"


def _environment() -> Iterator[Finding]:
    for name, effect in _EFFECTS.items():
        value = os.environ.get(name)
        if value is None:
            continue
        hides = name == "CUDA_VISIBLE_DEVICES" and value.strip() in ("", "-1")
        is_suspect = name == "PYTHONPATH" or (name, value) in _SLOW
        yield _graded(
            name,
            f"set: {effect}" if name in _PRIVATE else f"={value}: {effect}",
            (name == "RANK", FAIL, _NO_LAUNCHER),
            (name == "WORLD_SIZE", WARN, _NO_LAUNCHER),
            (hides, WARN, "all GPUs are hidden: unset it to use them"),
            (is_suspect, WARN, "unset it unless you mean it"),
        )


def _backends() -> Iterator[Finding]:
    import torch.distributed as dist

    names = [] if not dist.is_available() else ["gloo", "nccl"]
    found = [name for name in names if getattr(dist, f"is_{name}_available")()]
    advice = "this torch cannot connect ranks: install another build"
    yield _graded("backends", ", ".join(found) or "none", (not found, FAIL, advice))


def _world() -> Iterator[Finding]:
    """Say what `World()` chooses and why, and let two ranks really talk."""
    from labpkg.processes.world import World

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it says the same as below
            world, pair = World(), World(2)
        where = f"{world.world_size} ranks on {world.device} ({world.backend})"
        detail = f"takes {where}: {world.placement.reason}"
        yield Finding(name="World()", status=OK, detail=detail)
        yield _talk(pair)
    except (ValueError, RuntimeError, OSError) as error:
        detail = f"{type(error).__name__}: {error}".splitlines()[0]
        advice = "repair what is wrong above; if nothing is, report this line"
        yield Finding(name="ranks", status=FAIL, detail=detail, advice=advice)


def _talk(world: World) -> Finding:
    start = time.perf_counter()
    answers = world.run(_sum_of_ranks)
    first_s = time.perf_counter() - start
    world.run(_sum_of_ranks)
    next_s = time.perf_counter() - start - first_s
    sums = sorted({value for values, _ in answers for value in values})
    seconds = max(seconds for _, seconds in answers)
    detail = (
        f"2 ranks on {world.device} ({world.backend}) sum 0 + 1 to "
        f"{', '.join(map(str, sums))}; first start {first_s:.1f} s, next {next_s:.2f} "
        f"s, 4 MiB in {seconds * 1e3:.1f} ms"
    )
    advice = "communication gives wrong values: try another driver or torch version"
    return _graded("all_reduce", detail, (sums != [1.0], FAIL, advice))


def _sum_of_ranks() -> tuple[set[float], float]:
    """Return the different elements of a sum over ranks, and the time of the sum."""
    import torch

    from labpkg.processes.collectives import all_reduce
    from labpkg.processes.messages import barrier

    x = torch.full((2**20,), float(os.environ["RANK"]))
    barrier()
    start = time.perf_counter()
    total = all_reduce(x).cpu()  # on a GPU this waits for it
    seconds = time.perf_counter() - start
    return set(total.tolist()), seconds


_FIRST_CHECKS = (_system, _python, _torch)
_CHECKS = (
    _packages,
    _cores,
    _memory,
    _shared_memory,
    _folder,
    _text,
    _gpus,
    _gpu_links,
    _environment,
    _backends,
    _world,
)
