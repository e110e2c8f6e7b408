"""Timelines: what each rank or each link does from when to when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from labpkg.plot.appearance import COLORS, axes_or_new, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Span = tuple[str, float, float] | tuple[str, float, float, str]


def timeline(
    rows: Mapping[str, Sequence[Span]],
    *,
    ax: Axes | None = None,
    unit: str = "time",
    marks: Mapping[str, float] | None = None,
) -> Axes:
    """Draw one row of coloured spans for each rank, link or variant.

    Args:
        rows: For each row, from top to bottom, its spans `(phase, start, end)` or
            `(phase, start, end, label)`. A phase is `forward`, `backward`,
            `communication`, `optimizer` or `idle` and has the book's colour.
        ax: Where to draw; a new figure of 6.4 x 2.2 inches without it, higher for more
            than five rows.
        unit: What the time axis shows.
        marks: Times to mark with a dashed line, by name.

    Returns:
        The axes, with time on x.

    Raises:
        ValueError: if there is no span, a phase has no colour, or a span ends before it
            starts.
    """
    spans = [span for row in rows.values() for span in row]
    _check(spans)
    with style():
        ax = axes_or_new(ax, height=max(2.2, 0.5 + 0.34 * len(rows)))
        for place, row in enumerate(rows.values()):
            for span in row:
                _draw(ax, place, span)
        for name, time in (marks or {}).items():
            ax.axvline(time, color="black", linestyle="--", linewidth=1)
            ax.annotate(name, (time, 1.02), xycoords=("data", "axes fraction"))
        ax.set_yticks(range(len(rows)), list(rows))
        ax.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
        ax.set_xlim(left=min(0.0, *(span[1] for span in spans)))
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(unit)
        _add_legend(ax, spans)
    return ax


def _check(spans: Sequence[Span]) -> None:
    if not spans:
        raise ValueError("a timeline needs at least one span (phase, start, end)")
    for phase, start, end, *_ in spans:
        if phase not in COLORS:
            raise ValueError(
                f"phase={phase!r} has no colour; choose forward, backward, "
                "communication, optimizer or idle"
            )
        if end < start:
            raise ValueError(
                f"a span of {phase} ends at {end}, before its start {start}"
            )


def _draw(ax: Axes, place: int, span: Span) -> None:
    phase, start, end, *label = span
    ax.barh(
        place,
        end - start,
        left=start,
        height=0.72,
        color=COLORS[phase],
        edgecolor="white",
        linewidth=0.8,
    )
    if label:
        ink = "black" if phase == "idle" else "white"
        centre = ((start + end) / 2, place)
        ax.annotate(label[0], centre, ha="center", va="center", color=ink, fontsize=8)


def _add_legend(ax: Axes, spans: Sequence[Span]) -> None:
    from matplotlib.patches import Patch

    phases = dict.fromkeys(span[0] for span in spans)
    patches = [Patch(color=COLORS[phase], label=phase) for phase in phases]
    ax.figure.legend(handles=patches, loc="outside upper center", ncols=len(patches))
