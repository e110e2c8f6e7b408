"""Speed of collectives against the size of the tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from labpkg.plot.appearance import axes_or_new, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def bandwidth(
    rows: Sequence[Mapping[str, Any]],
    *,
    collective: str = "all_reduce",
    ax: Axes | None = None,
) -> Axes:
    """Draw the bus bandwidth of one collective, a line for each variant.

    Args:
        rows: The rows of `labpkg bench collectives`.
        collective: Which of the collectives in the rows.
        ax: Where to draw; a new figure without it.

    Returns:
        The axes, both logarithmic: bytes of the tensor, and GB/s.

    Raises:
        ValueError: if no row is about the collective.
    """
    chosen = [row for row in rows if row.get("collective") == collective]
    if not chosen:
        known = sorted({str(row.get("collective")) for row in rows})
        raise ValueError(
            f"no row is about collective={collective!r}; the rows have {known}"
        )
    with style():
        ax = axes_or_new(ax)
        for variant in dict.fromkeys(row["variant"] for row in chosen):
            points = sorted(
                (row["num_bytes"], row["bus_gb_per_s"])
                for row in chosen
                if row["variant"] == variant
            )
            ax.plot(*zip(*points, strict=True), marker="o", label=variant)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        sizes = sorted({row["num_bytes"] for row in chosen})
        ax.set_xticks(sizes, [_size(size) for size in sizes])
        ax.minorticks_off()
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_xlabel(f"size of the tensor, {collective}")
        ax.set_ylabel("bus bandwidth, GB/s")
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:g} GiB"
