"""Put predicted and measured rows side by side; refuse what does not belong together.

Rows are joined by their order. So each column of a job that the measured table has must
say the same as in the predicted one, whether as 8 or 8.0, as a blank or its default. A
job without any measurement did not fit.

Standard library only. Chapter: planning/planner.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from labpkg.planning.job_columns import (
    JOB_COLUMNS,
    SHAPE_COLUMNS,
    read_flag,
    read_number,
    read_value,
    require_columns,
)
from labpkg.planning.tables import Table

_SPEED, _MEMORY, _FITS = "tok_s_gpu", "mem_gib", "fits"
_CELL = [
    JOB_COLUMNS.index(name)
    for name in (*SHAPE_COLUMNS, "nodes", "gpus_per_node", "hardware")
]
_SHOWN = 3  # rows of one kind that a note lists


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """One job, predicted and measured; None is what is not there.

    Attributes:
        job: The value of each column of a job, defaults filled in.
        model: The name of the model if the table has a column `model`, else sizes.
        nodes: Machines.
        speeds: Predicted and measured tokens per second and GPU.
        memories: Predicted and measured GiB.
        fits: Whether the job was predicted to fit.
    """

    job: tuple[str, ...]
    model: str
    nodes: str
    speeds: tuple[float | None, float | None]
    memories: tuple[float | None, float | None]
    fits: bool | None

    @property
    def cell(self) -> tuple[str, ...]:
        """Sizes of the model, number and kind of nodes: what is not chosen."""
        return tuple(self.job[place] for place in _CELL)

    @property
    def ran(self) -> bool:
        """Whether anything was measured, else it did not fit."""
        return self.speeds[1] is not None or self.memories[1] is not None


def join_tables(predicted: Table, measured: Table) -> tuple[list[Joined], list[str]]:
    """Return the rows of both tables side by side, and notes on what is missing.

    Args:
        predicted: With the columns of jobs and of predictions.
        measured: With `tok_s_gpu`, `mem_gib` or both.

    Returns:
        The rows that can be read, and notes on the others and on missing columns.

    Raises:
        ValueError: If rows differ in number or in a column of a job, or a table has
            nothing to compare.
    """
    _check_columns(predicted, measured)
    _check_rows(predicted, measured)
    wrong: dict[int, str] = {}
    mine = [_last(predicted, name) for name in (_SPEED, _MEMORY, _FITS)]
    theirs = [_last(measured, name, prefix="") for name in (_SPEED, _MEMORY)]
    readers = (_positive, _positive, read_flag)
    columns = [
        *(
            _column(predicted, at, wrong, r)
            for at, r in zip(mine, readers, strict=True)
        ),
        *(_column(measured, at, wrong, _positive) for at in theirs),
    ]
    rows, silent = [], []
    for index, (cells, *values) in enumerate(
        zip(predicted.cells(), *columns, strict=True)
    ):
        speed, memory, fits, measured_speed, measured_memory = values
        if index in wrong:
            continue
        if speed is None and memory is None:
            silent.append(f"row {index + 1}")
        rows.append(
            Joined(
                job=tuple(_text(name, cells) for name in JOB_COLUMNS),
                model=_model(cells),
                nodes=cells["nodes"].strip(),
                speeds=(speed, measured_speed),
                memories=(memory, measured_memory),
                fits=None if fits is None else bool(fits),
            )
        )
    return rows, [
        *_missing_columns(predicted, measured),
        *_listed(list(wrong.values()), "left out"),
        *_contradictions(rows),
        *_listed(silent, "without a prediction"),
    ]


# columns -----------------------------------------------------------------------------


def _check_columns(predicted: Table, measured: Table) -> None:
    require_columns(predicted.columns, predicted.name)
    predicted.require_unique(JOB_COLUMNS)
    measured.require_unique((*JOB_COLUMNS, _SPEED, _MEMORY))
    if _last(predicted, _SPEED) is None and _last(predicted, _MEMORY) is None:
        raise ValueError(
            f"{predicted.name} has neither {_SPEED} nor {_MEMORY}; make it with "
            "`labpkg predict`"
        )
    if _SPEED not in measured.columns and _MEMORY not in measured.columns:
        raise ValueError(
            f"{measured.name} has neither {_SPEED} nor {_MEMORY}, but "
            f"{', '.join(measured.columns)}; rename what was measured "
            "(mem_gib = bytes / 2^30 = 0.9313 x GB)"
        )


def _last(table: Table, name: str, *, prefix: str = "(pred_)*") -> int | None:
    """Find the column that was added last: outputs stand after all inputs."""
    pattern = re.compile(prefix + name)
    places = [i for i, c in enumerate(table.columns) if pattern.fullmatch(c)]
    return places[-1] if places else None


def _column(
    table: Table,
    place: int | None,
    wrong: dict[int, str],
    read: Callable[[str], float],
) -> list[float | None]:
    """Return values, None for blanks; messages go to `wrong` by the row's index."""
    values: list[float | None] = []
    for index, row in enumerate(table.rows):
        text = "" if place is None else row[place].strip()
        if table.delimiter == ";":
            text = text.replace(",", ".")  # decimal commas go with semicolons
        try:
            blank = text == "" or text.lower() == "nan"
            values.append(None if blank else read(text))
        except ValueError as error:
            name = table.columns[place or 0]
            wrong[index] = f"row {index + 1} of {table.name}, column {name}: {error}"
            values.append(None)
    for index, problem in table.problems.items():
        wrong[index] = f"row {index + 1} of {table.name} {problem}"
    return values


def _positive(text: str) -> float:
    number = read_number(text)
    if not 0 < number < math.inf:
        raise ValueError(
            f"{text} is not a positive number; leave it blank if the job did not fit"
        )
    return number


# rows --------------------------------------------------------------------------------


def _check_rows(predicted: Table, measured: Table) -> None:
    sizes = len(predicted.rows), len(measured.rows)
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{predicted.name} has {sizes[0]} rows, but {measured.name} has "
            f"{sizes[1]}; rows are joined by their order, so give both the same rows"
        )
    shared = [name for name in JOB_COLUMNS if name in measured.columns]
    different = []
    pairs = zip(predicted.cells(), measured.cells(), strict=True)
    for number, (mine, theirs) in enumerate(pairs, 1):
        if number - 1 in measured.problems:
            continue
        name = next((n for n in shared if not _same(n, mine, theirs)), None)
        if name is not None:
            different.append((number, name, mine.get(name, ""), theirs[name]))
    if different:
        number, name, one, other = different[0]
        raise ValueError(
            f"row {number}, column {name}: {one!r} in {predicted.name}, {other!r} in "
            f"{measured.name} ({len(different)} of {sizes[0]} rows differ); rows are "
            "joined by their order, so give both the same rows"
        )


def _same(name: str, mine: Mapping[str, str], theirs: Mapping[str, str]) -> bool:
    one, other = mine.get(name, "").strip(), theirs[name].strip()
    if one == other or (name == "hardware" and not (one and other)):
        return True  # a blank is the machine of the command line
    try:
        return read_value(name, mine) == read_value(name, {**mine, **theirs})
    except ValueError:
        return False


def _text(name: str, cells: Mapping[str, str]) -> str:
    try:
        return str(read_value(name, cells))
    except ValueError:
        return cells.get(name, "").strip()


def _model(cells: Mapping[str, str]) -> str:
    sizes = "L{} D{} T{}".format(*(_text(n, cells) for n in ("layers", "width", "seq")))
    return cells.get("model", "").strip() or sizes


# notes -------------------------------------------------------------------------------


def _missing_columns(predicted: Table, measured: Table) -> list[str]:
    notes = []
    if not any(name in measured.columns for name in JOB_COLUMNS):
        notes.append(
            f"{measured.name} has no column of a job; rows were joined by order alone"
        )
    for name in (_SPEED, _MEMORY, _FITS):
        if _last(predicted, name) is None:
            notes.append(f"{predicted.name} has no column {name}, so none is scored")
    for name in (_SPEED, _MEMORY):
        if name not in measured.columns:
            notes.append(f"{measured.name} has no column {name}, so none is scored")
    decimal = [c for c in measured.columns if re.fullmatch(r"(?i)mem\w*_gb", c)]
    if decimal and _MEMORY not in measured.columns:
        notes.append(
            f"{decimal[0]} is not read: {_MEMORY} is in GiB, 0.9313 x GB of 1e9 bytes"
        )
    return notes


def _contradictions(rows: list[Joined]) -> list[str]:
    ran = {row.job for row in rows if row.ran}
    both = ran & {row.job for row in rows if not row.ran}
    if not both:
        return []
    count = f"{len(both)} job{'s' * (len(both) > 1)}"
    return [f"{count} ran in one row and did not fit in another with equal columns"]


def _listed(rows: list[str], what: str) -> list[str]:
    if not rows:
        return []
    more = "" if len(rows) <= _SHOWN else f" and {len(rows) - _SHOWN} more"
    count = f"{len(rows)} row{'s' * (len(rows) > 1)}"
    return [f"{count} {what}: {'; '.join(rows[:_SHOWN])}{more}"]
