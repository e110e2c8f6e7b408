"""Pieces: what each rank holds of a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from labpkg.plot.appearance import axes_or_new, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Box = tuple[Sequence[int], Sequence[int]]

_SHADES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def pieces(
    shape: tuple[int, int], ranks: Sequence[Sequence[Box]], *, ax: Axes | None = None
) -> Axes:
    """Draw which boxes of a matrix each rank holds.

    A rank has a colour, and its number in each of its boxes.

    Args:
        shape: Rows and columns of the matrix.
        ranks: For each rank its boxes, pairs of offsets and sizes.
        ax: Where to draw; a new figure without it.

    Returns:
        The axes, with columns on x and rows on y, row 0 on top.

    Raises:
        ValueError: If a box does not lie in the matrix.
    """
    from matplotlib.patches import Rectangle

    rows, columns = shape
    for boxes in ranks:
        for (row, column), (height, width) in boxes:
            inside = 0 <= row <= row + height <= rows
            if not (inside and 0 <= column <= column + width <= columns):
                raise ValueError(
                    f"the box at {(row, column)} of sizes {(height, width)} is not in "
                    f"a matrix {shape}; give offsets and sizes, rows first"
                )
    with style():
        ax = axes_or_new(ax)
        for rank, boxes in enumerate(ranks):
            color = _SHADES[rank % len(_SHADES)]
            for (row, column), (height, width) in boxes:
                place = (column, row), width, height
                ax.add_patch(Rectangle(*place, fc=color, ec="black", alpha=0.35))
                middle = column + width / 2, row + height / 2
                ax.text(*middle, str(rank), ha="center", va="center")
        ax.set(xlim=(0, columns), ylim=(rows, 0), xlabel="column", ylabel="row")
        ax.set_aspect("equal")
        ax.grid(visible=False)
    return ax
