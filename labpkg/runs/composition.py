"""A model under several engines at once, trained by steps that no layout changes.

Contract: a step takes the samples of this data-parallel rank and does what one process
does with all samples: the gradient of the mean over all counted targets, clipped by its
true norm, then one update. All ranks decide together, by numbers that are equal on all
of them: a refusal is raised, and a step is skipped, everywhere or nowhere.

Chapter: planning/device_mesh. Reference: Narayanan et al. 2021, arXiv:2104.04473.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from labpkg.foundations.models import GPTConfig
from labpkg.parallelism.clipping import clip_grad_norm
from labpkg.parallelism.pipeline import Pipeline
from labpkg.planning.layout import Layout
from labpkg.processes.collectives import all_gather, all_reduce
from labpkg.processes.pieces import owner_of
from labpkg.processes.replicas import broadcast_state
from labpkg.processes.trials import remember_buffers
from labpkg.runs.generation import generate_by_windows
from labpkg.runs.loss_scale import LossScale
from labpkg.runs.objective import IGNORED, Objective
from labpkg.runs.samples import agree_on_samples, device_of

_CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("fp32", "bf16", "fp16", "fp64")
"""bf16 and fp16 compute under autocast, with parameters in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What a training step did; the same on every rank.

    Attributes:
        loss: Mean loss over all counted targets of the global batch.
        count: How many targets that were.
        grad_norm: Norm of the whole gradient before clipping.
        skipped: Why nothing was updated, or None.
    """

    loss: float
    count: int
    grad_norm: float
    skipped: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What `compose` makes for a `Composition`.

    Attributes:
        model: The model in its engines.
        optimizer: Trains this rank's part.
        objective: What is minimised.
        reducers: The engines whose reduction of gradients can wait.
        module: What generates text token by token, if it can be called at all.
        windows: Of a GPT that takes whole windows only, otherwise None.
        num_parameters: Of the whole model.
    """

    model: nn.Module
    optimizer: Optimizer
    objective: Objective
    reducers: list[Any]
    module: nn.Module | None
    windows: GPTConfig | None
    num_parameters: int


class Composition:
    """A model on its mesh, with its optimizer; made by `compose`.

    Every method is called on every rank of the mesh. Ranks with the same place on the
    axis `dp` pass the same samples.

    Args:
        layout: How the job is divided.
        mesh: The mesh with the axes pp, dp, tp.
        parts: What was made for them.
        precision: One of `PRECISIONS`.
        max_grad_norm: To which gradients are clipped.
        seed: Of generated text.

    Attributes:
        mesh: The mesh.
        layout: How the job is divided.
        model: What `clip_grad_norm`, `full_state_dict` and checkpoints take.
        optimizer: Trains this rank's part.
        loss_scale: The scale of fp16, otherwise None.
        skip_rules: Called with the loss and the norm of the gradient of each step, on
            every rank with the same numbers, before the update; what one returns is why
            the step is skipped, None lets it pass.
        num_parameters: Of the whole model.
    """

    def __init__(
        self,
        layout: Layout,
        mesh: DeviceMesh,
        parts: Parts,
        *,
        precision: str,
        max_grad_norm: float,
        seed: int,
    ) -> None:
        self.layout, self.mesh, self.model = layout, mesh, parts.model
        self.optimizer, self.num_parameters = parts.optimizer, parts.num_parameters
        self.precision, self.max_grad_norm, self.seed = precision, max_grad_norm, seed
        self.device, self._dp = device_of(mesh), mesh["dp"]
        self._has_buffers = any(True for _ in self.model.buffers())
        self.loss_scale = LossScale() if precision == "fp16" else None
        self.skip_rules: list[Callable[[float, float], str | None]] = []
        self._module, self._windows = parts.module, parts.windows
        self._objective, self._reducers = parts.objective, parts.reducers
        self._pipe = self.model if isinstance(self.model, Pipeline) else None
        self._num_pieces = 1  # of a batch, in a call of the pipeline
        self._reduces_afterwards = False  # or else in the backward pass of the last one
        if self._pipe is not None:
            self._num_pieces = self._pipe.schedule.num_micro_batches
            # Stages sum the gradients of tied parameters after each backward, of ZeRO
            # whole ones, and of several passes those that nobody has reduced yet.
            has_passes = layout.grad_accum_steps > 1
            self._reduces_afterwards = layout.zero in (1, 2) or has_passes

    def train_step(
        self, x: Tensor, y: Tensor, *, lr: float | None = None
    ) -> StepReport:
        """Update the model with one global batch.

        Args:
            x: The samples of this rank of `dp`, such as `batches(shard=mesh["dp"])`
                yields; ranks may have different numbers, also none without a pipeline.
            y: Their targets; int64 ones of -100 do not count.
            lr: The learning rate of this step; None keeps what the groups have.

        Returns:
            The same on every rank. If the norm of the gradient is not finite, or no
            target counts, parameters, buffers, optimizer state and step counts stay as
            they are: no nan gets into the running statistics of a BatchNorm, either.

        Raises:
            ValueError: On every rank, if x and y of some rank do not fit each other or
                the layout.

        Communication: two numbers before and one after; what the engines say, with one
        reduction of the gradients over `dp` (at `zero=3`, one for each pass).
        """
        x, y, count = self._prepare(x, y, in_passes=True)
        if count == 0:
            return StepReport(
                loss=0.0, count=0, grad_norm=0.0, skipped="no target counts"
            )
        restore = self._begin_buffers()
        loss = self._accumulate(x, y, count)
        norm = self._clip()
        skipped = self._judge(loss, norm)
        if skipped is None:
            for group in self.optimizer.param_groups if lr is not None else ():
                group["lr"] = lr
            self.optimizer.step()
        else:
            restore()
        self.optimizer.zero_grad()
        return StepReport(loss=loss, count=count, grad_norm=norm, skipped=skipped)

    def evaluate(self, x: Tensor, y: Tensor) -> tuple[float, int]:
        """Return the mean loss over all counted targets, and how many there are.

        Dropout is off, and no gradients are made.

        Args:
            x: The samples of this rank of `dp`, any number of them.
            y: Their targets.

        Returns:
            The same on every rank; (0.0, 0) if no target counts.

        Raises:
            ValueError: As `train_step`.
        """
        x, y, count = self._prepare(x, y, in_passes=False)
        if count == 0:
            return 0.0, 0
        with torch.no_grad(), self._evaluating(), self._autocast():
            self._objective.weight = 1.0
            if self._pipe is None:
                total = self._objective(self.model(x), y)
            elif y.dtype == torch.int64:
                self._objective.weight = float(self._num_pieces)
                total = self._pipe.evaluate(self._padded(x), self._padded(y, IGNORED))
            else:
                total = self._objective(self._pipe(self._padded(x))[: len(x)], y)
            return self._sum_over_batch(total) / count, count

    def forward(self, x: Tensor) -> Tensor:
        """Return what the whole model makes of `x`, on every rank of a `dp` place.

        Dropout is off, and no gradients are made.

        Args:
            x: The samples of this rank of `dp`, any number of them.

        Returns:
            The output, such as all logits.

        Raises:
            ValueError: As `train_step`.
        """
        x, _, _ = self._prepare(x, None, in_passes=False)
        with torch.no_grad(), self._evaluating(), self._autocast():
            return self._output(x)

    def generate(
        self,
        prompt: Tensor,
        *,
        num_tokens: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue a prompt, one sampled token after the other, alike on all ranks.

        Under a pipeline or sequence parallelism each token costs a forward over a whole
        window; otherwise keys and values are kept, as by `GPT.generate`.

        Args:
            prompt: The same on every rank, at least one token.
            num_tokens: Tokens to add.
            temperature: Divides the logits; 0 takes the most likely token.
            generator: On the device of the model, equally seeded on every rank; None is
                one with the seed of the composition.

        Returns:
            The prompt and its continuation.

        Shape: prompt (B, T) -> (B, T + num_tokens)

        Raises:
            ValueError: As `GPT.generate`; if ranks of pp or tp have other prompts than
                their peers; or if the model has no such method, under a pipeline or
                sequence parallelism if it is no GPT.
        """
        if self._windows is None and not hasattr(self._module, "generate"):
            raise ValueError(
                "the divided model cannot continue prompts: it has no generate(), or "
                "is no GPT and takes whole batches only; call forward instead"
            )
        self._prepare(prompt, None, in_passes=False)
        if generator is None:
            generator = torch.Generator(self.device).manual_seed(self.seed)
        options = {"num_tokens": num_tokens, "temperature": temperature}
        with torch.no_grad(), self._evaluating(), self._autocast():
            if self._windows is not None:
                return generate_by_windows(
                    self._output, self._windows, prompt, generator=generator, **options
                )
            model: Any = self._module
            whole = model.register_forward_hook(lambda *call: self._gathered(call[2]))
            try:
                return model.generate(prompt, generator=generator, **options)
            finally:
                whole.remove()

    def _prepare(
        self, x: Tensor, y: Tensor | None, *, in_passes: bool
    ) -> tuple[Tensor, Any, int]:
        """Check on all ranks; return the tensors as the model wants them, and a count.

        The count is that of the global batch.
        """
        count = agree_on_samples(x, y, self.mesh, self._problem(x, y, in_passes))
        return self._cast(x), None if y is None else self._cast(y), count

    def _problem(self, x: Tensor, y: Tensor | None, in_passes: bool) -> str | None:
        """Say what is wrong with what this rank was given, or return None."""
        if x.device.type != self.device.type:
            return f"x lies on {x.device}, the model on {self.device}; move x there"
        if y is not None and (len(x) != len(y) or y.device != x.device):
            return (
                f"x has {len(x)} samples on {x.device} and y {len(y)} on {y.device}; "
                "pass one target for each sample, in one place"
            )
        pieces = self.layout.grad_accum_steps * self._num_pieces
        if in_passes and self._pipe is not None and (not len(x) or len(x) % pieces):
            return (
                f"{len(x)} samples are not divisible into {self._num_pieces} "
                f"micro-batches in each of {self.layout.grad_accum_steps} passes; "
                f"choose a multiple of {pieces} for each of the dp={self.layout.dp} "
                "ranks"
            )
        return None

    def _cast(self, x: Tensor) -> Tensor:
        dtype = torch.float64 if self.precision == "fp64" else torch.float32
        return x.to(dtype) if x.is_floating_point() else x

    def _begin_buffers(self) -> Callable[[], None]:
        """Let all replicas start alike; return what undoes what forward will change."""
        if not self._has_buffers:
            return lambda: None
        restore = remember_buffers([self.model])
        if self.layout.zero:  # `DataParallel` does it itself
            broadcast_state(self.model.buffers(), self._dp)
        return restore

    def _accumulate(self, x: Tensor, y: Tensor, count: int) -> float:
        """Add up the gradients of all passes; return the mean loss."""
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        num_passes, dp = self.layout.grad_accum_steps, self.layout.dp
        # Engines divide by the ranks, and a pipeline by the micro-batches.
        self._objective.weight = scale * dp * self._num_pieces / count
        passes = list(
            zip(x.tensor_split(num_passes), y.tensor_split(num_passes), strict=True)
        )
        losses = []
        for number, (xs, ys) in enumerate(passes, 1):
            with ExitStack() as contexts:
                if number < num_passes or self._reduces_afterwards:
                    for reducer in self._reducers:
                        contexts.enter_context(reducer.no_sync())
                losses.append(self._pass(xs, ys))
        for reducer in self._reducers if self._reduces_afterwards else ():
            reducer.reduce_gradients()
        return self._sum_over_batch(torch.stack(losses).sum()) / (scale * dp)

    def _pass(self, x: Tensor, y: Tensor) -> Tensor:
        if self._pipe is not None:
            with self._autocast():
                return self._pipe.step(x, y)
        with self._autocast():
            loss = self._objective(self.model(x), y)
        loss.backward()
        return loss.detach()

    def _clip(self) -> float:
        if self.loss_scale is not None:
            owners = (owner_of(p) for p in self.model.parameters())
            gradients = [owner.grad for owner in owners if owner.grad is not None]
            if gradients:  # a stage may be frozen
                torch._foreach_mul_(gradients, 1 / self.loss_scale.value)
        return clip_grad_norm(self.model, self.max_grad_norm).item()

    def _judge(self, loss: float, norm: float) -> str | None:
        """Return why the step must be skipped; let the loss scale learn from it.

        The norm is the same number on every rank, so all come to the same decision.
        """
        overflowed = not math.isfinite(norm)
        reason = f"the norm of the gradient is {norm}" if overflowed else None
        if self.loss_scale is not None:
            if reason is not None:
                reason += f" at a loss scale of {self.loss_scale.value:g}"
            self.loss_scale.update(overflowed=overflowed)
        for rule in self.skip_rules if reason is None else ():
            reason = reason or rule(loss, norm)
        return reason

    def _sum_over_batch(self, loss: Tensor) -> float:
        return all_reduce(loss.detach(), self._dp).item()

    def _padded(self, x: Tensor, fill: int = 0) -> Tensor:
        """Add rows until micro-batches are equal, and there is one at least."""
        rows = -len(x) % self._num_pieces if len(x) else self._num_pieces
        return torch.cat([x, x.new_full((rows, *x.shape[1:]), fill)])

    def _output(self, x: Tensor) -> Tensor:
        if self._pipe is None:
            return self._gathered(self.model(x))
        return self._gathered(self._pipe(self._padded(x))[: len(x)])

    def _gathered(self, output: Tensor) -> Tensor:
        axis = self._objective.vocabulary
        return output if axis is None else all_gather(output, axis, dim=-1)

    def _autocast(self) -> AbstractContextManager[object]:
        cast = _CASTS.get(self.precision)
        return torch.autocast(self.device.type, cast, enabled=cast is not None)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        before = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(before)
