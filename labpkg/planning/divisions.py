"""All ways to divide a job: what the planner searches.

A family of jobs shares its axes and its batch; its members differ in recomputation,
ZeRO and schedule. Families are few, so that a search can order them by a bound and
never make the members of most.

Letters: P ranks of a pipeline, M micro-batches, v stages of each rank. Standard library
only. Chapter: planning/planner.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from labpkg.planning.configuration import PRECISIONS, Configuration
from labpkg.planning.hardware import Hardware
from labpkg.planning.memory import usable_bytes
from labpkg.planning.neighbours import schedule_choices
from labpkg.planning.shapes import ModelShape, is_size

_SIZES = (
    *("dp", "tp", "pp", "cp", "micro_batch_size", "grad_accum_steps"),
    "num_virtual_stages",
)
_NAMED = ("zero", "recompute", "schedule", "sequence_parallel", "fused_loss")
CHOICES = (*_SIZES, *_NAMED)
"""Fields of `Configuration` that a planner chooses, unless they are decided."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Say what is to be divided, and what is decided already.

    Args:
        model: Sizes.
        hardware: The machine.
        world_size: GPUs: whole nodes, or a part of one.
        tokens_per_step: Of all ranks.
        precision: Of the matrix products.
        max_cp: The most ranks that may share a sequence.
        spare_memory: Share of the usable memory that stays free.
        fixed: Fields of `Configuration` that are decided.

    Raises:
        ValueError: If a number is below 1, is no multiple, or a name is unknown.
    """

    model: ModelShape
    hardware: Hardware
    world_size: int
    tokens_per_step: int
    precision: str
    max_cp: int
    spare_memory: float
    fixed: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in ("world_size", "tokens_per_step", "max_cp"):
            check_size(name, getattr(self, name))
        if not 0 <= self.spare_memory < 1:
            raise ValueError(
                f"spare_memory={self.spare_memory} must be a share from 0 to below 1; "
                "choose 0.1"
            )
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision={self.precision!r} is unknown; choose one of "
                f"{', '.join(PRECISIONS)}"
            )
        self._check_fixed()
        self._check_multiples()

    def _check_fixed(self) -> None:
        for name, value in self.fixed.items():
            if name not in CHOICES:
                raise ValueError(
                    f"{name}={value!r} cannot be fixed; the planner chooses "
                    f"{', '.join(CHOICES)}"
                )
            if name in _SIZES:
                check_size(name, value)
        for name in ("sequence_parallel", "fused_loss"):
            chosen = self.fixed.get(name)
            if chosen is not None and not isinstance(chosen, bool):
                raise ValueError(f"{name}={chosen!r} must be True or False; choose one")
        names = {name: self.fixed[name] for name in _NAMED if name in self.fixed}
        Configuration(model=self.model, gpus_per_node=1, **names)  # knows which exist

    def _check_multiples(self) -> None:
        length, per_node = self.model.sequence_length, self.hardware.gpus_per_node
        for name, value, what, size in (
            ("tokens_per_step", self.tokens_per_step, "sequence_length", length),
            ("world_size", self.world_size, "gpus_per_node", per_node),
        ):
            below = value - value % size
            if below == value or (name == "world_size" and not below):
                continue  # one node may be used in part
            near = f"{below} or {below + size}" if below else str(size)
            raise ValueError(
                f"{name}={value} is not a multiple of {what}={size}; choose {near}"
            )

    @property
    def most_bytes(self) -> float:
        """What the fullest rank may allocate."""
        return usable_bytes(self.hardware) * (1 - self.spare_memory)

    @property
    def sequences(self) -> int:
        """Sequences of a step."""
        return self.tokens_per_step // self.model.sequence_length

    def families(self) -> Iterator[list[dict[str, Any]]]:
        """Yield every family, as choices for `job`; the first one works least.

        The work of a job is what its ranks do for a micro-batch, bubbles apart. It is
        least without recomputation, with divided gradients and undivided backwards.
        """
        for axes in self._axes():
            rest = self._rest(axes)
            passes = self.sequences // axes["dp"]
            for size in self._open("micro_batch_size", _divisors(passes)):
                batch = {"micro_batch_size": size, "grad_accum_steps": passes // size}
                if rest and self._allows(batch):
                    yield [{**axes, **batch, **choice} for choice in rest]

    def job(self, choices: Mapping[str, Any]) -> Configuration:
        """Return the job of some choices.

        Args:
            choices: Fields of `Configuration`, as `families` yields them.
        """
        per_node = min(self.hardware.gpus_per_node, self.world_size)
        return Configuration(
            model=self.model,
            nodes=self.world_size // per_node,
            gpus_per_node=per_node,
            precision=self.precision,
            sequence_parallel=self.fixed.get("sequence_parallel"),
            fused_loss=self.fixed.get("fused_loss", False),
            **choices,
        )

    def jobs(self) -> Iterator[Configuration]:
        """Yield every job."""
        for family in self.families():
            yield from map(self.job, family)

    def _axes(self) -> Iterator[dict[str, int]]:
        """Yield the sizes of axes that divide the model and the batch."""
        model = self.model
        for tp in self._open("tp", _divisors(self.world_size)):
            if model.num_heads % tp or model.ffn_width % tp:
                continue
            for pp in self._open("pp", _divisors(self.world_size // tp)):
                if pp > model.num_layers:
                    continue
                for cp in self._open("cp", _divisors(self.world_size // (tp * pp))):
                    dp = self.world_size // (tp * pp * cp)
                    if self._allows({"dp": dp}) and self._divides(dp, tp, cp):
                        yield {"dp": dp, "tp": tp, "pp": pp, "cp": cp}

    def _divides(self, dp: int, tp: int, cp: int) -> bool:
        if cp > self.max_cp and "cp" not in self.fixed:
            return False
        piece = cp * tp if self.fixed.get("sequence_parallel", tp > 1) else cp
        return self.sequences % dp == 0 and self.model.sequence_length % piece == 0

    def _rest(self, axes: Mapping[str, int]) -> list[dict[str, Any]]:
        sharers = axes["dp"] * axes["cp"]  # of the parameters
        zero = self._open("zero", (3, 2, 1, 0) if sharers > 1 else (0,))
        # Attention keeps no scores, so selective recomputation would save nothing.
        wanted = self.fixed.get("recompute")
        how = ("none", "full") if wanted is None else (wanted,)
        return [
            {"zero": stage, "recompute": recompute, **schedule}
            for recompute, stage, schedule in product(
                how, zero, self._schedules(axes["pp"])
            )
        ]

    def _schedules(self, pp: int) -> list[dict[str, Any]]:
        named, virtual = map(self.fixed.get, ("schedule", "num_virtual_stages"))
        if pp > 1 and (named == "gpipe" or (named and virtual)):
            return [{"schedule": named, "num_virtual_stages": virtual or 1}]
        choices = schedule_choices(self.model.num_layers, pp)
        return [choice for choice in choices if self._allows(choice)]

    def _allows(self, choice: Mapping[str, Any]) -> bool:
        return all(self.fixed.get(name, v) == v for name, v in choice.items())

    def _open(self, name: str, values: Iterable[int]) -> list[int]:
        return [value for value in values if self._allows({name: value})]


def check_size(name: str, value: object) -> None:
    """Refuse what is no whole number above 0.

    Args:
        name: Of the value.
        value: Whatever was given.

    Raises:
        ValueError: If it is none.
    """
    if not is_size(value) or isinstance(value, bool):
        raise ValueError(
            f"{name}={value!r} must be an integer of at least 1; choose one"
        )


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
