"""Published training runs as jobs of the planner: what the calibration is held to.

The tables are measurements of others and are not part of the repository: see
`data_folder`. Playbook: the Ultra-Scale Playbook of Hugging Face (Apache-2.0), dense
models of 1, 3 and 8 billion parameters on 8 to 128 H100; a row without numbers crashed.
MosaicML: the training benchmarks of llm-foundry (Apache-2.0), MPT models under FSDP on
A100; all of them ran. The unit of the playbook's memory is not documented. It is GiB of
allocated tensors: with 10^9 bytes, weights, gradients and optimizer state alone would
be more than was measured, and logs of the same authors speak of `peak_allocated_MiB`.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from labpkg.planning.configuration import Configuration
from labpkg.planning.models import find_model
from labpkg.planning.shapes import ModelShape

ROOT = Path(__file__).parent.parent
VARIABLE = "LABPKG_CALIBRATION_DATA"


def _playbook_model(
    layers: int, width: int, ffn_width: int, *, tied: bool
) -> ModelShape:
    return ModelShape(
        num_layers=layers,
        width=width,
        num_heads=32,
        num_kv_heads=32,
        ffn_width=ffn_width,
        vocab_size=131072,
        sequence_length=4096,
        tied=tied,
        gated_mlp=True,
        learned_positions=False,
    )


PLAYBOOK_MODELS = {
    "1B": _playbook_model(16, 2048, 8192, tied=True),
    "3B": _playbook_model(28, 3072, 8192, tied=True),
    "8B": _playbook_model(32, 4096, 14336, tied=False),
}
SEQUENCES_PER_STEP = 256


class Run(NamedTuple):
    """One row of a table.

    Attributes:
        model: Its name there.
        hardware: A key of `labpkg.HARDWARE`.
        configuration: The job; None if it is none (more stages than layers).
        tok_s_gpu: Measured tokens per second and GPU; None if it crashed.
        memory_bytes: Measured peak of allocated tensors; None if unknown.
    """

    model: str
    hardware: str
    configuration: Configuration | None
    tok_s_gpu: float | None
    memory_bytes: float | None


def data_folder() -> Path | None:
    """Return where the tables are: a variable's value, or ../shared/data, if there."""
    folder = Path(os.environ.get(VARIABLE) or ROOT.parent / "shared" / "data")
    return folder if (folder / "playbook_h100_calibration.csv").exists() else None


def playbook_runs(folder: Path) -> list[Run]:
    """Return the rows of the playbook whose numbers multiply to its batch."""
    return [
        Run(
            row["model"],
            "h100",
            _playbook_job(row),
            _number(row["tok_s_gpu"]),
            _gib(row["mem_GB"]),
        )
        for row in _rows(folder / "playbook_h100_calibration.csv")
        if _product(row, "dp", "mbs", "grad_acc") == SEQUENCES_PER_STEP
    ]


def mosaicml_runs(folder: Path) -> list[Run]:
    """Return the rows of MosaicML's table, all of which ran."""
    return [
        Run(
            row["Model"],
            row["GPU"].replace("_", "-"),
            _mosaicml_job(row),
            float(row["Throughput (T/s/GPU)"]),
            None,
        )
        for row in _rows(folder / "llmfoundry_a100.csv")
    ]


def _playbook_job(row: Mapping[str, str]) -> Configuration | None:
    try:
        return Configuration(
            model=PLAYBOOK_MODELS[row["model"]],
            nodes=int(row["nodes"]),
            dp=int(row["dp"]),
            tp=int(row["tp"]),
            pp=int(row["pp"]),
            micro_batch_size=int(row["mbs"]),
            grad_accum_steps=int(row["grad_acc"]),
            zero=int(row["zero"]),
        )
    except ValueError:
        return None


def _mosaicml_job(row: Mapping[str, str]) -> Configuration:
    model = find_model(f"mpt-{row['Model'].lower()}")
    num_gpus = int(row["# GPUs"])
    return Configuration(
        model=replace(model, sequence_length=int(row["SeqLen (T)"])),
        nodes=max(1, num_gpus // 8),
        gpus_per_node=min(8, num_gpus),
        dp=num_gpus,
        micro_batch_size=int(row["MicroBatchSize"]),
        grad_accum_steps=int(float(row["GradAccum"])),
        zero=3,
        recompute="full" if row["Activation Checkpointing"] == "True" else "none",
        fused_loss=True,  # the default of llm-foundry's MPT
    )


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _product(row: Mapping[str, str], *names: str) -> int:
    product = 1
    for name in names:
        product *= int(row[name])
    return product


def _number(text: str) -> float | None:
    return float(text) if text else None


def _gib(text: str) -> float | None:
    return float(text) * 2**30 if text else None
