"""The training run: data-parallel, resumable, the same lines on one rank and on eight.

Contract: the state of a run is (weights, optimizer, step). The learning rate and the
batch are functions of the step, so a run that was killed and resumed ends with the
weights of one that was not, bit by bit on the same number of ranks. All numbers that
are shown are means over all ranks by counts.

Chapters: foundations/training_loop, parallelism/data_parallel, runs/checkpointing.
References: Li et al. 2020, PVLDB 13(12), arXiv:2006.15704; Goyal et al. 2017,
arXiv:1706.02677 (what must agree between one rank and many).
"""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from labpkg.foundations.data import batches
from labpkg.foundations.learning_rates import warmup_cosine
from labpkg.foundations.losses import cross_entropy
from labpkg.foundations.metrics import RunningMean
from labpkg.foundations.optimizers import AdamW
from labpkg.parallelism.data_parallel import DataParallel
from labpkg.processes.collectives import all_reduce
from labpkg.processes.mesh import choose_placement, make_mesh
from labpkg.processes.messages import all_gather_object
from labpkg.runs.checkpoint import (
    load_checkpoint,
    random_state,
    save_checkpoint,
)
from labpkg.runs.config import TrainConfig
from labpkg.runs.joining import joined
from labpkg.runs.start import find_start, set_aside
from labpkg.runs.tasks import build_model, load_task, sample_text
from labpkg.runs.tracking import Tracker

_DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
_NUM_REPORTS = 100
_BETAS = (0.9, 0.95)  # short runs: the second moment must forget faster than usual
_MAX_GRAD_NORM = 1.0
_EVALUATION_BATCH = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a run ended with.

    Attributes:
        model: Name of the model.
        num_parameters: Its parameters.
        num_ranks: Data-parallel ranks.
        backend: Backend of the process group.
        device: Name of the device of rank 0.
        precision: fp32, bf16 or fp64.
        steps: Optimizer steps done in all.
        resumed_from: The checkpoint that this run started from, or None.
        history: (step, training loss) pairs of this run; a loss is the mean since the
            pair before, in nats.
        validation_loss: In nats per token or sample.
        baseline_loss: The same for the counting model that a run must beat.
        unit: "tokens" or "samples".
        units_per_s: Throughput of all ranks, in units per second.
        first_step_time: When the first step was done, in seconds since the epoch.
        sample: Generated text; empty for a model that writes none.
        checkpoint: The last checkpoint.
    """

    model: str
    num_parameters: int
    num_ranks: int
    backend: str
    device: str
    precision: str
    steps: int
    resumed_from: str | None
    history: list[tuple[int, float]]
    validation_loss: float
    baseline_loss: float
    unit: str
    units_per_s: float
    first_step_time: float
    sample: str
    checkpoint: str

    def __str__(self) -> str:
        beaten = self.validation_loss < self.baseline_loss
        text = f"\nSample:\n{self.sample}\n\n" if self.sample else ""
        return (
            f"{text}Validation loss {self.validation_loss:.3f} nats per "
            f"{self.unit[:-1]}; baseline by counting {self.baseline_loss:.3f} "
            f"({'beaten' if beaten else 'not beaten'}).\n"
            f"Ran {self.model} ({self.num_parameters:,} parameters) on "
            f"{self.num_ranks} ranks, {self.backend}, {self.device}, "
            f"{self.precision}: {self.units_per_s:,.0f} {self.unit}/s."
        )


class Trainer:
    """Train a model data-parallel; every rank makes one and calls `run`.

    It runs under `labpkg train`, torchrun, `World.run`, or alone as one rank, and sets
    torch's default device only for the time of the call. Rank 0 writes checkpoints and
    TensorBoard files to `config.out`. A new run moves what an earlier one left there
    to `out/previous`; a rank that was restarted resumes by itself.

    Args:
        config: What to train.

    Communication: per step `data_parallel_bytes(model)` are all-reduced.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def run(self) -> TrainResult:
        """Train to the last step, save, evaluate, and return the result on all ranks.

        Raises:
            ValueError: If the configuration does not fit the job, the data or the
                checkpoint.
            OSError: If a checkpoint cannot be saved.
        """
        with joined(self.config.device) as device:
            ranks = dist.get_world_size()
            dp = ranks if self.config.dp is None else self.config.dp
            config = self.config.resolved(dp=dp, device=device.type)
            generators = [device] if device.type == "cuda" else []
            with torch.random.fork_rng(generators):  # the caller's stay as they are
                return _Run(config, device).complete()


def train(config: TrainConfig) -> TrainResult:
    """Call `Trainer(config).run()`: a function that launchers can find by its name.

    Args:
        config: What to train.
    """
    return Trainer(config).run()


def check_config(config: TrainConfig) -> TrainConfig:
    """Check all that can be checked on this machine before any rank is started.

    Reads the data, verifies the checkpoint to resume from, and tries to write to `out`.

    Args:
        config: What a user asked for.

    Returns:
        The configuration with nothing left to choose.

    Raises:
        ValueError: In one line with the remedy.
    """
    num_gpus = torch.cuda.device_count()
    dp = config.dp
    if dp is None:
        dp = num_gpus if num_gpus and config.device != "cpu" else 2
    if config.device == "cuda" and dp > num_gpus:
        raise ValueError(
            f"dp={dp} on device='cuda' needs {dp} GPUs, but torch sees {num_gpus}; "
            f"choose {f'dp={num_gpus} or ' if num_gpus else ''}device='cpu'"
        )
    place = choose_placement(dp, device=config.device)
    config = config.resolved(dp=dp, device=place.device)
    task = load_task(config)
    _require_writable(config.out)
    find_start(config, task.fingerprint)
    return config


class _Run:
    """The state of a run on one rank."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.mesh = make_mesh(dp=config.dp or 1)["dp"]
        self.is_first = self.mesh.get_local_rank() == 0
        self.task = load_task(config)
        torch.manual_seed(config.seed)
        self.dtype = _DTYPES[config.precision or "fp32"]
        model = build_model(config).to(device, self.dtype)
        self.model = DataParallel(model, self.mesh)
        self.optimizer = AdamW(self.model.parameters(), lr=0.0, betas=_BETAS)
        self.mean_loss = self._running_mean()
        self.history: list[tuple[int, float]] = []
        self.first_step_time = 0.0

    def complete(self) -> TrainResult:
        """Resume or start, train, save, evaluate."""
        checkpoint, notes = self._choose_checkpoint()
        first_step = 0
        if checkpoint is not None:
            first_step = self._load(checkpoint)
            notes.append(f"Resumed from {checkpoint}.")
        tracker = Tracker(
            self.config.out / "tensorboard",
            active=self.is_first,
            first_step=first_step,
            steps=self.config.steps,
        )
        with closing(tracker):
            for note in notes:
                tracker.say(note)
            rate = self._train(first_step, tracker)
            loss = self._evaluate()
            tracker.report(self.config.steps, {"loss/validation": loss})
        return self._result(loss, rate, checkpoint)

    def _train(self, first_step: int, tracker: Tracker) -> float:
        """Train to the last step; return the tokens or samples per second."""
        config, start, total = self.config, time.perf_counter(), 0
        report_every = max(1, config.steps // _NUM_REPORTS)
        data = batches(
            self.task.train,
            global_batch_size=config.global_batch_size,
            shard=self.mesh,
            steps=config.steps,
            seed=config.seed,
            start_step=first_step,
        )
        for step, (x, y) in enumerate(data, first_step + 1):
            lr = warmup_cosine(step, peak=config.lr or 0.0, steps=config.steps)
            self._step(x, y, lr)
            if step == first_step + 1 or step % report_every == 0:
                loss, count = self.mean_loss.read()
                total += count
                rate = total / (time.perf_counter() - start)
                self._report(tracker, step, loss, rate, lr)
            if self._is_due(step):
                self._save(step)
        return total / (time.perf_counter() - start)

    def _step(self, x: Tensor, y: Tensor, lr: float) -> None:
        loss = self._loss(x, y)
        # Ranks average their gradients alike, but their shards may differ by a sample.
        share = len(y) / self.config.global_batch_size
        (loss * self.mesh.size() * share).backward()
        clip_grad_norm_(self.model.parameters(), _MAX_GRAD_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.mean_loss.add(loss, y.numel())

    def _running_mean(self) -> RunningMean:
        total = partial(all_reduce, mesh=self.mesh)
        return RunningMean(reduce=total, device=self.device)

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        if x.is_floating_point():
            x = x.to(self.dtype)
        is_mixed = self.config.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_mixed):
            return cross_entropy(self.model(x), y)

    def _report(
        self, tracker: Tracker, step: int, loss: float, rate: float, lr: float
    ) -> None:
        self.first_step_time = self.first_step_time or time.time()
        self.history.append((step, loss))
        unit = f"{self.task.unit}/s"
        scalars = {"loss/train": loss, f"speed/{unit}": rate, "lr": lr}
        tracker.report(step, scalars, **{"loss": f"{loss:.3f}", unit: f"{rate:,.0f}"})

    @torch.no_grad()
    def _evaluate(self) -> float:
        mean = self._running_mean()
        for x, y in batches(
            self.task.validation,
            global_batch_size=_EVALUATION_BATCH,
            shard=self.mesh,
            seed=0,
        ):
            mean.add(self._loss(x, y), y.numel())
        return mean.read()[0]

    def _is_due(self, step: int) -> bool:
        every = self.config.checkpoint_every
        return step == self.config.steps or (every > 0 and step % every == 0)

    def _save(self, step: int) -> None:
        states = all_gather_object(random_state(), self.mesh)
        if self.is_first:
            save_checkpoint(
                self.config.out / "checkpoints",
                step=step,
                model=self.model,
                optimizer=self.optimizer,
                identity=self.config.identity(self.task.fingerprint),
                random_states=states,
            )

    def _load(self, checkpoint: Path) -> int:
        manifest = load_checkpoint(
            checkpoint,
            model=self.model,
            optimizer=self.optimizer,
            rank=self.mesh.get_local_rank(),
        )
        return manifest.step

    def _choose_checkpoint(self) -> tuple[Path | None, list[str]]:
        """Let rank 0 decide where to start from, and tell all; with what to say."""
        decision: tuple[Path | None, list[str]] = (None, [])
        if self.is_first:
            decision = find_start(self.config, self.task.fingerprint)
            decision[1].extend(set_aside(self.config))
        return all_gather_object(decision, self.mesh)[0]

    def _result(
        self, loss: float, rate: float, resumed_from: Path | None
    ) -> TrainResult:
        config, is_gpu = self.config, self.device.type == "cuda"
        model = self.model.module  # only one rank needs to write
        sample = sample_text(model, seed=config.seed) if self.is_first else ""
        return TrainResult(
            model=config.model_name,
            num_parameters=sum(p.numel() for p in self.model.parameters()),
            num_ranks=self.mesh.size(),
            backend=dist.get_backend(),
            device=torch.cuda.get_device_name() if is_gpu else "CPU",
            precision=config.precision or "fp32",
            steps=config.steps,
            resumed_from=None if resumed_from is None else str(resumed_from),
            history=self.history,
            validation_loss=loss,
            baseline_loss=self.task.baseline(),
            unit=self.task.unit,
            units_per_s=rate,
            first_step_time=self.first_step_time,
            sample=sample,
            checkpoint=str(config.out / "checkpoints" / f"step_{config.steps:06d}"),
        )


def _require_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(
            f"out={str(out)!r} cannot be written to ({error.strerror}); choose another "
            "folder"
        ) from None
