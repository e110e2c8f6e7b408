"""The loss scale of float16: small gradients survive, and large ones are found out.

float16 has no number between 0 and 6e-8, where many gradients lie. Multiplied by a
large power of two they keep their bits; what then overflows makes the norm infinite,
the step is skipped, and the scale is halved. After many good steps it is doubled again.

Chapter: foundations/precision. Reference: Micikevicius et al. 2018, Mixed Precision
Training, ICLR, arXiv:1710.03740.
"""

from __future__ import annotations

import math
from typing import Any

_STATE = ("value", "num_good_steps")


class LossScale:
    """Follow `torch.amp.GradScaler`, which cannot ask other ranks what they found.

    Args:
        initial: The first scale.
        growth: What it is multiplied by after `growth_interval` good steps in a row.
        backoff: What it is multiplied by after a step that overflowed.
        growth_interval: Good steps before it grows.

    Attributes:
        value: The scale of the next step.
        num_good_steps: Steps since the scale was changed.

    Raises:
        ValueError: If an option cannot grow or shrink a scale.
    """

    def __init__(
        self,
        initial: float = 2.0**16,
        *,
        growth: float = 2.0,
        backoff: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        if not 0 < initial < math.inf or not growth > 1 or not 0 < backoff < 1:
            raise ValueError(
                f"initial={initial}, growth={growth}, backoff={backoff}: a scale is "
                "above 0, grows by more than 1 and shrinks by less; choose e.g. "
                "2.0**16, 2.0 and 0.5"
            )
        if growth_interval < 1:
            raise ValueError(
                f"growth_interval={growth_interval} is too small; choose 1 or more"
            )
        self.growth, self.backoff = growth, backoff
        self.growth_interval = growth_interval
        self.value, self.num_good_steps = float(initial), 0

    def update(self, *, overflowed: bool) -> None:
        """Choose the scale of the next step.

        Args:
            overflowed: Whether this step had a gradient that is not finite; the same on
                every rank.
        """
        if overflowed:
            self.value, self.num_good_steps = self.value * self.backoff, 0
            return
        self.num_good_steps += 1
        if self.num_good_steps == self.growth_interval:
            self.num_good_steps = 0
            grown = self.value * self.growth
            if grown < 2.0**128:  # what float32 can hold
                self.value = grown

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and the count, to be saved."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Args:
            state_dict: The scale and the count.

        Raises:
            ValueError: If one is missing.
        """
        if set(state_dict) != set(_STATE):
            raise ValueError(
                f"a loss scale has {', '.join(_STATE)}, not "
                f"{', '.join(sorted(state_dict))}; load what its state_dict() returned"
            )
        self.value = float(state_dict["value"])
        self.num_good_steps = int(state_dict["num_good_steps"])
