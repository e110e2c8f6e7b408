"""Measured jobs as the calibration takes them: each once, with its speed.

Rows of one table with the same job are one: it ran if one of them ran, with the median
of what was measured. Megatron: Korthikanti et al. 2022, arXiv:2205.05198, Table 5,
eight iteration times of 22 billion to a trillion parameters on A100.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

from labpkg.planning.configuration import Configuration
from labpkg.planning.constants import Constants
from labpkg.planning.hardware import HARDWARE
from labpkg.planning.models import find_model
from labpkg.planning.step_time import step_time
from scripts.published_runs import PLAYBOOK_MODELS, SEQUENCES_PER_STEP, Run

SAME_SIZE = {"1b": "1B", "3b": "3B", "7b": "8B"}


class Job(NamedTuple):
    """A job that was measured, or that crashed.

    Attributes:
        source: The collection: playbook, mosaicml or megatron.
        model: Its name; an MPT model has the name of the playbook's of its size.
        hardware: A key of `labpkg.HARDWARE`.
        configuration: What was run.
        tok_s_gpu: Tokens per second and GPU; None if it crashed.
    """

    source: str
    model: str
    hardware: str
    configuration: Configuration
    tok_s_gpu: float | None

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.configuration.nodes

    @property
    def measured(self) -> float:
        """Tokens per second and GPU of a job that ran."""
        assert self.tok_s_gpu is not None
        return self.tok_s_gpu

    def predicted(self, constants: Constants) -> float:
        """Return predicted tokens per second and GPU."""
        job = self.configuration
        found = step_time(job, HARDWARE[self.hardware], constants)
        return job.tokens_per_step / found.seconds / job.world_size


def merged(source: str, runs: Iterable[Run]) -> list[Job]:
    """Return each job once, in the order of the table."""
    found: dict[tuple[str, Configuration], list[Run]] = defaultdict(list)
    for run in runs:
        if run.configuration is not None:
            found[run.hardware, run.configuration].append(run)
    jobs = []
    for (hardware, configuration), same in found.items():
        ran = [run.tok_s_gpu for run in same if run.tok_s_gpu is not None]
        model = SAME_SIZE.get(same[0].model, same[0].model)
        speed = median(ran) if ran else None
        jobs.append(Job(source, model, hardware, configuration, speed))
    return jobs


def megatron_jobs(folder: Path) -> list[Job]:
    """Return the rows of Korthikanti et al. 2022, Table 5."""
    with (folder / "published_a100.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "iter_s"]
    jobs = []
    for row in rows:
        recompute, _, sequence_parallel = row["recompute"].partition("+")
        size = row["model"].split()[0].split("-")[-1].lower()
        vp = int(row["vp"])
        configuration = Configuration(
            model=find_model(f"megatron-{size}"),
            nodes=int(row["gpus"]) // 8,
            tp=int(row["tp"]),
            pp=int(row["pp"]),
            micro_batch_size=int(row["mbs"]),
            grad_accum_steps=int(row["gbs_seqs"]) // int(row["mbs"]),
            num_virtual_stages=vp,
            schedule="interleaved" if vp > 1 else "1f1b",
            recompute=recompute,
            sequence_parallel=bool(sequence_parallel),
            precision="fp16",
        )
        tokens = configuration.tokens_per_step / configuration.world_size
        speed = tokens / float(row["value"])
        jobs.append(Job("megatron", size, "a100-80gb", configuration, speed))
    return jobs


def scaling_jobs(folder: Path) -> list[Job]:
    """Return the scaling series of the playbook, which no fit sees.

    Data parallelism, 1B on 1 to 32 nodes without ZeRO, and tensor with sequence
    parallelism, 3B on 2 to 32 GPUs with the largest micro-batch. What the source leaves
    open is filled in: two sequences in a micro-batch where the table has the same speed
    for it, one otherwise; one micro-batch in a step of tensor parallelism.
    """
    series = json.loads((folder / "playbook_bandwidth_and_scaling.json").read_text())
    jobs = []
    found = series["dp_scaling_tok_s_gpu"]
    for gpus, speed in zip(found["gpus"], found["tok_s_gpu"], strict=True):
        size = 2 if gpus in (8, 128) else 1
        job = Configuration(
            model=PLAYBOOK_MODELS["1B"],
            nodes=gpus // 8,
            dp=gpus,
            micro_batch_size=size,
            grad_accum_steps=SEQUENCES_PER_STEP // gpus // size,
        )
        jobs.append(Job("dp scaling", "1B", "h100", job, speed))
    found = series["tp_sp_scaling_3B"]
    columns = (found[name] for name in ("tp", "max_mbs", "tok_s_gpu"))
    for tp, size, speed in zip(*columns, strict=True):
        job = Configuration(
            model=PLAYBOOK_MODELS["3B"],
            nodes=max(1, tp // 8),
            gpus_per_node=min(8, tp),
            tp=tp,
            micro_batch_size=size,
        )
        jobs.append(Job("tp scaling", "3B", "h100", job, speed))
    return jobs


def artefacts(jobs: Sequence[Job]) -> set[Configuration]:
    """Return the jobs that are called artefacts, by measured numbers alone.

    Of two jobs that differ in `zero` only, the slower if the other is more than 2 x as
    fast; and a job with less than half the speed of the same job with half the
    micro-batch.
    """
    speeds = {job.configuration: job.tok_s_gpu for job in jobs if job.tok_s_gpu}
    called = set()
    for job, speed in speeds.items():
        others = [speeds.get(replace(job, zero=1 - job.zero))]
        M, size = job.grad_accum_steps, job.micro_batch_size
        if size % 2 == 0:
            half = replace(job, micro_batch_size=size // 2, grad_accum_steps=2 * M)
            others.append(speeds.get(half))
        if any(other and other > 2 * speed for other in others):
            called.add(job)
    return called
