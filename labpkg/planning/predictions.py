"""Predict a table of training jobs: each row gets its speed, memory and verdict.

All columns stay as they are, in their order; the predicted ones follow. A row that
cannot be predicted gets blanks and says why in `error`, and the others go on. `mem_gib`
is in GiB, 2^30 bytes: 80 GB are 74.5 GiB.

Standard library only. Chapter: planning/planner.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from labpkg.planning.configuration import Configuration
from labpkg.planning.estimates import Estimate, estimate
from labpkg.planning.hardware import Hardware, find_hardware
from labpkg.planning.job_columns import (
    JOB_COLUMNS,
    make_configuration,
    read_job,
    require_columns,
)
from labpkg.planning.tables import Table

PREDICTED_COLUMNS = ("tok_s_gpu", "step_s", "mem_gib", "fits", "mfu_pct", "error")
"""What `predict_table` adds, unless the table has such a column: then `pred_` is put
before the name."""


def predict_table(
    table: Table,
    hardware: Hardware | None = None,
    *,
    predict: Callable[[Configuration, Hardware], Estimate] = estimate,
) -> Table:
    """Return the table with predicted columns after its own.

    They are `tok_s_gpu` (tokens per second and GPU), `step_s`, `mem_gib` (peak of
    allocated memory on the fullest rank), `fits` (0 or 1), `mfu_pct` and `error`. A job
    that does not fit has all its numbers, as if memory were larger.

    Args:
        table: Jobs, in the columns of `labpkg.planning.job_columns`.
        hardware: The machine of rows that name none in a column `hardware`.
        predict: What makes an estimate; another model of cost can be put here.

    Returns:
        A table with as many rows and six columns more.

    Raises:
        ValueError: If a required column is missing or one of a job is there twice, or
            there is no hardware at all.
    """
    require_columns(table.columns, table.name)
    table.require_unique(JOB_COLUMNS)
    if hardware is None and "hardware" not in table.columns:
        raise ValueError(
            f"{table.name} has no column hardware and none is given; name one for all "
            "rows, such as h100"
        )
    row_of = _Predictor(table, hardware, predict)
    rows = []
    for index, row in enumerate(table.rows):
        problem = table.problems.get(index)
        *numbers, error = ("",) * 5 + (problem,) if problem else row_of(row)
        message = f"row {index + 1}: {error}" if error else ""
        rows.append((*row, *numbers, message))
    added = tuple(_unused(name, table.columns) for name in PREDICTED_COLUMNS)
    return replace(
        table,
        rows=rows,
        columns=table.columns + added,
        header=(table.header or table.columns) + added,
    )


def _unused(name: str, columns: tuple[str, ...]) -> str:
    while name in columns:
        name = f"pred_{name}"
    return name


class _Predictor:
    """Predict rows of one table; equal jobs are computed once."""

    def __init__(
        self,
        table: Table,
        hardware: Hardware | None,
        predict: Callable[[Configuration, Hardware], Estimate],
    ) -> None:
        self._columns = [
            (name, table.columns.index(name))
            for name in JOB_COLUMNS
            if name in table.columns
        ]
        self._hardware = hardware
        self._predict = predict
        self._known: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._machines: dict[str, Hardware] = {}

    def __call__(self, row: tuple[str, ...]) -> tuple[str, ...]:
        key = tuple(row[index] for _, index in self._columns)
        if key not in self._known:
            self._known[key] = self._cells(key)
        return self._known[key]

    def _cells(self, key: tuple[str, ...]) -> tuple[str, ...]:
        names = [name for name, _ in self._columns]
        cells = dict(zip(names, key, strict=True))
        try:
            values = read_job(cells)
            job = make_configuration(values)
            return (*_numbers(self._predict(job, self._machine(cells))), "")
        except ValueError as error:
            return ("",) * 5 + (_one_line(error),)
        except Exception as error:
            # One row must not cost the answer to all the others.
            what = f"{type(error).__name__}: {_one_line(error)}"
            return ("",) * 5 + (f"no prediction, by a defect of labpkg: {what}",)

    def _machine(self, cells: dict[str, str]) -> Hardware:
        name = cells.get("hardware", "").strip()
        if not name:
            if self._hardware is None:
                raise ValueError(
                    "column hardware: is blank, and none is given for all rows; write "
                    "a name, such as h100"
                )
            return self._hardware
        if name not in self._machines:
            try:
                self._machines[name] = find_hardware(name)
            except (ValueError, OSError) as error:
                raise ValueError(f"column hardware: {error}") from None
        return self._machines[name]


def _numbers(found: Estimate) -> tuple[str, ...]:
    gib = found.memory_bytes / 2**30
    numbers = (found.tokens_per_s_per_gpu, found.step_s, gib, 100 * found.mfu)
    if not all(math.isfinite(number) and number > 0 for number in numbers):
        raise ValueError(
            f"the sizes give no finite prediction (step_s={found.step_s}); choose "
            "sizes of jobs that somebody could run"
        )
    speed, step, memory, mfu = (f"{number:.8g}" for number in numbers)
    return speed, step, memory, str(int(found.fits)), mfu


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
