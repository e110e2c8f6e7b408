"""Figures of the book, one function for each kind: `lab.plot.<kind>(data, *, ax=None)`.

Each function draws on the given axes, or on a new figure of the book's size, and returns
the axes. Nothing changes matplotlib's global settings: `style()` applies the book's
settings inside a `with` block and restores the old ones, and each function uses it.
Theory is dashed, measurements are solid, axes carry units, and the colours of `COLORS`
mean the same thing on every page (Okabe and Ito's palette, readable without red-green
vision). Figures have a white background, which stays legible on a dark page.

Chapters: all of them; first used in parallelism/data_parallel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLORS", "loss", "style"]

COLORS: Mapping[str, str] = MappingProxyType(
    {
        "forward": "#0072B2",
        "backward": "#D55E00",
        "communication": "#009E73",
        "optimizer": "#CC79A7",
        "idle": "#DDDDDD",
        "dp": "#0072B2",
        "tp": "#E69F00",
        "pp": "#009E73",
        "cp": "#CC79A7",
        "ep": "#56B4E9",
    }
)
"""The fixed colour of each phase of a step and of each axis of a mesh."""

_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLE = {
    "figure.figsize": (6.4, 3.2),
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "savefig.dpi": 200,
    "axes.facecolor": "white",
    "axes.edgecolor": "#444444",
    "axes.labelcolor": "black",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "text.color": "black",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "font.size": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "path",
}


@contextmanager
def style() -> Iterator[None]:
    """Apply the book's figure settings inside a `with` block.

    matplotlib's own settings are restored at the end of the block, also after an error.

    Returns:
        A context manager.
    """
    import matplotlib
    from cycler import cycler

    with matplotlib.rc_context({**_STYLE, "axes.prop_cycle": cycler(color=_LINES)}):
        yield


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
        ax = _axes(ax)
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


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt

    return plt.subplots()[1]


def _lengths(runs: Mapping[str, Sequence[float]]) -> str:
    return str({name or "history": len(values) for name, values in runs.items()})
