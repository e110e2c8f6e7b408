"""Layouts: how one training job is divided over its ranks, as a value.

A layout names the size of every axis and what happens on it. It holds no mesh and no
model, so a command line, a planner and a checkpoint can all speak of it. Everything
that can be refused by numbers alone is refused here.

Chapter: planning/device_mesh. References: Narayanan et al. 2021, arXiv:2104.04473 (the
order of axes); Rajbhandari et al. 2020, arXiv:1910.02054 (the stages of ZeRO).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from labpkg.planning.actions import Schedule
from labpkg.planning.schedules import gpipe, interleaved, one_f_one_b, zero_bubble

SCHEDULES: Mapping[str, Callable[[int, int, int], Schedule]] = MappingProxyType(
    {
        "gpipe": lambda P, M, v: gpipe(P, M),
        "1f1b": lambda P, M, v: one_f_one_b(P, M),
        "interleaved": lambda P, M, v: interleaved(P, M, num_virtual_stages=v),
        "zb-h1": lambda P, M, v: zero_bubble(P, M),
        "zb-v": lambda P, M, v: zero_bubble(P, M, variant="v"),
    }
)
"""Schedules that a layout can name: (ranks, micro-batches, stages of a rank) -> one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Say how a job is divided: pp cuts the model, tp its layers, dp the batch.

    Args:
        pp: Ranks that hold consecutive stages of the model.
        dp: Ranks that share a batch.
        tp: Ranks that share each layer.
        zero: What the dp ranks divide: 0 nothing, 1 the optimizer state, 2 gradients
            too, 3 parameters too.
        schedule: Order of the pipeline's actions, a key of `SCHEDULES`; None is 1f1b if
            `pp` is above 1, and no pipeline otherwise.
        num_micro_batches: Into how many pieces a pipeline cuts what a rank is given;
            None is 2 pp.
        num_virtual_stages: Stages of each rank under `schedule="interleaved"`.
        sequence_parallel: Also divide what lies between the layers that tp cuts.
        grad_accum_steps: Passes whose gradients are added up before a step.
        recompute: Keep no activations inside a block; compute them again for backward.
            Running statistics, such as those of BatchNorm, then count samples twice.

    Raises:
        ValueError: If a size is below 1, a name is unknown, or an option needs an
            engine that is not there.
    """

    pp: int = 1
    dp: int = 1
    tp: int = 1
    zero: int = 0
    schedule: str | None = None
    num_micro_batches: int | None = None
    num_virtual_stages: int = 2
    sequence_parallel: bool = False
    grad_accum_steps: int = 1
    recompute: bool = False

    def __post_init__(self) -> None:
        for name in ("pp", "dp", "tp", "num_virtual_stages", "grad_accum_steps"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} is too small; choose 1 or more"
                )
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"zero={self.zero} is no stage of ZeRO; choose 0, 1, 2, 3")
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule={self.schedule!r} is unknown; choose {', '.join(SCHEDULES)}"
            )
        micro_batches = self.num_micro_batches
        if micro_batches is not None and micro_batches < 1:
            raise ValueError(
                f"num_micro_batches={micro_batches} is too small; choose 1 or more"
            )
        if micro_batches is not None and not self.is_pipeline:
            raise ValueError(
                f"num_micro_batches={micro_batches} needs a pipeline, but pp=1 and no "
                f"schedule is named; choose grad_accum_steps={micro_batches} instead"
            )
        if self.sequence_parallel and self.tp == 1:
            raise ValueError(
                "sequence_parallel=True divides what lies between the layers that tp "
                "cuts, but tp=1 cuts none; choose tp=2 or more, or leave it out"
            )

    @property
    def world_size(self) -> int:
        """Ranks of the job: pp dp tp."""
        return self.pp * self.dp * self.tp

    @property
    def is_pipeline(self) -> bool:
        """Whether the model is cut into stages."""
        return self.pp > 1 or self.schedule is not None

    def make_schedule(self) -> Schedule:
        """Return the pipeline's schedule.

        Raises:
            ValueError: If the schedule cannot be had with these numbers.
        """
        micro_batches = self.num_micro_batches or 2 * self.pp
        make = SCHEDULES[self.schedule or "1f1b"]
        return make(self.pp, micro_batches, self.num_virtual_stages)

    def __str__(self) -> str:
        """Return a short name, such as `pp2 dp2 tp2 zero1 zb-h1`."""
        axes = [f"{a}{getattr(self, a)}" for a in ("pp", "dp", "tp")]
        words = [name for name in axes if not name.endswith("p1")] or ["one rank"]
        words += [f"zero{self.zero}"] * (self.zero > 0)
        words += [self.schedule or "1f1b"] * self.is_pipeline
        words += ["sequence"] * self.sequence_parallel
        words += [f"accumulate {self.grad_accum_steps}"] * (self.grad_accum_steps > 1)
        words += ["recompute"] * self.recompute
        return " ".join(words)
