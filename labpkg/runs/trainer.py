"""The training run: composed, resumable, the same lines on one rank and on many.

Contract: the state of a run is (weights, optimizer, loss scale, callbacks, step). The
learning rate and the batch are functions of the step, so a run that was killed and
resumed ends with the weights of one that was not, bit by bit on the same layout, and
up to rounding on another one. All numbers that are shown are means over all ranks.

Chapters: foundations/training_loop, planning/device_mesh, runs/checkpointing.
References: Li et al. 2020, PVLDB 13(12), arXiv:2006.15704; Goyal et al. 2017,
arXiv:1706.02677 (what must agree between one rank and many).
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from labpkg.foundations.data import batches
from labpkg.foundations.learning_rates import warmup_cosine
from labpkg.foundations.metrics import RunningMean
from labpkg.processes.mesh import choose_placement, make_mesh
from labpkg.processes.messages import all_gather_object
from labpkg.runs.callbacks import Callback
from labpkg.runs.checkpoint import PendingSave, load_checkpoint, save_checkpoint
from labpkg.runs.checkpoint_lock import claim_folder
from labpkg.runs.composing import compose
from labpkg.runs.config import TrainConfig
from labpkg.runs.faults import Preemption, SkippedSteps
from labpkg.runs.joining import joined
from labpkg.runs.result import TrainResult
from labpkg.runs.start import find_start, set_aside
from labpkg.runs.stragglers import Stragglers
from labpkg.runs.tasks import build_model, load_task, sample_text, tensor_parallel_plan
from labpkg.runs.tracking import Tracker

_NUM_REPORTS = 100
_BETAS = (0.9, 0.95)  # short runs: the second moment must forget faster than usual
_EVALUATION_BATCH = 256


class Trainer:
    """Train a model under any layout; every rank makes one and calls `run`.

    It runs under `labpkg train`, torchrun, `World.run`, or alone as one rank, and sets
    torch's default device only for the time of the call. Checkpoints and TensorBoard
    files go to `config.out`. A new run moves what an earlier one left there to
    `out/previous`; a rank that was restarted resumes by itself.

    Args:
        config: What to train.
        callbacks: What else happens around the steps, the same on every rank.
            `Preemption`, `SkippedSteps` and `Stragglers` come before them, if they are
            not among them.

    Raises:
        ValueError: If two callbacks are of one class.

    Communication: that of `Composition.train_step` for each step.
    """

    def __init__(self, config: TrainConfig, callbacks: Sequence[Callback] = ()) -> None:
        kinds = [type(callback) for callback in callbacks]
        twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
        if twice is not None:
            raise ValueError(
                f"two callbacks are of the class {twice.__name__}, which a checkpoint "
                "could not tell apart; leave one out, or derive a class"
            )
        defaults = (Preemption, SkippedSteps, Stragglers)
        added = [make() for make in defaults if make not in kinds]
        self.config, self.callbacks = config, (*added, *callbacks)

    def run(self) -> TrainResult:
        """Train to the last step, save, evaluate, and return the result on all ranks.

        Raises:
            ValueError: If the configuration does not fit the job, the model, the data
                or the checkpoint.
            OSError: If a checkpoint cannot be saved.
        """
        with joined(self.config.device) as device:
            dp = self.config.dp_of(dist.get_world_size())
            config = self.config.resolved(dp=dp, device=device.type)
            generators = [device] if device.type == "cuda" else []
            with torch.random.fork_rng(generators), ExitStack() as stack:
                # The caller's generators stay as they are.
                for callback in self.callbacks:
                    stack.callback(callback.close)
                return _Run(config, device, self.callbacks).complete()


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
    num_gpus = 0 if config.device == "cpu" else torch.cuda.device_count()
    replica = config.pp * config.tp  # ranks that hold one copy of the model
    dp = config.dp
    if dp is None and num_gpus >= replica:
        dp = config.dp_of(num_gpus)
    elif dp is None:
        dp = 2 if replica == 1 else 1
    num_ranks = dp * replica
    if config.device == "cuda" and num_ranks > num_gpus:
        ranks = f"dp={dp}" if replica == 1 else f"pp * dp * tp = {num_ranks}"
        fewer = f"dp={num_gpus // replica} or " if num_gpus >= replica else ""
        raise ValueError(
            f"{ranks} on device='cuda' needs {num_ranks} GPUs, but torch sees "
            f"{num_gpus}; choose {fewer}device='cpu'"
        )
    place = choose_placement(num_ranks, device=config.device)
    config = config.resolved(dp=dp, device=place.device)
    task = load_task(config)
    _require_writable(config.out)
    find_start(config, task.fingerprint)
    return config


class _Run:
    """The state of a run on one rank; what a callback sees of it is `callbacks.Run`."""

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        callbacks: Sequence[Callback],
    ) -> None:
        self.config, self.device, self.callbacks = config, device, callbacks
        layout = config.layout
        mesh = make_mesh(pp=layout.pp, dp=layout.dp, tp=layout.tp)
        self.shard, self.is_first = mesh["dp"], dist.get_rank() == 0
        self.task = load_task(config)
        self.composition = compose(
            partial(build_model, config),
            layout,
            mesh=mesh,
            plan=tensor_parallel_plan(config),
            precision=config.precision or "fp32",
            seed=config.seed,
            on_meta=True,
            max_grad_norm=config.clip or math.inf,
            betas=_BETAS,
        )
        self.step = 0
        self.history: list[tuple[int, float]] = []
        self.skipped: list[tuple[int, str]] = []
        self.first_step_time: float | None = None
        self.stopped: str | None = None
        self._saved_step: int | None = None
        self._pending: PendingSave | None = None

    # What callbacks use.

    def save(self) -> None:
        """Save the state after the steps done, once."""
        if self._saved_step == self.step:
            return
        self._finish_saving()
        self._saved_step = self.step
        saved = save_checkpoint(
            self.config.out / "checkpoints",
            step=self.step,
            model=self.composition.model,
            optimizer=self.composition.optimizer,
            state=self._state(),
            identity=self.config.identity(self.task.fingerprint),
            keep=self.config.keep or None,
            asynchronous=self.config.async_save,
        )
        if isinstance(saved, Path):
            self._call("after_save", saved)
        else:
            self._pending = saved

    def stop(self, reason: str) -> None:
        """End before the next step."""
        if self.stopped is None:
            self.stopped = reason

    def say(self, line: str) -> None:
        """Print a line on rank 0."""
        self.tracker.say(line)

    # The course of a run.

    def complete(self) -> TrainResult:
        """Resume or start, train, save, evaluate, while nobody else writes there."""
        with ExitStack() as stack:
            checkpoint, notes = self._choose_checkpoint(stack)
            return self._complete(checkpoint, notes)

    def _complete(self, checkpoint: Path | None, notes: list[str]) -> TrainResult:
        if checkpoint is not None:
            self._load(checkpoint)
            notes.append(f"Resumed from {checkpoint}.")
        self.tracker = Tracker(
            self.config.out / "tensorboard",
            active=self.is_first,
            first_step=self.step,
            steps=self.config.steps,
        )
        with closing(self.tracker):
            for note in notes:
                self.say(note)
            self._call("on_start")
            rate = self._train()
            self.save()
            self._finish_saving()
            loss = None if self.stopped is not None else self._evaluate()
            if loss is not None:
                self.tracker.report(self.step, {"loss/validation": loss})
            self._call("on_end")
        return self._result(loss, rate, checkpoint)

    def _train(self) -> float:
        """Train to the last step; return the tokens or samples per second."""
        config, start, total = self.config, time.perf_counter(), 0
        report_every, is_due = max(1, config.steps // _NUM_REPORTS), True
        mean = RunningMean(device="cpu")
        data = batches(
            self.task.train,
            global_batch_size=config.global_batch_size,
            shard=self.shard,
            steps=config.steps,
            seed=config.seed,
            start_step=self.step,
        )
        for x, y in data:
            if self.stopped is None:
                self._call("before_step")
            if self.stopped is not None:  # by now, or by the step before
                break
            lr = warmup_cosine(self.step + 1, peak=config.lr or 0.0, steps=config.steps)
            report = self.composition.train_step(x, y, lr=lr)
            self.step += 1
            total += report.count
            if report.skipped is None:
                mean.add(report.loss, report.count)
            else:
                self.skipped.append((self.step, report.skipped))
            self._call("after_step", report)
            is_due = (
                is_due or self.step % report_every == 0 or self.step == config.steps
            )
            if is_due and report.skipped is None:
                is_due, rate = False, total / (time.perf_counter() - start)
                self._report(mean.read()[0], rate, lr)
            if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                self.save()
        return total / (time.perf_counter() - start)

    def _report(self, loss: float, rate: float, lr: float) -> None:
        if self.first_step_time is None:
            self.first_step_time = time.time()
        self.history.append((self.step, loss))
        unit = f"{self.task.unit}/s"
        scalars = {"loss/train": loss, f"speed/{unit}": rate, "lr": lr}
        shown = {"loss": f"{loss:.3f}", unit: f"{rate:,.0f}"}
        self.tracker.report(self.step, scalars, **shown)

    def _evaluate(self) -> float:
        total, count = 0.0, 0
        for x, y in batches(
            self.task.validation,
            global_batch_size=_EVALUATION_BATCH,
            shard=self.shard,
            seed=0,
        ):
            loss, counted = self.composition.evaluate(x, y)
            total, count = total + loss * counted, count + counted
        return total / count

    def _call(self, moment: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, moment)(self, *args)

    def _finish_saving(self) -> None:
        """Wait until the checkpoint that was begun is complete, and say so."""
        if self._pending is not None:
            path = self._pending.wait()
            self._pending = None
            self._call("after_save", path)

    def _state(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides tensors, by name, as JSON values."""
        scale = self.composition.loss_scale
        return {
            "loss_scale": None if scale is None else scale.state_dict(),
            "skipped_steps": self.skipped,
            "callbacks": {type(c).__name__: c.state_dict() for c in self.callbacks},
        }

    def _load(self, checkpoint: Path) -> None:
        manifest = load_checkpoint(
            checkpoint,
            model=self.composition.model,
            optimizer=self.composition.optimizer,
        )
        self.step = manifest.step
        if checkpoint.resolve().parent == (self.config.out / "checkpoints").resolve():
            self._saved_step = self.step  # else a last step would be saved nowhere here
        state = manifest.state
        if self.composition.loss_scale is not None:
            self.composition.loss_scale.load_state_dict(state["loss_scale"])
        self.skipped = [(step, why) for step, why in state["skipped_steps"]]
        for callback in self.callbacks:
            own = state["callbacks"].get(type(callback).__name__)
            if own is not None:
                callback.load_state_dict(own)

    def _choose_checkpoint(self, claim: ExitStack) -> tuple[Path | None, list[str]]:
        """Let rank 0 decide where to start from, and tell all; with what to say."""
        decision: tuple[Path | None, list[str]] | Exception = (None, [])
        if self.is_first:
            try:
                decision = find_start(self.config, self.task.fingerprint)
                decision[1].extend(set_aside(self.config))
                claim.enter_context(claim_folder(self.config.out / "checkpoints"))
            except (ValueError, OSError) as refusal:
                decision = refusal
        decision = all_gather_object(decision)[0]
        if isinstance(decision, Exception):
            raise decision
        return decision

    def _result(
        self, loss: float | None, rate: float, resumed_from: Path | None
    ) -> TrainResult:
        config, is_gpu = self.config, self.device.type == "cuda"
        sample = ""
        if self.stopped is None and self.task.unit == "tokens":
            generate = self.composition.generate
            sample = sample_text(generate, device=self.device, seed=config.seed)
        return TrainResult(
            model=config.model_name,
            num_parameters=self.composition.num_parameters,
            num_ranks=dist.get_world_size(),
            layout=str(config.layout),
            backend=dist.get_backend(),
            device=torch.cuda.get_device_name() if is_gpu else "CPU",
            precision=config.precision or "fp32",
            steps=self.step,
            skipped_steps=self.skipped,
            stopped=self.stopped,
            resumed_from=None if resumed_from is None else str(resumed_from),
            history=self.history,
            validation_loss=loss,
            baseline_loss=self.task.baseline(),
            unit=self.task.unit,
            units_per_s=rate,
            first_step_time=self.first_step_time,
            sample=sample,
            checkpoint=str(config.out / "checkpoints" / f"step_{self.step:06d}"),
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
