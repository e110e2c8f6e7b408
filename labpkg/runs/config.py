"""What a training run is: one frozen value, checked before any process starts.

Contract: importing this module imports no torch, so a command line answers a wrong
option in a tenth of a second. `resolved` fills what depends on the machine; `identity`
is the part that a checkpoint must agree with: two runs of one identity compute the
same weights but for rounding, on however many ranks and under whatever layout.

Chapters: planning/device_mesh, runs/checkpointing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from labpkg.planning.layout import Layout

_DEVICES = ("cpu", "cuda")
_PRECISIONS = ("fp32", "bf16", "fp16", "fp64")
_DATA = ("digits", "stdlib")


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A model by name.

    Attributes:
        lr: Its usual peak learning rate.
        sizes: Arguments of `GPTConfig`; empty for the MLP of the digits.
    """

    lr: float
    sizes: Mapping[str, Any] = field(default_factory=dict)


MODELS: Mapping[str, Preset] = MappingProxyType(
    {
        "gpt-1m": Preset(
            lr=4e-3,
            sizes={
                "num_layers": 4,
                "width": 128,
                "num_heads": 4,
                "sequence_length": 128,
            },
        ),
        "gpt-10m": Preset(
            lr=1e-3,
            sizes={
                "num_layers": 6,
                "width": 384,
                "num_heads": 6,
                "sequence_length": 256,
            },
        ),
        "mlp": Preset(lr=1e-2),
    }
)
"""The models that a run can name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Describe a training run.

    Args:
        pp: Ranks that hold consecutive stages of the model.
        dp: Data-parallel ranks; None takes all GPUs, else 2 processes on the CPU.
        tp: Ranks that share each layer.
        zero: What the dp ranks divide: 0 nothing, 1 the optimizer state, 2 gradients
            too, 3 parameters too.
        schedule: 1f1b, gpipe, interleaved, zb-h1 or zb-v; None is 1f1b if pp > 1.
        num_micro_batches: Pieces of a batch in the pipeline; None is 2 pp.
        num_virtual_stages: Stages of each rank under the schedule interleaved.
        sequence_parallel: Also divide what lies between the layers that tp cuts.
        grad_accum: Passes whose gradients are added up before a step.
        recompute: Keep no activations inside a block; compute them again for backward.
        steps: Optimizer steps; the learning rate falls towards the last one.
        global_batch_size: Samples of one step, over all ranks.
        model: gpt-1m, gpt-10m or mlp; None chooses by the data.
        data: stdlib (source of Python's library), digits, or a file of yours.
        lr: Peak learning rate of AdamW; None takes the usual one of the model.
        clip: Largest norm of the gradient, over all ranks; None clips nothing.
        precision: fp32, bf16 or fp16 (autocast), or fp64; None is bf16 on a GPU, else
            fp32.
        device: cpu or cuda; None takes GPUs where there are enough.
        seed: Chooses the initial weights, the order of the data and the sample.
        out: Folder for checkpoints and TensorBoard files.
        checkpoint_every: Steps between checkpoints; 0 saves after the last step only.
        keep: The newest checkpoints stay; 0 keeps all.
        async_save: Write checkpoints while the training goes on.
        resume: A checkpoint folder, "newest" for the newest valid one of `out`, or
            "auto" for the same, if there is one.

    Raises:
        ValueError: If a value is unknown, out of range, or does not fit another one.
    """

    pp: int = 1
    dp: int | None = None
    tp: int = 1
    zero: int = 0
    schedule: str | None = None
    num_micro_batches: int | None = None
    num_virtual_stages: int = 2
    sequence_parallel: bool = False
    grad_accum: int = 1
    recompute: bool = False
    steps: int = 600
    global_batch_size: int = 8
    model: str | None = None
    data: str = "stdlib"
    lr: float | None = None
    clip: float | None = 1.0
    precision: str | None = None
    device: str | None = None
    seed: int = 0
    out: Path = Path("runs_out/train")
    checkpoint_every: int = 100
    keep: int = 3
    async_save: bool = False
    resume: str | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("dp", 1),
            ("grad_accum", 1),
            ("steps", 1),
            ("global_batch_size", 1),
            ("seed", 0),
            ("checkpoint_every", 0),
            ("keep", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} is too small; choose {least} or more")
        _require_known("model", self.model, MODELS)
        _require_known("precision", self.precision, _PRECISIONS)
        _require_known("device", self.device, _DEVICES)
        for name, example in (("lr", "1e-3"), ("clip", "1.0")):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(
                    f"{name}={value} must be a positive number; choose e.g. {example}"
                )
        self._check_layout()
        self._check_data()

    def _check_layout(self) -> None:
        layout = self.layout
        if self.dp is not None and self.global_batch_size < self.dp:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} leaves some of the dp="
                f"{self.dp} ranks without a sample; choose {self.dp} or more"
            )
        parts = layout.dp * layout.grad_accum_steps
        if layout.is_pipeline:
            parts *= layout.make_schedule().num_micro_batches
        if layout.is_pipeline and self.global_batch_size % parts:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not divisible by dp * "
                f"grad_accum * num_micro_batches = {parts}, and a pipeline takes equal "
                f"micro-batches; choose a multiple of {parts}"
            )
        if self.global_batch_size < parts:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} leaves some of the dp * "
                f"grad_accum = {parts} passes without a sample; choose {parts} or more"
            )

    def _check_data(self) -> None:
        if self.data not in _DATA and not os.path.isfile(self.data):
            raise ValueError(
                f"data={self.data!r} is neither {' nor '.join(_DATA)} nor a file that "
                "exists; choose one of them"
            )
        if (self.data == "digits") != (self.model_name == "mlp"):
            wanted = "mlp" if self.data == "digits" else "gpt-1m"
            raise ValueError(
                f"model={self.model!r} cannot read data={self.data!r}; choose "
                f"model={wanted!r}"
            )

    @property
    def model_name(self) -> str:
        """The name of the model, chosen by the data if none was given."""
        return self.model or ("mlp" if self.data == "digits" else "gpt-1m")

    @property
    def layout(self) -> Layout:
        """How the ranks divide the work; one dp rank while `dp` is None.

        Raises:
            ValueError: If the numbers are impossible.
        """
        return Layout(
            pp=self.pp,
            dp=self.dp or 1,
            tp=self.tp,
            zero=self.zero,
            schedule=self.schedule,
            num_micro_batches=self.num_micro_batches,
            num_virtual_stages=self.num_virtual_stages,
            sequence_parallel=self.sequence_parallel,
            grad_accum_steps=self.grad_accum,
            recompute=self.recompute,
        )

    def dp_of(self, num_ranks: int) -> int:
        """Return how many ranks share a batch in a job.

        Args:
            num_ranks: Ranks of the job.

        Raises:
            ValueError: If the axes do not multiply to the number of ranks.
        """
        replica = self.pp * self.tp
        dp = num_ranks // replica if self.dp is None else self.dp
        if replica * dp != num_ranks:
            axes = f"pp={self.pp} * dp={dp} * tp={self.tp}"
            raise ValueError(
                f"{axes} = {replica * dp}, but there are {num_ranks} ranks; choose "
                f"factors whose product is {num_ranks}, or that many ranks"
            )
        return dp

    def resolved(self, *, dp: int, device: str) -> TrainConfig:
        """Return the same run with nothing left to choose.

        Args:
            dp: Ranks of this job.
            device: Where they run, "cpu" or "cuda".

        Raises:
            ValueError: If the batch is too small for the ranks.
        """
        return replace(
            self,
            dp=dp,
            device=device,
            model=self.model_name,
            lr=MODELS[self.model_name].lr if self.lr is None else self.lr,
            precision=self.precision or ("bf16" if device == "cuda" else "fp32"),
        )

    def identity(self, fingerprint: str) -> dict[str, Any]:
        """Return what decides the weights of a resolved run, but for rounding.

        The layout is not part of it: a run may resume on other ranks, cut otherwise.

        Args:
            fingerprint: A checksum of the training data.
        """
        name = self.data if self.data in _DATA else "file"
        return {
            "model": self.model,
            "data": f"{name}:{fingerprint}",
            "steps": self.steps,
            "global_batch_size": self.global_batch_size,
            "lr": self.lr,
            "clip": self.clip,
            "precision": self.precision,
            "seed": self.seed,
        }


def first_difference(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """Say in which entry two identities differ first, or None.

    Args:
        saved: The identity that a checkpoint holds.
        own: The identity of the run that wants to resume.
    """
    for name in dict.fromkeys([*own, *saved]):
        if saved.get(name) != own.get(name):
            return f"{name} is {saved.get(name)!r} there and {own.get(name)!r} here"
    return None


def _require_known(name: str, value: str | None, known: Any) -> None:
    if value is not None and value not in known:
        raise ValueError(f"{name}={value!r} is unknown; choose {' or '.join(known)}")
