"""Pipeline schedules: as boxes on a time axis, measured beside predicted, step by step.

A box is an action, its number the micro-batch. On a rank with several stages the later
ones are paler.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from labpkg.planning.actions import Action, Schedule
from labpkg.planning.simulator import Span, StageCost, Timeline, simulate
from labpkg.plot.appearance import COLORS, axes_or_new, style
from labpkg.plot.players import Player, player

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PHASES: Mapping[str, tuple[str, str]] = {
    "F": ("forward", COLORS["forward"]),
    "B": ("backward", COLORS["backward"]),
    "I": ("input gradient I", COLORS["backward"]),
    "W": ("weight gradient W", COLORS["tp"]),
}
_UNIT_COST = StageCost()  # F = I = W = 1, B = 2
_INCHES_PER_DIGIT = 0.075
_BOX_HEIGHT = 0.72


def schedule(
    schedule: Schedule,
    *,
    cost: StageCost | Sequence[StageCost] = _UNIT_COST,
    ax: Axes | None = None,
    unit: str = "time (forward = 1)",
) -> Axes:
    """Draw when each rank does what, as simulation has it.

    Args:
        schedule: What the ranks do.
        cost: Times of a stage: one for all stages, or one for each. The default is what
            `Schedule.bubble_fraction` counts: F = I = W = 1, B = 2, no communication.
        ax: Where to draw; a new figure without it, higher for more than five ranks.
        unit: What the time axis shows.

    Returns:
        The axes, with time on x and rank 0 on top.

    Raises:
        ValueError: If the costs are those of another number of stages.
    """
    return pipeline(simulate(schedule, cost), ax=ax, unit=unit)


def pipeline(
    timeline: Timeline,
    *,
    predicted: Timeline | None = None,
    ax: Axes | None = None,
    unit: str = "s",
) -> Axes:
    """Draw a step of a pipeline, and over it what was predicted, dashed.

    Args:
        timeline: When each rank did what, measured or simulated.
        predicted: The same for the prediction, drawn as dashed outlines.
        ax: Where to draw; a new figure without it, higher for more than five ranks.
        unit: `s` or `ms`; any other text labels the axis of times that are no seconds.

    Returns:
        The axes, with time on x and rank 0 on top.

    Raises:
        ValueError: If the prediction is for another number of ranks.
    """
    ranks = timeline.spans
    if predicted is not None and len(predicted.spans) != len(ranks):
        raise ValueError(
            f"{len(ranks)} ranks and a prediction for {len(predicted.spans)}; simulate "
            "the schedule that ran"
        )
    scale = 1000.0 if unit == "ms" else 1.0
    end = max(own[-1].end_s for own in ranks)
    compared = predicted.spans if predicted else ()
    latest = max(own[-1].end_s for own in (*ranks, *compared))
    with style():
        ax = axes_or_new(ax, height=max(2.2, 0.6 + 0.34 * len(ranks)))
        _prepare(ax, len(ranks), latest * scale)
        for rank, own in enumerate(ranks):
            _draw_boxes(ax, rank, own, until=end * scale, scale=scale)
        for rank, own in enumerate(compared):
            _draw_outlines(ax, rank, own, scale)
        ax.set_xlabel(f"time ({unit})" if unit in ("s", "ms") else unit)
        _add_legend(ax, ranks, is_compared=predicted is not None)
    return ax


def schedule_player(
    schedule: Schedule, *, alt: str, caption: str = "", cost: StageCost = _UNIT_COST
) -> Player:
    """Return a player that goes through a schedule, from event to event.

    Small boxes beside each rank are the activations that it keeps. Green
    arrows are messages that leave at this moment.

    Args:
        schedule: What the ranks do.
        alt: What one sees, for those who do not.
        caption: The text below.
        cost: Times of a stage.

    Returns:
        An object that a notebook shows.

    Raises:
        ValueError: If there is no alternative text.
    """
    timeline = simulate(schedule, cost)
    times = {span.end_s for own in timeline.spans for span in own}
    return player(
        partial(_draw_moment, schedule, timeline),
        sorted(times),
        label=lambda time: f"t = {time:g}",
        alt=alt,
        caption=caption,
        height=max(2.2, 0.6 + 0.34 * schedule.num_ranks),
        interval_s=0.7,
    )


@dataclass(frozen=True, slots=True)
class _Look:
    color: str
    ink: str


def _look(action: Action, stages: Sequence[int]) -> _Look:
    """Return the colours of a box; later stages of a rank are mixed with white."""
    from matplotlib.colors import to_hex, to_rgb

    white = 0.55 * stages.index(action.stage) / max(1, len(stages) - 1)
    r, g, b = (c + white * (1 - c) for c in to_rgb(_PHASES[action.kind][1]))
    is_pale = white > 0.3 or action.kind == "W"
    return _Look(to_hex((r, g, b)), "black" if is_pale else "white")


def _prepare(ax: Axes, num_ranks: int, end: float) -> None:
    ax.set_yticks(range(num_ranks), [f"rank {rank}" for rank in range(num_ranks)])
    ax.set_ylim(num_ranks - 0.5, -0.5)  # rank 0 on top
    ax.set_xlim(0, end)
    ax.grid(visible=False)
    ax.tick_params(axis="y", length=0)


def _draw_boxes(
    ax: Axes, rank: int, own: Sequence[Span], *, until: float, scale: float = 1.0
) -> None:
    """Draw actions on a ground of idle time that ends at `until`."""
    _draw_box(ax, rank, 0, until, color=COLORS["idle"], linewidth=0)
    stages = sorted({span.action.stage for span in own})
    left, right = ax.get_xlim()
    inches = ax.get_window_extent().width / ax.figure.dpi / (right - left)
    for action, start_s, end_s in own:
        start, length = start_s * scale, (end_s - start_s) * scale
        look = _look(action, stages)
        edge = {"edgecolor": "white", "linewidth": 0.6}
        _draw_box(ax, rank, start, length, facecolor=look.color, **edge)
        text = str(action.micro_batch)
        if length * inches > _INCHES_PER_DIGIT * len(text):
            place = {"ha": "center", "va": "center", "fontsize": 7}
            ax.text(start + length / 2, rank, text, color=look.ink, **place)


def _draw_outlines(ax: Axes, rank: int, own: Sequence[Span], scale: float) -> None:
    dashed = {"fill": False, "edgecolor": "black", "linestyle": (0, (2, 1.5))}
    for _, start_s, end_s in own:
        length = (end_s - start_s) * scale
        _draw_box(ax, rank, start_s * scale, length, height=0.9, **dashed)


def _draw_box(
    ax: Axes,
    rank: int,
    start: float,
    length: float,
    *,
    height: float = _BOX_HEIGHT,
    **look: Any,
) -> None:
    from matplotlib.patches import Rectangle

    corner = (start, rank - height / 2)  # a bar would cost three times as much
    ax.add_patch(Rectangle(corner, length, height, **{"linewidth": 0.9, **look}))


def _add_legend(
    ax: Axes, ranks: Sequence[Sequence[Span]], *, is_compared: bool
) -> None:
    """Explain the colours, together with those of the other axes of the figure."""
    from matplotlib.patches import Patch

    kinds = {span.action.kind for own in ranks for span in own}
    patches = [Patch(color=c, label=n) for k, (n, c) in _PHASES.items() if k in kinds]
    patches.append(Patch(color=COLORS["idle"], label="idle"))
    if is_compared:
        patches.append(Patch(label="predicted", fill=False, edgecolor="black", ls="--"))
    for old in ax.figure.legends:
        patches += old.get_patches()
        old.remove()
    order = [*(name for name, _ in _PHASES.values()), "idle", "predicted"]
    by_name = {str(patch.get_label()): patch for patch in patches}
    ax.figure.legend(
        handles=sorted(
            by_name.values(), key=lambda it: order.index(str(it.get_label()))
        ),
        loc="outside upper center",
        ncols=len(by_name),
        fontsize=9,
        handlelength=1.4,
        columnspacing=1.2,
    )


def _draw_moment(schedule: Schedule, timeline: Timeline, now: float, ax: Axes) -> None:
    """Draw what has happened until now, what is kept, and what leaves now."""
    end = max(own[-1].end_s for own in timeline.spans)
    _prepare(ax, schedule.num_ranks, end)
    side = end / 45
    for rank, own in enumerate(timeline.spans):
        done = [
            Span(action, start, min(stop, now))
            for action, start, stop in own
            if start < now
        ]
        _draw_boxes(ax, rank, done, until=now)
        for i, action in enumerate(_kept(own, now)):
            look = _look(action, schedule.stages_of(rank))
            box = {"facecolor": look.color, "edgecolor": "white", "height": 0.4}
            _draw_box(ax, rank, end + (i + 1.5) * side, side, **box)
    for src, dst in _messages(schedule, timeline, now):
        arrow = {"arrowstyle": "-|>", "color": COLORS["communication"], "lw": 1.6}
        ax.annotate("", (now, dst), (now, src), arrowprops=arrow, annotation_clip=False)
    ax.axvline(now, color="black", linewidth=1)
    most = max(schedule.peak_in_flight)
    ax.annotate("kept", (end + 1.5 * side, -0.62), annotation_clip=False, fontsize=8)
    ax.set_xlim(0, end + (most + 2) * side)
    ax.set_xticks([tick for tick in ax.get_xticks() if 0 <= tick <= end])
    ax.set_xlabel("time (forward = 1)")


def _kept(own: Sequence[Span], now: float) -> list[Action]:
    """Return the forwards whose activations are alive, the oldest first."""
    kept = []
    for (stage, kind, micro_batch), start, stop in own:
        forward = Action(stage, "F", micro_batch)
        if kind == "F" and start < now:
            kept.append(forward)
        if kind in "BW" and stop <= now:
            kept.remove(forward)
    return kept


def _messages(
    schedule: Schedule, timeline: Timeline, now: float
) -> Iterator[tuple[int, int]]:
    """Yield sender and receiver of what leaves now."""
    for src, own in enumerate(timeline.spans):
        for (stage, kind, _), _, stop in own:
            after = stage + 1 if kind == "F" else stage - 1
            if stop != now or kind == "W" or not 0 <= after < schedule.num_stages:
                continue
            dst = schedule.rank_of(after)
            if dst != src:
                yield src, dst
