"""A training job as the planner sees it: model, machine, division, batch.

A `Configuration` holds what decides memory and time. It is wider than a `Layout`, which
says what the engines of this library run: it also describes context parallelism,
selective recomputation and clusters that nobody here has, so that published runs can be
predicted. Everything that can be refused by numbers alone is refused here.

Letters: L layers, N heads, K key/value heads, T sequence length. Standard library only.

Chapters: planning/memory, planning/planner. References: Narayanan et al. 2021,
arXiv:2104.04473; Korthikanti et al. 2022, arXiv:2205.05198 (recomputation).
"""

from __future__ import annotations

from dataclasses import dataclass

from labpkg.planning.layout import SCHEDULES
from labpkg.planning.shapes import ModelShape, is_size

RECOMPUTE = ("none", "selective", "full")
PRECISIONS = ("bf16", "fp16", "fp32")

_AT_LEAST_ONE = (
    *("nodes", "gpus_per_node", "dp", "tp", "pp", "cp"),
    *("micro_batch_size", "grad_accum_steps", "num_virtual_stages"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Configuration:
    """Say what is trained, on how many GPUs, and how the work is divided.

    Args:
        model: Sizes of the model, with the length T of its sequences.
        nodes: Machines.
        gpus_per_node: GPUs in each; ranks of tp are neighbours, then cp, dp, pp.
        dp: Ranks that share a batch.
        tp: Ranks that share each layer; divides the heads and the hidden width of the
            feed-forward part. With more ranks than key/value heads these are copied.
        pp: Ranks that hold consecutive layers.
        cp: Ranks that share each sequence.
        micro_batch_size: Sequences in one pass of a rank.
        grad_accum_steps: Passes of a rank in a step; in a pipeline its micro-batches.
        num_virtual_stages: Stages of each rank under the schedule interleaved; zb-v
            always has two, the others one.
        sequence_parallel: Divide what lies between the layers that tp cuts; None is yes
            if tp is above 1.
        zero: What dp (and cp) ranks divide: 0 nothing, 1 the optimizer state, 2
            gradients too, 3 parameters too (FSDP).
        recompute: What backward computes again: none, selective (attention scores; free
            with flash attention), full (all but the input of each layer).
        precision: Of the matrix products: bf16, fp16 or fp32.
        schedule: Order of the pipeline's actions, a key of `SCHEDULES`.
        fused_loss: Whether one kernel makes loss and gradient out of the logits, with
            no copies of them beside.

    Raises:
        ValueError: If a size is no whole number above 0, axes do not multiply to the
            number of GPUs, a size does not divide, a name is unknown, a schedule has
            no such virtual stages, or a pipeline has more stages than layers and ends.
    """

    model: ModelShape
    nodes: int = 1
    gpus_per_node: int = 8
    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    micro_batch_size: int = 1
    grad_accum_steps: int = 1
    num_virtual_stages: int = 1
    sequence_parallel: bool | None = None
    zero: int = 0
    recompute: str = "none"
    precision: str = "bf16"
    schedule: str = "1f1b"
    fused_loss: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.model, ModelShape):
            raise ValueError(
                f"model={self.model!r} must be a ModelShape; make one from sizes, or "
                "look it up with find_model"
            )
        for name in _AT_LEAST_ONE:
            if not is_size(getattr(self, name)):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be a whole number above 0; "
                    "choose one"
                )
        self._check_names()
        self._check_axes()
        self._check_stages()

    def _check_names(self) -> None:
        for name, known in (
            ("recompute", RECOMPUTE),
            ("precision", PRECISIONS),
            ("schedule", tuple(SCHEDULES)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; choose one of "
                    f"{', '.join(known)}"
                )
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(
                f"zero={self.zero!r} is unknown; choose 0, 1, 2 or 3 (FSDP)"
            )

    def _check_axes(self) -> None:
        axes = self.dp * self.tp * self.pp * self.cp
        if axes != self.world_size:
            raise ValueError(
                f"dp={self.dp} x tp={self.tp} x pp={self.pp} x cp={self.cp} = {axes} "
                f"ranks, but nodes={self.nodes} x gpus_per_node={self.gpus_per_node} = "
                f"{self.world_size} GPUs; make the products equal"
            )
        model = self.model
        for what, size, by, n in (
            ("num_heads", model.num_heads, "tp", self.tp),
            ("ffn_width", model.ffn_width, "tp", self.tp),
            ("sequence_length", model.sequence_length, "cp", self.cp),
        ):
            if size % n:
                raise ValueError(
                    f"{what}={size} is not divisible by {by}={n}; choose a divisor"
                )

    def _check_stages(self) -> None:
        v, schedule = self.num_virtual_stages, self.schedule
        fixed = 2 if schedule == "zb-v" else 1
        if schedule != "interleaved" and v > fixed:
            raise ValueError(
                f"schedule={schedule!r} has {fixed} stages on each rank, but "
                f"num_virtual_stages={v}; choose {fixed}, or schedule='interleaved'"
            )
        v = max(v, fixed)
        # Embedding, final norm and head may have stages of their own.
        if self.pp * v > self.model.num_layers + 5:
            raise ValueError(
                f"pp={self.pp} x num_virtual_stages={v} stages are more than the "
                f"{self.model.num_layers} layers and both ends of the model can fill; "
                "choose fewer"
            )

    @property
    def world_size(self) -> int:
        """GPUs of the job."""
        return self.nodes * self.gpus_per_node

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimizer step, over all ranks."""
        return self.dp * self.micro_batch_size * self.grad_accum_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all ranks."""
        return self.sequences_per_step * self.model.sequence_length

    @property
    def cuts_sequence(self) -> bool:
        """Whether activations between the layers of tp are divided, too."""
        chosen = self.sequence_parallel
        return self.tp > 1 if chosen is None else chosen
