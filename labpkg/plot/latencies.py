"""How long something takes against how many bytes it moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from labpkg.plot.appearance import axes_or_new, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GRID = 200  # points of a formula


def time_by_size(
    measured: Mapping[str, Iterable[tuple[float, float]]] | None = None,
    *,
    theory: Mapping[str, Callable[[float], float]] | None = None,
    marks: Mapping[str, float] | None = None,
    xlim: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw seconds against bytes, both logarithmic.

    On these axes latency is a flat line, bandwidth a rising one.

    Args:
        measured: By name, pairs (bytes, seconds): dots, joined by a line.
        theory: By name, functions of bytes that return seconds: dashed, in the colour
            of the measurement of the same name, which then stands in the legend alone.
        marks: Sizes to mark with a dotted line, by name; infinite ones are left out.
        xlim: Bytes that the formulas cover; by default those that were measured.
        ax: Where to draw; a new figure of 6.4 x 3.2 inches without it.

    Returns:
        The axes.

    Raises:
        ValueError: If there is nothing to draw, if formulas have no `xlim` to cover, or
            for a size of 0.
    """
    points = {name: sorted(pairs) for name, pairs in (measured or {}).items()}
    sizes = [size for pairs in points.values() for size, _ in pairs]
    if not (sizes or theory) or not (sizes or xlim):
        raise ValueError(
            f"nothing to draw: measured={list(points)}, theory={list(theory or {})}, "
            "xlim=None; pass measurements, or formulas and xlim=(1e3, 1e9)"
        )
    if sizes and min(sizes) <= 0:
        raise ValueError(
            f"a size of {min(sizes):g} bytes has no place on a logarithmic axis; leave "
            "such samples out"
        )
    low, high = xlim or (min(sizes), max(sizes))
    grid = [low * (high / low) ** (i / (_GRID - 1)) for i in range(_GRID)]
    with style():
        ax = axes_or_new(ax)
        colors = {}
        for name, pairs in points.items():
            (line,) = ax.plot(*zip(*pairs, strict=True), "o-", label=name, lw=1.2, ms=4)
            colors[name] = line.get_color()
        for name, seconds in (theory or {}).items():
            label = None if name in colors else name
            color = {"color": colors[name]} if name in colors else {}
            times = [seconds(size) for size in grid]
            ax.plot(grid, times, "--", label=label, lw=1.4, **color)
        for name, size in (marks or {}).items():
            if low < size < high:
                ax.axvline(size, color="black", linestyle=":", lw=1)
                ax.annotate(
                    name, (size, 1.02), xycoords=("data", "axes fraction"), ha="center"
                )
        _label(ax)
    return ax


def _label(ax: Axes) -> None:
    from matplotlib.ticker import EngFormatter

    ax.set(xscale="log", yscale="log", xlabel="size", ylabel="time")
    ax.xaxis.set_major_formatter(EngFormatter(unit="B"))
    ax.yaxis.set_major_formatter(EngFormatter(unit="s"))
    ax.minorticks_off()
    if ax.get_legend_handles_labels()[1]:
        ax.legend()
