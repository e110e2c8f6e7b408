"""Matrices of counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from labpkg.plot.appearance import axes_or_new, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def confusion(
    matrix: Any, *, names: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw how often each class was taken for which.

    The number in a cell is the count, its colour the share of the class: a row of a
    rare class is as dark as one of a frequent class. The diagonal is recall.

    Args:
        matrix: A `ConfusionMatrix`, or its counts (V, V): rows are targets, columns
            predictions.
        names: Of the classes; 0 to V - 1 without them.
        ax: Where to draw; a new figure without it, higher for more than five classes.

    Returns:
        The axes, with the prediction on x and the target on y, class 0 on top.

    Raises:
        ValueError: For a matrix that is not square or counts nothing, or if `names` do
            not fit.
    """
    import numpy as np
    import torch

    counts = getattr(matrix, "counts", matrix)
    counts = np.asarray(counts.cpu() if isinstance(counts, torch.Tensor) else counts)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.any():
        raise ValueError(
            f"counts (V, V) that are not all 0 are needed, got shape {counts.shape}; "
            "pass a ConfusionMatrix that has counted"
        )
    names = [str(k) for k in range(len(counts))] if names is None else list(names)
    if len(names) != len(counts):
        raise ValueError(
            f"{len(names)} names for {len(counts)} classes; give one name per class"
        )
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    with style():
        ax = axes_or_new(ax, height=max(3.2, 0.9 + 0.34 * len(counts)))
        image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (row, column), count in np.ndenumerate(counts):
            # White is as legible as black on the blue of 0.71.
            color = "white" if shares[row, column] > 0.71 else "black"
            ax.text(column, row, str(count), color=color, ha="center", va="center")
        ax.set_xticks(range(len(names)), names)
        ax.set_yticks(range(len(names)), names)
        ax.grid(visible=False)
        ax.set(xlabel="predicted class", ylabel="true class")
        ax.figure.colorbar(image, ax=ax, label="share of the true class")
    return ax
