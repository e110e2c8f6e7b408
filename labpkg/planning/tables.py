"""Tables of text: CSV files as people have them, read whole and written back unchanged.

A cell stays the text that it was; who needs a number reads it. Commas, semicolons and
tabs are recognised by the header, and a byte order mark, carriage returns and quoted
cells do no harm. What cannot be a table is refused; a row of the wrong length is only
noted, so that the others go on.

Standard library only. Chapter: planning/planner. Reference: RFC 4180 (CSV files).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

_DELIMITERS = (",", ";", "\t")


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Hold the cells of a table as text.

    Args:
        name: How messages call it, such as the name of its file.
        columns: Names in the header, without blanks around them.
        rows: The cells of each row, as many as there are columns.
        header: The names as they are in the file; None takes `columns`.
        delimiter: What stands between two cells.
        problems: What is wrong with the form of a row, by its index.
    """

    name: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    header: tuple[str, ...] | None = None
    delimiter: str = ","
    problems: Mapping[int, str] = field(default_factory=dict)

    def cells(self) -> Iterator[dict[str, str]]:
        """Yield each row as a dictionary; the last of equal names counts."""
        for row in self.rows:
            yield dict(zip(self.columns, row, strict=True))

    def require_unique(self, names: tuple[str, ...]) -> None:
        """Refuse a table that has one of these columns twice.

        Args:
            names: The columns that are going to be read.

        Raises:
            ValueError: If a name occurs twice.
        """
        twice = [name for name in names if self.columns.count(name) > 1]
        if twice:
            raise ValueError(
                f"{self.name} has more than one column {', '.join(twice)}; keep one "
                "of each"
            )


def read_table(path: str | Path) -> Table:
    """Read a CSV file.

    Lines without any character are skipped, unless the table has a single column, where
    they are blank cells. Cells that a row has beyond its last column are dropped if
    they are blank, as some programs write them.

    Args:
        path: A file in UTF-8 whose first line names the columns.

    Returns:
        The table; rows of the wrong length or with an open quote are filled or cut, and
        listed in `problems`.

    Raises:
        ValueError: If the file is no text in UTF-8 or is empty.
        OSError: If it cannot be read.
    """
    name = str(path)
    text = _decode(Path(path).read_bytes(), name)
    if not text.strip():
        raise ValueError(f"{name} is empty; its first line must name the columns")
    text = text.lstrip("\r\n")
    delimiter = max(_DELIMITERS, key=lambda mark: _columns_with(mark, text))
    header, *records = _records(text, delimiter)
    rows, problems = [], {}
    for record in records:
        if not record and len(header) > 1:
            continue
        problem = _fit(record, len(header), delimiter)
        if problem:
            problems[len(rows)] = problem
        rows.append(tuple(record))
    return Table(
        name=name,
        columns=tuple(column.strip() for column in header),
        rows=rows,
        header=tuple(header),
        delimiter=delimiter,
        problems=problems,
    )


def write_table(table: Table, path: str | Path) -> None:
    """Write a table as a CSV file in UTF-8, with its own delimiter.

    Args:
        table: What to write.
        path: The file, which is replaced.

    Raises:
        OSError: If it cannot be written.
    """
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(_Lines(file), delimiter=table.delimiter)
        writer.writerow(table.header or table.columns)
        writer.writerows(table.rows)


def _decode(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8: byte {error.start} cannot be read; save it as "
            '"CSV UTF-8"'
        ) from None
    if "\0" in text:
        raise ValueError(
            f'{name} is no text: it has zero bytes; save it as "CSV UTF-8"'
        )
    return text


class _Lines:
    """Take lines from a writer that ends them, as it quotes them, by two characters."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, line: str) -> None:
        self._file.write(line.removesuffix("\r\n") + "\n")


def _columns_with(delimiter: str, text: str) -> tuple[int, int]:
    """Count the plain words of the header, and its cells if there are none."""
    # Not strict: under a wrong delimiter quotes end inside of a cell.
    header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    words = sum(cell.strip().isidentifier() for cell in header)
    return words, 0 if words else len(header)


def _fit(record: list[str], length: int, delimiter: str) -> str:
    """Fill or cut a row, and return what is wrong with it."""
    problem = record.problem if isinstance(record, _Unquoted) else ""
    while len(record) > length and not record[-1].strip():
        record.pop()
    if record and len(record) != length and not problem:
        problem = (
            f"has {len(record)} cells, but the header has {length} columns; give it as "
            f"many, and quote a cell that holds a {delimiter!r}"
        )
    record[:] = (record + [""] * length)[:length]
    return problem


class _Unquoted(list[str]):
    """Cells of a line whose quotes are wrong, as they stand."""

    problem: str


def _records(text: str, delimiter: str) -> list[list[str]]:
    lines = io.StringIO(text, newline="")
    try:
        return list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error:
        # A quote that is left open would swallow the rows below: each line for itself.
        lines = io.StringIO(text, newline=None)
        return [_record(line.rstrip("\n"), delimiter) for line in lines]


def _record(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        cells = _Unquoted(line.split(delimiter))
        cells.problem = (
            f"cannot be read: {error}; close each quote, and write one inside a quoted "
            'cell twice ("")'
        )
        return cells
