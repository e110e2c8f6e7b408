"""Write the page of the book that tells what the laws of every engine measured.

    laws.py        book/data/laws.json -> book/parallelism/laws.md

`make laws` runs the tests of the laws, which write the JSON file (see `record`), and
then this. Numbers have two digits and carry no date and no host: on one machine and
version of torch the same code gives the same files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "laws.json"
PAGE = ROOT / "book" / "parallelism" / "laws.md"
_NUM_COLUMNS = 6  # engines beside each other


class Law(NamedTuple):
    """What a law says, and the unit in which tests measure how far it is missed."""

    title: str
    meaning: str
    unit: str = ""
    is_lower_bound: bool = False


LAWS = {
    "output": Law(
        "The same output",
        "The output of the first forward pass, put together from all ranks, is that of "
        "one process on the whole batch.",
    ),
    "gradients": Law(
        "The same gradients",
        "Every gradient is that of one process. A gradient that lies in slices, or on "
        "one rank alone, is gathered first. Where one process has `None`, so has the "
        "engine.",
    ),
    "parameters": Law(
        "The same parameters",
        "After five steps of SGD with momentum, and of AdamW, every parameter on every "
        "rank is that of one process, and bitwise that of the other ranks.",
    ),
    "seeds": Law(
        "Other seeds",
        "Each rank builds its model from a seed of its own. Once the engine has it, "
        "all parameters and buffers are bitwise those of rank 0; in a pipeline those "
        "of a stage are bitwise what its rank has built, and what stages share is that "
        "of the first of them. One process then starts from these.",
    ),
    "off": Law(
        "Communication off",
        "With communication switched off and equal seeds the same run completes, "
        "counts no byte, and its gradients are wrong on every rank by more than 1000 "
        "times the tolerance: the other laws do not hold by accident.",
        is_lower_bound=True,
    ),
    "bytes": Law(
        "Counted bytes",
        "The payload bytes of a step, counted collective by collective, are those of "
        "the formulas in `labpkg/planning`, with one and with two backward passes for "
        "each step; no other collective runs.",
        unit="bytes",
    ),
    "bad_input": Law(
        "Bad input",
        "What cannot work, such as a model without parameters, raises a `ValueError` "
        "on every rank before anything is sent, and the ranks can train afterwards. "
        "(Ranks that divide a model first tell each other what they hold: if one of "
        "them must refuse, all do.)",
        unit="ranks that accept",
    ),
    "models": Law(
        "Other models",
        "Gradients and parameters after five steps are those of one process for models "
        "that nobody tuned an engine for: a convolution with buffers, an LSTM, tied "
        "embeddings, branches that some or all ranks leave out, a single parameter, "
        "odd sizes, a frozen backbone, nested and shared modules. What divides layers "
        "gets those that have a layer to divide, beside sizes that stay whole; a "
        "pipeline gets chains of eight units or more, with a weight that four stages "
        "share, and stages that are frozen or have no parameters.",
    ),
    "bfloat16": Law(
        "Half precision",
        "The same for a model in bfloat16, whose numbers have 8 significant bits: here "
        "rounding decides, and the tolerance is four units in the last place.",
    ),
    "bitwise": Law(
        "Bitwise",
        "Where the order of a sum is fixed, one process can repeat it bit by bit, on 2 "
        "and 4 ranks, all models in float64, the book's own in float32 too. Data "
        "parallelism adds in the order of the ranks with `deterministic=True`: the "
        "process accumulates the shards one after the other. Tensor parallelism adds "
        "the terms of the ranks in their order: the process cuts the layers into the "
        "same slices. A pipeline adds micro-batches: the process accumulates these; "
        "models with tied weights are left out, since each copy adds up by itself "
        "first. Odd sizes are left out where flat buffers move them: how a kernel "
        "rounds depends on the alignment of what it reads. (On 3 ranks 1/n is rounded. "
        "In bfloat16 gradients are bitwise equal, but parameters need not be: torch "
        "rounds `add` with a factor otherwise in the last elements of a tensor, and "
        "slices end elsewhere.)",
    ),
}

HEAD = """\
# Proof: the laws of every engine

An engine of parallelism may change where numbers lie and when they travel, but not what
they are. The tests hold every engine to the same laws, at 2, 3 and 4 ranks (a pipeline
at 2 and 4), with ranks that start from different seeds. This page is generated from
such a run: on the CPU, with torch {torch}.

Each number is the largest deviation over all cases: models, optimizers, numbers of
ranks, ranks. Unless its bound, below, names a unit, it is relative: $\\lVert x - y
\\rVert / \\lVert y \\rVert$ of a tensor $x$ and the same tensor $y$ of one process; 0
means bitwise equal. With communication off it is the smallest one, which must be large.
`ZeroOptimizer-2` is `ZeroOptimizer` with `stage=2`, `TensorParallel-sequence` is
`apply_tensor_parallel` with `sequence_parallel=True`, and `Pipeline-zb-v` a `Pipeline`
with that schedule.

"""

TAIL = """\
## Repeat it

`make laws` runs the tests, stores what they measure in `book/data/laws.json` and writes
this page. An engine joins by one class in `tests/parallelism/engines.py` or
`model_engines.py`, which says how to wrap a model, to train a step and to gather what
is cut; the laws themselves, in `tests/parallelism/test_laws.py`, know no engine.
"""


def record(
    measured: Iterable[tuple[str, str, str, float, float]], torch: str, path: Path
) -> None:
    """Store what tests measured, one row for each engine and law.

    Args:
        measured: Test, engine, law, deviation and tolerance of each case.
        torch: Its version.
        path: The JSON file.

    Raises:
        ValueError: If the cases of a law have several tolerances.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    tolerances: dict[str, float] = {}
    for test, engine, law, deviation, tolerance in measured:
        new = {"engine": engine, "law": law, "tests": [], "cases": 0}
        new |= {"deviation": deviation, "tolerance": tolerance}
        row = rows.setdefault((engine, law), new)
        if tolerances.setdefault(law, tolerance) != tolerance:
            raise ValueError(
                f"{test} measures {law} of {engine} with tolerance {tolerance}, "
                f"another case with {tolerances[law]}; make it a law of its own"
            )
        worst = min if LAWS[law].is_lower_bound else max
        row["deviation"] = worst(row["deviation"], deviation)
        row["tests"] = sorted({*row["tests"], test})
        row["cases"] += 1
    for row in rows.values():
        row["deviation"] = float(f"{row['deviation']:.1e}")
    order = list(LAWS)
    stored = {
        "torch": torch,
        "rows": sorted(rows.values(), key=lambda row: order.index(row["law"])),
    }
    path.write_text(json.dumps(stored, indent=1) + "\n")


def page(stored: dict[str, Any]) -> str:
    """Return the page that a stored run gives."""
    rows = {(row["engine"], row["law"]): row for row in stored["rows"]}
    engines = list(dict.fromkeys(engine for engine, _ in rows))
    lines = []
    for first in range(0, len(engines), _NUM_COLUMNS):
        group = engines[first : first + _NUM_COLUMNS]
        lines += [_row("Law", *group), "|:--|" + ":--|" * len(group)]
        for law in LAWS:
            cells = [number(rows[engine, law]["deviation"]) for engine in group]
            lines.append(_row(f"[{LAWS[law].title}](#law-{law})", *cells))
        lines.append("")
    parts = [HEAD.format(torch=stored["torch"]), "\n".join(lines), "\n"]
    parts += [_section(law, [rows[engine, law] for engine in engines]) for law in LAWS]
    return "".join([*parts, TAIL])


def _section(law: str, rows: list[dict[str, Any]]) -> str:
    about, bound = LAWS[law], tolerance(rows[0])
    lines = [f"(law-{law})=", f"## {about.title}", "", fill(about.meaning, 88), ""]
    lines += [f"Bound: {bound}.", "", _row("Engine", "Cases", "Deviation", "Test")]
    lines.append("|:--|--:|:--|:--|")
    for row in rows:
        tests = ", ".join(f"`{test.rpartition('::')[2]}`" for test in row["tests"])
        cells = (f"`{row['engine']}`", str(row["cases"]), number(row["deviation"]))
        lines.append(_row(*cells, tests))
    return "\n".join(lines) + "\n\n"


def number(value: float) -> str:
    """Return a deviation as the tables show it."""
    return f"{value:.2g}"


def tolerance(row: dict[str, Any]) -> str:
    """Return the bound of a row, with its direction and unit."""
    law = LAWS[row["law"]]
    relation = ">" if law.is_lower_bound else "≤" if row["tolerance"] else ""
    return f"{relation} {number(row['tolerance'])} {law.unit}".strip()


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    if not DATA.exists():
        sys.exit(f"{DATA.relative_to(ROOT)} is missing; run `make laws`")
    PAGE.write_text(page(json.loads(DATA.read_text())))
