"""The columns that describe a training job in a table: one row, one `Configuration`.

Nine columns are required; the others have defaults, which also fill blank cells:

    layers width heads vocab seq nodes gpus_per_node mbs grad_acc
    kv_heads=heads ffn=4*width tied=0 gated_mlp=0 dp=1 tp=1 pp=1 cp=1 vp=1 sp=(tp>1)
    zero=0 recompute=none precision=bf16 schedule=1f1b hardware

`mbs` counts sequences, `grad_acc` passes of a rank in a step, `seq` and `vocab` tokens,
`vp` stages of a rank. With `vp` above 1 the schedule 1f1b is the interleaved one.
A model with `gated_mlp` has rotary positions, another one learned ones.

Standard library only. Chapter: planning/planner.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from labpkg.planning.configuration import PRECISIONS, RECOMPUTE, Configuration
from labpkg.planning.layout import SCHEDULES
from labpkg.planning.shapes import ModelShape

Value = int | bool | str
_LARGEST = 10**9  # beyond any job; a typing error rather than a size
_MOST_LAYERS = 10**5  # they are gone through one by one
_BLANK = "blank, but there is no default; write a number"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_FLAGS = {"0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}


def read_number(text: str) -> float:
    """Return the number that a cell holds.

    Args:
        text: Digits with a point and an exponent, if need be.

    Raises:
        ValueError: If the text is anything else, such as 1_000, 80GB or nan.
    """
    if not _NUMBER.fullmatch(text.strip()):
        raise ValueError(f"{text.strip()!r} is not a number; write digits, as in 12.5")
    return float(text)


def read_flag(text: str) -> bool:
    """Return whether a cell says yes.

    Args:
        text: 0 or 1; false, true, no, yes, 0.0 and 1.0 mean the same.

    Raises:
        ValueError: If the text is anything else.
    """
    word = text.strip().lower()
    word = word[:1] if word in ("0.0", "1.0") else word  # as data frames write them
    if word not in _FLAGS:
        raise ValueError(f"{text.strip()!r} is neither 0 nor 1; write 0 or 1")
    return _FLAGS[word]


def _whole(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        number = float(text) if _NUMBER.fullmatch(text) else math.nan
        if math.isnan(number) or (abs(number) <= _LARGEST and number % 1):
            raise ValueError(f"{text!r} is not a whole number; write digits, as in 8")
        if not least <= number <= most:
            bound = f"below {least}" if number < least else f"above {most}"
            raise ValueError(f"{text} is {bound}; choose {least} to {most}")
        return int(number)

    return read


def _one_of(known: Collection[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text.lower() not in known:
            raise ValueError(f"{text!r} is unknown; choose one of {', '.join(known)}")
        return text.lower()

    return read


class _Column(NamedTuple):
    read: Callable[[str], Value]
    default: Value | None = None
    """None: there is none, or `derive` makes it of another column."""
    of: str = ""
    derive: Callable[[Value], Value] = lambda value: value


_SIZE = _whole(1, _LARGEST)
_REQUIRED = (
    *("layers", "width", "heads", "vocab", "seq"),
    *("nodes", "gpus_per_node", "mbs", "grad_acc"),
)
_COLUMNS = {
    **{name: _Column(_SIZE) for name in _REQUIRED},
    "layers": _Column(_whole(1, _MOST_LAYERS)),
    "kv_heads": _Column(_SIZE, of="heads"),
    "ffn": _Column(_SIZE, of="width", derive=lambda width: 4 * int(width)),
    "tied": _Column(read_flag, False),
    "gated_mlp": _Column(read_flag, False),
    **{name: _Column(_SIZE, 1) for name in ("dp", "tp", "pp", "cp", "vp")},
    "sp": _Column(read_flag, of="tp", derive=lambda tp: int(tp) > 1),
    "zero": _Column(_whole(0, 3), 0),
    "recompute": _Column(_one_of(RECOMPUTE), "none"),
    "precision": _Column(_one_of(PRECISIONS), "bf16"),
    "schedule": _Column(_one_of(SCHEDULES), "1f1b"),
    "hardware": _Column(str.lower, ""),
}

JOB_COLUMNS = tuple(_COLUMNS)
"""Every column that is read, in the order of the list above."""
SHAPE_COLUMNS = (
    *("layers", "width", "heads", "kv_heads", "ffn", "vocab", "seq"),
    *("tied", "gated_mlp"),
)
"""The columns that say which model is trained."""
_FIELDS = {
    "num_layers": "layers",
    "num_heads": "heads",
    "num_kv_heads": "kv_heads",
    "ffn_width": "ffn",
    "vocab_size": "vocab",
    "sequence_length": "seq",
    "micro_batch_size": "mbs",
    "grad_accum_steps": "grad_acc",
    "num_virtual_stages": "vp",
    "sequence_parallel": "sp",
}
_FIELD = re.compile(rf"\b({'|'.join(_FIELDS)})\b")


def read_value(name: str, cells: Mapping[str, str]) -> Value:
    """Return the value of one job column, its default if the cell is blank.

    Args:
        name: One of `JOB_COLUMNS`.
        cells: Texts by the name of the column; others are ignored.

    Raises:
        ValueError: If it is blank without a default, or no possible value.
    """
    column = _COLUMNS[name]
    text = cells.get(name, "").strip()
    if text:
        return column.read(text)
    if column.of:
        return column.derive(read_value(column.of, cells))
    if column.default is None:
        raise ValueError(_BLANK)
    return column.default


def read_job(cells: Mapping[str, str]) -> dict[str, Value]:
    """Return the value of each job column, defaults filled in.

    Args:
        cells: Texts by the name of the column; others are ignored.

    Raises:
        ValueError: If cells are blank without a default, or no possible value; the
            message names every such column.
    """
    blank = [name for name in _REQUIRED if not cells.get(name, "").strip()]
    values: dict[str, Value] = {}
    wrong = [f"column {', '.join(blank)}: {_BLANK}"] if blank else []
    failed = set(blank)
    for name, column in _COLUMNS.items():
        if name in blank or (column.of in failed and not cells.get(name, "").strip()):
            continue
        try:
            values[name] = read_value(name, cells)
        except ValueError as error:
            failed.add(name)
            wrong.append(f"column {name}: {error}")
    if wrong:
        raise ValueError("; ".join(wrong))
    return values


def make_configuration(values: Mapping[str, Value]) -> Configuration:
    """Return the job that the values of a row describe.

    Args:
        values: What `read_job` returned.

    Raises:
        ValueError: If the job cannot exist; the message speaks of columns.
    """
    number = {name: int(v) for name, v in values.items() if not isinstance(v, str)}
    gated = bool(values["gated_mlp"])
    schedule = str(values["schedule"])
    if number["vp"] > 1 and schedule == "1f1b":
        schedule = "interleaved"
    try:
        return Configuration(
            model=ModelShape(
                num_layers=number["layers"],
                width=number["width"],
                num_heads=number["heads"],
                num_kv_heads=number["kv_heads"],
                ffn_width=number["ffn"],
                vocab_size=number["vocab"],
                sequence_length=number["seq"],
                tied=bool(values["tied"]),
                gated_mlp=gated,
                learned_positions=not gated,
            ),
            micro_batch_size=number["mbs"],
            grad_accum_steps=number["grad_acc"],
            num_virtual_stages=number["vp"],
            sequence_parallel=bool(values["sp"]),
            zero=number["zero"],
            recompute=str(values["recompute"]),
            precision=str(values["precision"]),
            schedule=schedule,
            nodes=number["nodes"],
            gpus_per_node=number["gpus_per_node"],
            dp=number["dp"],
            tp=number["tp"],
            pp=number["pp"],
            cp=number["cp"],
        )
    except ValueError as error:
        in_columns = _FIELD.sub(lambda field: _FIELDS[field[0]], str(error))
        raise ValueError(in_columns) from None


def require_columns(columns: Collection[str], table: str) -> None:
    """Refuse a table without one of the required columns.

    Args:
        columns: The columns that there are.
        table: How to call the table.

    Raises:
        ValueError: If columns are missing; the message names the nearest ones.
    """
    missing = [name for name in _REQUIRED if name not in columns]
    if missing:
        near = [
            f"{mine!r} for {name}" for mine, name in _near(columns) if name in missing
        ]
        meant = f" (did you mean {', '.join(near)}?)" if near else ""
        raise ValueError(
            f"{table} has no column {', '.join(missing)}{meant}; required are "
            f"{', '.join(_REQUIRED)}"
        )


def misspelled(columns: Collection[str]) -> list[str]:
    """Return a note for each column that looks like one of a job, but is none.

    Args:
        columns: The columns that there are.
    """
    return [
        f"column {mine!r} is carried along, not read; did you mean {name!r}?"
        for mine, name in _near(columns)
    ]


def _near(columns: Collection[str]) -> list[tuple[str, str]]:
    absent = [name for name in _COLUMNS if name not in columns]
    pairs = []
    for mine in columns:
        if mine not in _COLUMNS:
            lower = mine.lower().replace(" ", "_")
            pairs += [
                (mine, name)
                for name in difflib.get_close_matches(lower, absent, n=1, cutoff=0.8)
            ]
    return pairs
