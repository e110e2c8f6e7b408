"""How every figure of the book looks: colours, settings, and the size of a new one.

Importing this module costs nothing: matplotlib is imported by the first figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    "figure.dpi": 200,
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

    The settings that it changes are restored at the end of the block, also after an
    error. All others stay as they are: the first figure of a notebook chooses the
    backend and makes it interactive, and `matplotlib.rc_context` would undo that.

    Returns:
        A context manager.
    """
    import matplotlib
    from cycler import cycler

    settings: dict[Any, Any] = {**_STYLE, "axes.prop_cycle": cycler(color=_LINES)}
    before = {key: matplotlib.rcParams[key] for key in settings}
    matplotlib.rcParams.update(settings)
    try:
        yield
    finally:
        matplotlib.rcParams.update(before)


def axes_or_new(ax: Axes | None, *, height: float = 3.2) -> Axes:
    """Return `ax`, or the axes of a new figure, 6.4 inches wide.

    Args:
        ax: Axes that exist, or None.
        height: Of a new figure, in inches.

    Returns:
        The axes.
    """
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(6.4, height))[1]
