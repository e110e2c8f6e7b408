"""The commands `labpkg predict` and `labpkg score`: tables of jobs in CSV files.

`predict` adds predicted columns to a table of training jobs; `score` compares them with
measurements. Rows are counted from 1, below the header. Notes go to standard error.

Chapter: planning/planner.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from labpkg.planning.hardware import find_hardware
from labpkg.planning.job_columns import misspelled
from labpkg.planning.predictions import PREDICTED_COLUMNS, predict_table
from labpkg.planning.scoring import Cell, Errors, Score, score_tables
from labpkg.planning.tables import Table, read_table, write_table

_SHOWN_ERRORS, _SHOWN_CELLS = 5, 40


def predict(argv: list[str]) -> int:
    """Predict speed and memory of training jobs: labpkg predict CONFIGS.csv.

    Args:
        argv: The arguments after the command's name.

    Returns:
        The exit code, 0 also if single rows could not be predicted.

    Raises:
        ValueError: If the table cannot be read at all, or the hardware is unknown.
        OSError: If a file cannot be read or written.
    """
    parser = argparse.ArgumentParser(
        prog="labpkg predict",
        description=(predict.__doc__ or "").splitlines()[0],
        epilog=_COLUMNS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", metavar="CONFIGS.csv", help="one job in each row")
    parser.add_argument(
        "--hardware",
        help="name, such as h100, or FILE.json, of rows that name none themselves",
    )
    parser.add_argument("--out", metavar="PRED.csv", required=True, help="to write")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    options = parser.parse_args(argv)
    hardware = None if options.hardware is None else find_hardware(options.hardware)
    table = read_table(options.table)
    _check_out(options.table, options.out)
    predicted = predict_table(table, hardware)
    write_table(predicted, options.out)
    summary = _summary(predicted, options.out)
    for note in misspelled(table.columns):
        _note(note)
    if options.json:
        print(json.dumps(summary))
    else:
        _print_summary(summary)
    return 0


def score(argv: list[str]) -> int:
    """Score predictions against measurements: labpkg score PRED.csv MEASURED.csv.

    Args:
        argv: The arguments after the command's name.

    Returns:
        The exit code.

    Raises:
        ValueError: If the tables do not belong together.
        OSError: If a file cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="labpkg score",
        description=(score.__doc__ or "").splitlines()[0],
        epilog=_SCORE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("predicted", metavar="PRED.csv", help="of labpkg predict")
    parser.add_argument("measured", metavar="MEASURED.csv", help="the same rows")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    found = score_tables(read_table(options.predicted), read_table(options.measured))
    if options.json:
        print(json.dumps(_as_dict(found)))
        return 0
    for note in found.notes:
        _note(note)
    print("\n".join(_lines(found)))
    return 0


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


# predict ---------------------------------------------------------------------------


def _check_out(table: str, out: str) -> None:
    path = Path(out)
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} for --out {out}; make it")
    if path.exists() and path.samefile(table):
        raise ValueError(f"--out {out} is the table itself; choose another file")


def _summary(predicted: Table, out: str) -> dict:
    added = len(PREDICTED_COLUMNS)
    answers = [
        dict(zip(PREDICTED_COLUMNS, row[-added:], strict=True))
        for row in predicted.rows
    ]
    verdicts = [answer["fits"] for answer in answers]
    return {
        "out": out,
        "rows": len(predicted.rows),
        "fit": verdicts.count("1"),
        "do_not_fit": verdicts.count("0"),
        "errors": [answer["error"] for answer in answers if answer["error"]],
        "columns": list(predicted.columns[-added:]),
    }


def _print_summary(summary: dict) -> None:
    errors = summary["errors"]
    print(
        f"{summary['out']}: {_count(summary['rows'], 'row')}, {summary['fit']} fit, "
        f"{summary['do_not_fit']} do not, {len(errors)} without a prediction"
    )
    for error in errors[:_SHOWN_ERRORS]:
        _note(error)
    if len(errors) > _SHOWN_ERRORS:
        _note(f"{len(errors) - _SHOWN_ERRORS} more rows say in {summary['out']} why")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


# score -----------------------------------------------------------------------------


def _as_dict(found: Score) -> dict:
    verdicts = found.verdicts
    return {
        "rows": found.rows,
        "tok_s_gpu": None if found.speed is None else asdict(found.speed),
        "mem_gib": None if found.memory is None else asdict(found.memory),
        "rank_correlation": found.rank_correlation,
        "regret": found.regret,
        "regret_of_ran": found.regret_of_ran,
        "does_not_fit": {
            "precision": verdicts.precision,
            "recall": verdicts.recall,
            "f1": verdicts.f1,
            **asdict(verdicts),
        },
        "cells": [asdict(cell) for cell in found.cells],
        "notes": list(found.notes),
    }


def _lines(found: Score) -> list[str]:
    ranked = sum(cell.rank_correlation is not None for cell in found.cells)
    chosen = sum(cell.regret is not None for cell in found.cells)
    verdicts = found.verdicts
    return [
        f"{_count(found.rows, 'row')}, {_count(len(found.cells), 'cell')} "
        "(model, nodes)",
        f"tok_s_gpu         {_error_line(found.speed)}",
        f"mem_gib           {_error_line(found.memory)}",
        f"rank correlation  median {_number(found.rank_correlation)} of "
        f"{_count(ranked, 'cell')} with three runs or more",
        f"regret of the best predicted configuration  median "
        f"{_percent(found.regret)} of {_count(chosen, 'cell')}; "
        f"{_percent(found.regret_of_ran)} if chosen among those that ran",
        f"does not fit      precision {_number(verdicts.precision)}, recall "
        f"{_number(verdicts.recall)}, F1 {_number(verdicts.f1)} "
        f"({verdicts.true_positives} found, {verdicts.false_negatives} missed, "
        f"{verdicts.false_positives} false alarms)",
        *_cell_lines(found.cells),
    ]


def _error_line(errors: Errors | None) -> str:
    if errors is None:
        return "nothing to compare"
    return (
        f"error median {_percent(errors.median)}, 75th percentile "
        f"{_percent(errors.p75)}, 90th {_percent(errors.p90)} of "
        f"{_count(errors.rows, 'row')}; predicted / measured {errors.ratio:.3f}, "
        f"|predicted / measured - 1| {_percent(errors.relative)} in the median"
    )


def _cell_lines(cells: tuple[Cell, ...]) -> list[str]:
    if len(cells) > _SHOWN_CELLS:
        return [f"--json lists each of the {len(cells)} cells"]
    width = max([5, *(len(cell.model) for cell in cells)])
    head = f"{'model':{width}} {'nodes':>6} {'rows':>6} {'ran':>6}   rank   regret"
    return [
        head,
        *(
            f"{cell.model:{width}} {cell.nodes:>6} {cell.rows:>6} {cell.ran:>6} "
            f"{_number(cell.rank_correlation):>6} {_percent(cell.regret):>8}"
            for cell in cells
        ),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


_COLUMNS_HELP = """required columns of CONFIGS.csv:
    layers, width, heads, vocab, seq: sizes of the model; seq in tokens
    nodes, gpus_per_node: dp x tp x pp x cp must be their product
    mbs, grad_acc: sequences of a micro-batch; passes of a rank in a step
optional ones, with the default that also fills a blank cell:
    kv_heads=heads, ffn=4*width, tied=0, gated_mlp=0 (1: three matrices, as in SwiGLU)
    dp=1, tp=1, pp=1, cp=1, vp=1 (stages of a rank; above 1 1f1b is interleaved)
    sp=(tp>1), zero=0 (to 3, which is FSDP), recompute=none (selective, full),
    precision=bf16 (fp16, fp32), schedule=1f1b (gpipe, interleaved, zb-h1, zb-v),
    hardware (a name or FILE.json; that of --hardware)
Other columns are carried along. Separators are commas, semicolons or tabs.

PRED.csv holds all columns unchanged and adds tok_s_gpu (tokens per second and GPU),
step_s (seconds of an optimizer step), mem_gib (peak allocated on the fullest rank, in
GiB = 2^30 bytes; 80 GB are 74.5 GiB), fits (0 or 1), mfu_pct (6 N + 12 L D T operations
a token) and error. If there is such a column, the added one is called pred_tok_s_gpu
and so on. A row without a prediction has blanks, and its error; the exit code stays 0.
"""
_SCORE_HELP = """PRED.csv is what labpkg predict wrote. MEASURED.csv has the same
rows in the same order, with tok_s_gpu (tokens per second and GPU), mem_gib (peak
allocated, in GiB = 2^30 bytes = 1.0737 GB) or both; blank if the job did not fit.
A column of a job that differs is refused.

error: exp(|ln(predicted / measured)|) - 1. Rank correlation (Spearman) and regret are
taken inside each cell: one model on one number of nodes of one kind. Regret is the
share of the best measured speed that is lost by taking the configuration with the best
predicted speed among those that are predicted to fit; a job in several rows ran if it
ran in one of them.
"""
