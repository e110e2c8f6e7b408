"""Train the whole parity matrix, and write the page of the book that tells the result.

    python -m scripts.parity                train all, write JSON and page
    python -m scripts.parity --page         write the page again

        tests/parity/matrix.py -> book/data/parity.json -> book/parallelism/parity.md

A deviation above its bound, or a refusal that no rule explains, ends the script with
exit code 1, and nothing is written. Numbers have two digits and carry no date and no
host: on one machine and version of torch the same code gives the same files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from textwrap import fill
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "parity.json"
PAGE = ROOT / "book" / "parallelism" / "parity.md"
SIZES = (4, 8)
_PER_JOB = 12  # settings that a job of a world trains
ENGINES = (
    *("data parallel", "zero 1", "zero 2", "zero 3", "tensor", "sequence parallel"),
    *(f"pipeline {name}" for name in ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v")),
)
QUANTITIES = {
    "output": "output before training",
    "loss": "loss, in evaluation and in each step",
    "gradients": "every gradient of the first step",
    "norm": "norm of the gradient in each step",
    "parameters": "every parameter after five steps",
}

HEAD = """\
# Proof: every layout, every feature

`lab.compose` puts engines together, and no layout may change what a model learns. The
parity matrix trains a small GPT under all {num_layouts} products of the engines on 4
and on 8 ranks. Those on 4 train with each feature alone and with many together, those
on 8 with many together, which is {num_settings} runs. Next to each, one process trains
the same model on whole batches, by a loop that knows no engine and takes its loss,
optimizer and clipping from torch. This page is generated from such a run: on the CPU,
with torch {torch}.

Compared are {quantities}. Each number is the largest deviation, relative: $\\lVert x -
y \\rVert / \\lVert y \\rVert$ of a tensor $x$ and the same tensor $y$ of the one
process. Ranks start from different seeds, all of them must report the same numbers, bit
by bit, and all layouts the same initial values. On 8 ranks no rank ever holds the whole
model: it is built without memory and given its values piece by piece.

In float64 the bound is {tolerance:.0e}. Under autocast to bfloat16 rounding decides,
and it falls elsewhere when sums are cut: the bound is then twice the deviation of the
one process in bfloat16 from itself in float64, and the tables show which part of it was
needed. (The loss has the bound of the output and the norm that of the gradients, since
errors may cancel in a single number. SGD with momentum takes the place of AdamW, which
divides a gradient by its size, so that rounding of the smallest would count most.)

The features:

"""

TAIL = """\
## Repeat it

`make parity` trains all settings, stores what it measured in `book/data/parity.json`
and writes this page. A deviation above its bound is an error. `make test` trains a part
in which every engine meets every feature. Settings are listed in
`tests/parity/matrix.py`.
"""


def measured(results: Iterable[Any]) -> list[dict[str, Any]]:
    """Return what is stored of results, one row for each setting.

    Raises:
        ValueError: With the first of them that has a problem.
    """
    from tests.parity.matrix import SETS, engines

    names = {features: name for name, features in SETS.items()}
    rows = []
    for result in results:
        if result.problem is not None:
            raise ValueError(result.problem)
        setting = result.setting
        row = {"layout": str(setting.base), "ranks": setting.base.world_size}
        row |= {"engines": sorted(engines(setting.base), key=ENGINES.index)}
        row |= {"set": names[setting.features], "features": sorted(setting.features)}
        row |= {"refusal": result.refusal, "bf16": setting.is_rough}
        row["deviations"] = {k: _rounded(v) for k, v in result.deviations.items()}
        row["bounds"] = {k: _rounded(v) for k, v in result.bounds.items()}
        rows.append(row)
    return rows


def train() -> dict[str, Any]:
    """Train the whole matrix; return what is stored."""
    import torch

    import labpkg as lab
    from tests.parity.matrix import FEATURES, TOLERANCE, whole
    from tests.parity.matrix_results import measure

    torch.set_num_threads(1)  # as on a rank
    rows = []
    for size in SIZES:
        settings = whole(size)
        with lab.World(size, device="cpu") as world:
            for first in range(0, len(settings), _PER_JOB):
                rows += measured(measure(world, settings[first : first + _PER_JOB]))
                print(f"{size} ranks: {first} of {len(settings)}", file=sys.stderr)
    version = torch.__version__.partition("+")[0]
    about = {"torch": version, "tolerance": TOLERANCE, "features": dict(FEATURES)}
    return about | {"rows": rows}


def _rounded(value: float) -> float:
    return float(f"{value:.1e}")


def page(stored: dict[str, Any]) -> str:
    """Return the page that a stored run gives."""
    rows, features = stored["rows"], stored["features"]
    trained = [row for row in rows if row["refusal"] is None]
    head = HEAD.format(
        num_layouts=len({(row["ranks"], row["layout"]) for row in rows}),
        num_settings=len(rows),
        torch=stored["torch"],
        tolerance=stored["tolerance"],
        quantities="; ".join(QUANTITIES.values()),
    )
    parts = ["\n\n".join(fill(text, 88) for text in _paragraphs(head)), "\n\n"]
    parts += [f"- **{name}**: {text}\n" for name, text in features.items()]
    parts += ["\n", *_by_engine(trained), *_by_feature(trained, list(features))]
    parts += [*_by_layout(rows), *_refusals(rows), TAIL]
    return "".join(parts)


def _paragraphs(text: str) -> list[str]:
    title, *others = text.strip().split("\n\n")
    return [title, *others]


def _by_engine(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["## By engine", "", "The largest deviations, of all products with it.", ""]
    lines += [_row("Engine", "Runs", *QUANTITIES, "bf16: part of the bound")]
    lines += ["|:--|--:|" + ":--|" * (len(QUANTITIES) + 1)]
    for engine in ENGINES:
        own = [row for row in rows if engine in row["engines"]]
        cells = [_worst(own, lambda row, k=k: row["deviations"][k]) for k in QUANTITIES]
        lines.append(_row(engine, str(len(own)), *cells, _part_of_bound(own)))
    return ["\n".join(lines), "\n\n"]


def _by_feature(rows: list[dict[str, Any]], features: list[str]) -> list[str]:
    text = (
        "The largest deviation of any quantity, of all products with the engine and "
        "all runs with the feature, alone or with others."
    )
    lines = ["## Engine and feature", "", fill(text, 88), ""]
    shown = ["none", *(name for name in features if name != "bf16")]
    lines += [_row("Engine", *shown), "|:--|" + ":--|" * len(shown)]
    for engine in ENGINES:
        cells = []
        for name in shown:
            own = [row for row in rows if engine in row["engines"]]
            own = [row for row in own if name in (row["features"] or ["none"])]
            cells.append(_worst(own, _largest))
        lines.append(_row(engine, *cells))
    return ["\n".join(lines), "\n\n"]


def _by_layout(rows: list[dict[str, Any]]) -> list[str]:
    text = "The largest deviation of any quantity; in bfloat16 the part of the bound."
    lines = ["## By layout", "", text, ""]
    for size in SIZES:
        lines += [f"### {size} ranks", "", _row("Layout", "Runs", "float64", "bf16")]
        lines += ["|:--|--:|:--|:--|"]
        own = [row for row in rows if row["ranks"] == size]
        for layout in dict.fromkeys(row["layout"] for row in own):
            runs = [r for r in own if r["layout"] == layout and r["refusal"] is None]
            cells = (layout, str(len(runs)), _worst(runs, _largest))
            lines.append(_row(*cells, _part_of_bound(runs)))
        lines.append("")
    return ["\n".join(lines), "\n"]


def _refusals(rows: list[dict[str, Any]]) -> list[str]:
    """List what cannot be, by the message of the first setting that broke a rule."""
    text = (
        "These settings are refused by a `ValueError` on every rank. Each line shows "
        "one message of those with the same feature."
    )
    lines = ["## What cannot be", "", fill(text, 88), ""]
    lines += [_row("Setting", "Settings", "Message"), "|:--|--:|:--|"]
    refused = [row for row in rows if row["refusal"] is not None]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in refused:
        kinds.setdefault(row["set"], []).append(row)
    for group in kinds.values():
        first = group[0]
        setting = f"{first['layout']}: {first['set']}"
        lines.append(_row(setting, str(len(group)), first["refusal"]))
    return ["\n".join(lines), "\n\n"]


def _largest(row: dict[str, Any]) -> float:
    return max(row["deviations"].values())


def _worst(rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> str:
    """Return the largest value of the runs in float64, or a dash if there are none."""
    values = [value(row) for row in rows if not row["bf16"]]
    # A hyphen that does not end a line: cells are narrow.
    return f"{max(values):.2g}".replace("-", "\u2011") if values else "–"


def _part_of_bound(rows: list[dict[str, Any]]) -> str:
    parts = [
        deviation / row["bounds"][name]
        for row in rows
        if row["bf16"]
        for name, deviation in row["deviations"].items()
    ]
    return f"{max(parts):.2f}" if parts else "–"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--page"]):
        print(__doc__, file=sys.stderr)
        return 2
    if not arguments:
        try:
            stored = train()
        except ValueError as error:
            print(f"parity: {error}", file=sys.stderr)
            return 1
        DATA.write_text(
            json.dumps(stored, separators=(",", ":")).replace("},{", "},\n{") + "\n"
        )
    if not DATA.exists():
        print(
            f"{DATA.relative_to(ROOT)} is missing; run `make parity`", file=sys.stderr
        )
        return 1
    PAGE.write_text(page(json.loads(DATA.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
