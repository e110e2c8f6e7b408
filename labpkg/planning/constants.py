"""The fitted numbers of the planner: few, named, each with a meaning and a range.

Everything else that a prediction needs is arithmetic, or a number of the hardware with
its source. `scripts/calibrate.py` fits the defaults of the first group on published
training runs and writes how far held-out predictions are from measurements. No number
belongs to a model, a row or a number of nodes.

Standard library only. Chapter: planning/planner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import NamedTuple


class Range(NamedTuple):
    """What a fitted number means, and between which values it is plausible.

    Attributes:
        meaning: What it stands for.
        unit: Its unit; `1` for a ratio.
        low: The smallest plausible value.
        high: The largest.
    """

    meaning: str
    unit: str
    low: float
    high: float


def _fitted(value: float, meaning: str, unit: str, low: float, high: float) -> float:
    return field(default=value, metadata={"range": Range(meaning, unit, low, high)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """Hold the fitted numbers of the time and of the memory model.

    `constant_ranges` says what each means, with its unit and its plausible range.

    Raises:
        ValueError: If a number is outside its plausible range.
    """

    # Time
    sustained_clock: float = _fitted(
        0.8,
        "rate of matrix products that power-limited GPUs keep in long runs, as a share "
        "of their best large product; the others keep all of it",
        "1",
        0.7,
        1.0,
    )
    attention_efficiency: float = _fitted(
        0.62,
        "rate of attention, all T x T scores counted, as a share of that of matrix "
        "products",
        "1",
        0.2,
        1.0,
    )
    activation_passes: float = _fitted(
        10.0,
        "how often forward and backward together read or write what lies between two "
        "matrix products: norms, activation functions, residual sums, casts, loss",
        "1",
        4.0,
        30.0,
    )
    launch_s: float = _fitted(
        0.0022,
        "host time to launch forward and backward of one layer; twice that if the "
        "layer is divided",
        "s",
        5e-4,
        5e-3,
    )
    optimizer_passes: float = _fitted(
        11.0,
        "how often step, clipping and bookkeeping read or write the float32 numbers of "
        "a parameter: gradient, master copy and both moments",
        "1",
        2.0,
        15.0,
    )
    overlap: float = _fitted(
        0.0,
        "share of the last backward that hides the gradients' traffic of ZeRO 0 and 1",
        "1",
        0.0,
        1.0,
    )
    pipeline_wait: float = _fitted(
        6.2,
        "network latencies for which the host waits with each call of a "
        "tensor-parallel group, per rank of it, while messages of a pipeline cross the "
        "network",
        "1",
        0.0,
        20.0,
    )
    network_share: float = _fitted(
        0.5,
        "bandwidth between nodes that the reduce-scatters and all-gathers of ZeRO "
        "reach, as a share of what one of large messages reaches alone",
        "1",
        0.2,
        1.0,
    )

    # Memory
    activation_copies: float = _fitted(
        1.11,
        "bytes that a layer keeps, as a multiple of what backward needs: copies and "
        "casts of kernels",
        "1",
        1.0,
        1.6,
    )
    gathered_inputs: float = _fitted(
        0.3,
        "share of the inputs gathered under sequence parallelism that stays for "
        "backward instead of being gathered again",
        "1",
        0.0,
        1.0,
    )
    logit_copies: float = _fitted(
        3.6,
        "float32 tensors of the logits that a loss has at once, with its gradient, if "
        "no kernel fuses it",
        "1",
        1.0,
        5.0,
    )
    reserved_memory: float = _fitted(
        0.05,
        "share of a GPU's memory that tensors cannot fill: context, communication, "
        "holes",
        "1",
        0.0,
        0.15,
    )

    def __post_init__(self) -> None:
        for name, known in constant_ranges().items():
            value = getattr(self, name)
            if not (math.isfinite(value) and known.low <= value <= known.high):
                raise ValueError(
                    f"{name}={value} must be between {known.low} and {known.high} "
                    f"({known.unit}): {known.meaning}"
                )


def constant_ranges() -> dict[str, Range]:
    """Return for each fitted number its meaning, unit and plausible range."""
    return {entry.name: entry.metadata["range"] for entry in fields(Constants)}


FITTED = Constants()
"""The fitted numbers; `scripts/calibrate.py` says how they were found."""
