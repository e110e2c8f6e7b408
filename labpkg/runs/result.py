"""What a training run ended with, as a value and as a line.

Chapter: foundations/training_loop.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a run ended with.

    Attributes:
        model: Name of the model.
        num_parameters: Its parameters.
        num_ranks: Ranks of the job.
        layout: How they divided it, such as "pp2 dp2 tp2 zero1 1f1b".
        backend: Backend of the process group.
        device: Name of the device of rank 0.
        precision: fp32, bf16, fp16 or fp64.
        steps: Steps done in all.
        skipped_steps: Steps among them that all ranks have left out, and why.
        stopped: Why the run ended before its last step, or None.
        resumed_from: The checkpoint that this run started from, or None.
        history: (step, training loss) pairs of this run; a loss is the mean since the
            pair before, in nats.
        validation_loss: In nats per token or sample; None if the run was stopped.
        baseline_loss: The same for the counting model that a run must beat.
        unit: "tokens" or "samples".
        units_per_s: Throughput of all ranks, in units per second.
        first_step_time: When the first step was done, in seconds since the epoch; None
            if no step was done.
        sample: Generated text; empty for a model that writes none.
        checkpoint: The last checkpoint.
    """

    model: str
    num_parameters: int
    num_ranks: int
    layout: str
    backend: str
    device: str
    precision: str
    steps: int
    skipped_steps: list[tuple[int, str]]
    stopped: str | None
    resumed_from: str | None
    history: list[tuple[int, float]]
    validation_loss: float | None
    baseline_loss: float
    unit: str
    units_per_s: float
    first_step_time: float | None
    sample: str
    checkpoint: str

    def __str__(self) -> str:
        text = f"\nSample:\n{self.sample}\n\n" if self.sample else ""
        return (
            f"{text}{self._outcome()}\nRan {self.model} "
            f"({self.num_parameters:,} parameters) on {self.num_ranks} ranks"
            f"{f' ({self.layout})' * (self.num_ranks > 1)}, {self.backend}, "
            f"{self.device}, {self.precision}: {self.units_per_s:,.0f} {self.unit}/s."
        )

    def _outcome(self) -> str:
        skipped = ""
        if self.skipped_steps:
            step, why = self.skipped_steps[-1]
            skipped = f" Skipped {len(self.skipped_steps)} steps, last {step}: {why}."
        if self.validation_loss is None:
            return f"Stopped after {self.steps} steps: {self.stopped}.{skipped}"
        beaten = self.validation_loss < self.baseline_loss
        return (
            f"Validation loss {self.validation_loss:.3f} nats per {self.unit[:-1]}; "
            f"baseline by counting {self.baseline_loss:.3f} "
            f"({'beaten' if beaten else 'not beaten'}).{skipped}"
        )
