"""Benchmarks: this library against its peers, in the same processes, as ratios.

Each benchmark is a module of this package with a function `rows(*, quick)`. A row has
`config`, `variant` (`labpkg`, `labpkg:<option>` or the peer's name), `wall_ratio` and
`cpu_ratio` to the peer's fastest documented setting, the number of quiet `samples`
behind them, and the absolute `value` with its `unit`. Ratios carry over to other
machines, values do not. How samples are taken: `labpkg.bench.measure`, whose
`alternate` and `compare` are `bench.alternate` and `bench.compare` for your own code.

Chapter: planning/measuring.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labpkg.bench.measure import Sample as Sample
    from labpkg.bench.measure import alternate as alternate
    from labpkg.bench.measure import compare as compare

NAMES = (
    "checkpoint",
    "collectives",
    "compose",
    "cross_entropy",
    "data_loading",
    "data_parallel",
    "faults",
    "hardware",
    "launch",
    "optimizers",
    "pipeline",
    "scaling",
    "tensor_parallel",
    "train",
    "zero",
)

_COLUMNS = (
    "variant",
    "wall_ratio",
    "cpu_ratio",
    "samples",
    "value",
    "unit",
    "bus_gb_per_s",  # collectives only
    "gb_per_s",  # checkpoint only
    "efficiency",  # scaling only
    "peak_bytes",  # zero and compose
    "predicted_bytes",  # compose only
)


_HARNESS = ("Sample", "alternate", "compare")


def __getattr__(name: str) -> Any:
    if name in _HARNESS:  # torch is imported with them, and not for the names above
        return getattr(importlib.import_module("labpkg.bench.measure"), name)
    raise AttributeError(f"module 'labpkg.bench' has no attribute {name!r}")


class Report(dict[str, Any]):
    """The answer of a benchmark: a dictionary for JSON that prints as tables."""

    def __str__(self) -> str:
        facts = {**self["machine"], **self["versions"]}
        machine = ", ".join(f"{key} {value}" for key, value in facts.items())
        lines = [f"{self['name']} on {machine}"]
        for config in dict.fromkeys(row["config"] for row in self["rows"]):
            rows = [row for row in self["rows"] if row["config"] == config]
            columns = [name for name in _COLUMNS if name in rows[0]]
            cells = [[_cell(row[column]) for column in columns] for row in rows]
            lines += ["", config, *_aligned([columns, *cells])]
        return "\n".join(lines)


def run(name: str, quick: bool = False) -> Report:
    """Run a benchmark.

    Args:
        name: One of `NAMES`.
        quick: Few repetitions of small work: shows the form, says nothing about speed.

    Returns:
        A dictionary with `name`, `machine`, `versions`, `date`, `command` and `rows`:
        what `labpkg.plot.recorded` draws; of `hardware` also the entry `hardware`, for
        which a file with this dictionary is what `--hardware` takes. `str` makes it a
        table.

    Raises:
        ValueError: If there is no such benchmark.
    """
    if name not in NAMES:
        raise ValueError(
            f"there is no benchmark {name!r}; choose one of {', '.join(NAMES)}"
        )
    module = importlib.import_module(f"labpkg.bench.{name}")
    with contextlib.redirect_stdout(sys.stderr):  # the answer may be read as JSON
        rows = module.rows(quick=quick)
    report = Report(
        name=name,
        machine=_machine(),
        versions=_versions(),
        date=datetime.date.today().isoformat(),
        command=f"labpkg bench {name}{' --quick' if quick else ''} --json",
        rows=rows,
    )
    if hasattr(module, "summary"):
        report.update(module.summary(rows))
    return report


def _versions() -> dict[str, str]:
    import torch

    from labpkg import __version__

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "labpkg": __version__,
    }


def _machine() -> dict[str, Any]:
    import torch

    num_gpus = torch.cuda.device_count()
    gpus = {torch.cuda.get_device_name(i) for i in range(num_gpus)}
    return {
        "system": platform.system(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpus": f"{num_gpus} x {' and '.join(sorted(gpus))}" if gpus else "none",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")  # Linux only
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
