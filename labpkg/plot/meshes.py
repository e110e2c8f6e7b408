"""Meshes: which ranks talk to each other on which axis."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from labpkg.plot.appearance import COLORS, axes_or_new, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def mesh(
    sizes: Mapping[str, int], *, node_size: int | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the groups of each axis of a mesh over the ranks.

    Each axis has a strip, the outermost on top. A line in it joins the ranks of one
    group, those that differ in this coordinate only; an axis of size 1 has no strip.

    Args:
        sizes: Size of each axis by its name, outer to inner, such as
            `{"pp": 2, "dp": 2, "tp": 2}`.
        node_size: Ranks of a machine, to shade every second one; None is one machine.
        ax: Where to draw; a new figure without it.

    Returns:
        The axes, with the rank on x.

    Raises:
        ValueError: If a size or `node_size` is below 1, or all sizes are 1.
    """
    n = math.prod(sizes.values())
    node_size = n if node_size is None else node_size
    if min([*sizes.values(), node_size], default=0) < 1 or n == 1:
        raise ValueError(
            f"sizes={dict(sizes)} and node_size={node_size} must be 1 or more, and two "
            "ranks are needed for a group; give the sizes of axes, outer to inner"
        )
    shown = {axis: size for axis, size in sizes.items() if size > 1}
    with style():
        ax = axes_or_new(ax, height=0.9 + 0.75 * len(shown))
        for first in range(0, n, 2 * node_size):
            last = min(first + node_size, n)
            ax.axvspan(first - 0.5, last - 0.5, color="#EEEEEE", lw=0, zorder=0)
        for row, axis in enumerate(shown):
            groups = _groups(sizes, axis)
            for k, ranks in enumerate(groups):
                y = row + 0.7 * ((k + 0.5) / len(groups) - 0.5)
                color = COLORS.get(axis, "#444444")
                ax.plot(ranks, [y] * len(ranks), "o-", color=color, ms=4, lw=1.4)
        ax.set_yticks(range(len(shown)), [f"{a} = {shown[a]}" for a in shown])
        ax.set(xlim=(-0.5, n - 0.5), ylim=(len(shown) - 0.5, -0.5), xlabel="rank")
        ax.set_xticks(range(0, n, max(1, n // 16)))
        ax.grid(visible=False)
    return ax


def _groups(sizes: Mapping[str, int], axis: str) -> list[list[int]]:
    """Return the ranks of each group of an axis, sorted by their first rank."""
    found: dict[tuple[int, ...], list[int]] = {}
    place = list(sizes).index(axis)
    coordinates = itertools.product(*map(range, sizes.values()))
    for rank, own in enumerate(coordinates):
        found.setdefault((*own[:place], *own[place + 1 :]), []).append(rank)
    return sorted(found.values())
