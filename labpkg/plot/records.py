"""Results that were recorded on a machine that the reader may not have.

`recorded("data_parallel")` draws `recorded_data_parallel.json` of book/data, or says
that there is none and which command would make it. A record is what `labpkg bench NAME
--json` prints, an object with the keys

    name      the benchmark, as in the file name
    machine   an object with `gpus`, such as "8 x H100 SXM" ("none": `cpu` counts)
    versions  an object of names and versions, such as {"torch": "2.13.0"}
    date      year-month-day
    command   what was typed
    rows      a list of objects with `config`, `variant`, and either `wall_ratio` (time
              relative to the base row, which has 1) in all of them, or `value` and one
              `unit` in all of them

Other keys are ignored. Chapters: the section "On real GPUs" of all of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labpkg.plot.appearance import COLORS, axes_or_new, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KEYS = ("name", "machine", "versions", "date", "command", "rows")


def recorded(
    name: str, *, folder: str | Path = "../data", ax: Axes | None = None
) -> Axes | None:
    """Draw what was recorded for a chapter, or print that nothing was.

    The figure names the machine, the versions, the date and the command.

    Args:
        name: The benchmark, such as "data_parallel".
        folder: Where the records are; the default is right for a notebook of the book.
        ax: Where to draw; a new figure without it.

    Returns:
        The axes, one bar for each row; None without a record.

    Raises:
        ValueError: if there is no such folder, or if the file is not a record.
    """
    path = Path(folder) / f"recorded_{name}.json"
    if not path.parent.is_dir():
        raise ValueError(
            f"no folder {str(folder)!r} here; run the notebook from its own folder, or "
            "pass folder="
        )
    if not path.exists():
        print(
            f"Nothing is recorded for {name} yet. On a machine with GPUs, run\n\n"
            f"    labpkg bench {name} --json > book/data/{path.name}"
        )
        return None
    record = _read(path, name)
    key, label = _quantity(record["rows"], path.name)
    rows = record["rows"][::-1]  # the first row on top
    with style():
        ax = axes_or_new(ax, height=1.2 + 0.3 * len(rows))
        names = [f"{row['config']}: {row['variant']}" for row in rows]
        bars = ax.barh(range(len(rows)), [row[key] for row in rows], color=COLORS["dp"])
        ax.bar_label(bars, fmt="{:.3g}", padding=3)
        ax.set_yticks(range(len(rows)), names)
        ax.grid(axis="y", visible=False)
        ax.margins(x=0.12)
        ax.set_xlabel(label)
        if key == "wall_ratio":
            ax.axvline(1, color="black", linestyle="--")
        machine = record["machine"]
        device = machine["cpu"] if machine["gpus"] == "none" else machine["gpus"]
        versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
        origin = f"{device}, {versions}, {record['date']}\n{record['command']}"
        ax.set_title(origin, fontsize=8, loc="left")
    return ax


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path.name} is not JSON ({error}); record it again"
        ) from None
    missing = [
        key for key in _KEYS if not isinstance(record, dict) or key not in record
    ]
    if missing or record["name"] != name or not record["rows"]:
        raise ValueError(
            f"{path.name} must be an object with name={name!r}, at least one row and "
            f"the keys {', '.join(_KEYS)}; missing: {missing}; record it again"
        )
    return record


def _quantity(rows: list[dict[str, Any]], file: str) -> tuple[str, str]:
    """Return what all rows have to draw: its key and the label of its axis."""
    if all("config" in row and "variant" in row for row in rows):
        if all(row.get("wall_ratio") is not None for row in rows):
            return "wall_ratio", "time relative to the base row"
        units = {row.get("unit") for row in rows}
        if (
            len(units) == 1
            and None not in units
            and all("value" in row for row in rows)
        ):
            return "value", str(units.pop())
    raise ValueError(
        f"the rows of {file} need config and variant, and all of them wall_ratio, or "
        "all of them value with one unit; record it again"
    )
