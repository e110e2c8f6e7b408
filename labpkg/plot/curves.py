"""Curves over the steps of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from labpkg.plot.appearance import axes_or_new, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def loss(
    history: Sequence[float] | Mapping[str, Sequence[float]],
    *,
    ax: Axes | None = None,
    theory: float | None = None,
    theory_label: str = "theory",
) -> Axes:
    """Plot the loss of each step, one line for each run.

    Args:
        history: The loss in nats at steps 1, 2, ...; or several of them by name. Later
            runs are thinner and on top, so that equal curves stay visible.
        ax: Where to draw; a new figure of 6.4 x 3.2 inches without it.
        theory: A loss that theory names, drawn as a dashed line.
        theory_label: What the dashed line is, for the legend.

    Returns:
        The axes, with the step on x and the loss on y.

    Raises:
        ValueError: if there is no run, or a run without a step.
    """
    runs = history if isinstance(history, Mapping) else {"": history}
    if not runs or any(len(values) == 0 for values in runs.values()):
        raise ValueError(
            f"a loss plot needs at least one step of each run, got {_lengths(runs)}; "
            "pass the list that the training loop filled"
        )
    with style():
        ax = axes_or_new(ax)
        for index, (name, values) in enumerate(runs.items()):
            steps = range(1, len(values) + 1)
            width = 1.8 + 2.2 * (len(runs) - 1 - index)  # a later equal curve shows
            ax.plot(steps, values, label=name or None, linewidth=width)
        if theory is not None:
            ax.axhline(theory, color="black", linestyle="--", label=theory_label)
        ax.set(xlabel="step", ylabel="loss (nats)")
        if theory is not None or any(runs):
            ax.legend()
    return ax


def _lengths(runs: Mapping[str, Sequence[float]]) -> str:
    return str({name or "history": len(values) for name, values in runs.items()})
