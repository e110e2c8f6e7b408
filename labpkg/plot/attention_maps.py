"""Maps of attention: which position reads from which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from labpkg.plot.appearance import axes_or_new, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})


def attention(
    weights: Any, *, tokens: Sequence[Any] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the weights of one head: each row says where a position reads.

    The darkest cell is the largest weight. A causal head leaves everything above the
    diagonal white.

    Args:
        weights: (T, T) numbers; rows are queries, columns keys, and each row sums to 1.
        tokens: What stands at each position, such as the characters of a text; spaces
            and line ends are made visible. Positions are numbered without them.
        ax: Where to draw; a new figure without it, higher for more than ten positions.

    Returns:
        The axes, with the key on x and the query on y, the first position on top.

    Raises:
        ValueError: If a row is no distribution, or `tokens` do not fit.
    """
    import numpy as np
    import torch

    weights = torch.as_tensor(weights).detach()
    given = weights.to("cpu", torch.float64).numpy()
    eps = torch.finfo(weights.dtype).eps if weights.is_floating_point() else 0.0
    _check(given, tolerance=max(1e-3, eps))
    T = len(given)
    if tokens is not None and len(tokens) != T:
        raise ValueError(f"{len(tokens)} tokens for {T} positions; give one for each")
    with style():
        ax = axes_or_new(ax, height=min(max(3.2, 0.9 + 0.24 * T), 5.6))
        image = ax.imshow(given, cmap="Blues", vmin=0)
        if tokens is not None:
            names = [str(token).translate(_VISIBLE) for token in tokens]
            size = min(9, 200 / T)  # points; the map is at most 5 inches high
            ax.set_xticks(np.arange(T), names, fontsize=size)
            ax.set_yticks(np.arange(T), names, fontsize=size)
        ax.grid(visible=False)
        ax.set(xlabel="key: read from", ylabel="query: position")
        ax.figure.colorbar(image, ax=ax, label="weight")
    return ax


def _check(weights: Any, tolerance: float) -> None:
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1] or not weights.size:
        raise ValueError(
            f"weights (T, T) of one head are needed, got shape {weights.shape}; take "
            "one sample and one head, such as weights[0, 0]"
        )
    sums = weights.sum(1)
    if (weights < 0).any() or not (abs(sums - 1) < tolerance).all():
        raise ValueError(
            f"each row must be a distribution, but the sums go from {sums.min():.4g} "
            f"to {sums.max():.4g}; pass the weights after softmax over the keys"
        )
