"""Schedules are drawn where and when they run, and a player follows them."""

import json
import re

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from labpkg import plot
from labpkg.planning.schedules import gpipe, interleaved, one_f_one_b, zero_bubble
from labpkg.planning.simulator import Span, StageCost, Timeline, simulate
from labpkg.plot.schedules import _draw_moment


@pytest.fixture
def ax():
    return Figure(figsize=(6.4, 2.2)).subplots()


def boxes(ax):
    """Return rank, start and length of what is drawn, without idle time, outlines."""
    idle = plot.COLORS["idle"].lower()
    return [
        (round(bar.get_y() + bar.get_height() / 2), bar.get_x(), bar.get_width())
        for bar in ax.patches
        if bar.get_fill() and to_hex(bar.get_facecolor()) != idle
    ]


def numbers(ax):
    return [text.get_text() for text in ax.texts]


def legend(ax):
    return [text.get_text() for text in ax.figure.legends[0].get_texts()]


def test_boxes_have_rank_time_and_micro_batch(ax):
    schedule = one_f_one_b(2, 2)
    assert plot.schedule(schedule, ax=ax) is ax
    assert boxes(ax) == [
        *[(0, 0, 1), (0, 1, 1), (0, 4, 2), (0, 7, 2)],
        *[(1, 1, 1), (1, 2, 2), (1, 4, 1), (1, 5, 2)],
    ]
    assert numbers(ax) == ["0", "1", "0", "1", "0", "0", "1", "1"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rank 0", "rank 1"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # rank 0 on top
    assert ax.get_xlim() == (0, 9)
    assert legend(ax) == ["forward", "backward", "idle"]


def test_the_idle_area_is_the_bubble(ax):
    schedule = gpipe(3, 4)
    plot.schedule(schedule, ax=ax)
    busy = sum(length for _, _, length in boxes(ax))
    area = 3 * ax.get_xlim()[1]
    assert 1 - busy / area == pytest.approx(schedule.bubble_fraction)


def test_costs_change_the_lengths(ax):
    plot.schedule(gpipe(2, 1), cost=StageCost(forward_s=3, backward_s=4), ax=ax)
    assert [length for _, _, length in boxes(ax)] == [3, 4, 3, 4]
    assert ax.get_xlabel() == "time (forward = 1)"


def test_halves_of_backward_and_later_stages_have_their_own_colours(ax):
    schedule = zero_bubble(2, 4, variant="v")
    plot.schedule(schedule, ax=ax)
    found = {to_hex(bar.get_facecolor()) for bar in ax.patches}
    assert len(found) == 3 * 2 + 1  # F, I and W of two stages, and idle time
    assert legend(ax) == ["forward", "input gradient I", "weight gradient W", "idle"]
    other = Figure().subplots()
    plot.schedule(interleaved(2, 4, num_virtual_stages=3), ax=other)
    assert len({to_hex(bar.get_facecolor()) for bar in other.patches}) == 2 * 3 + 1


def test_numbers_that_do_not_fit_are_left_out(ax):
    plot.schedule(gpipe(2, 150), ax=ax)
    assert numbers(ax) == []


def test_a_prediction_lies_over_the_measurement_as_dashed_outlines(ax):
    schedule = gpipe(2, 2)
    predicted = simulate(schedule, StageCost(forward_s=0.01, backward_s=0.02))
    measured = Timeline(
        [Span(action, 1.1 * start, 1.1 * end) for action, start, end in own]
        for own in predicted.spans
    )
    plot.pipeline(measured, predicted=predicted, ax=ax, unit="ms")
    outlines = [bar for bar in ax.patches if not bar.get_fill()]
    assert [bar.get_width() for bar in outlines] == pytest.approx([10, 10, 20, 20] * 2)
    assert all(bar.get_linestyle() != "-" for bar in outlines)
    lengths = [length for _, _, length in boxes(ax)]
    assert lengths == pytest.approx([11, 11, 22, 22] * 2)
    assert ax.get_xlabel() == "time (ms)"
    assert legend(ax)[-1] == "predicted"


def test_a_prediction_for_other_ranks_is_refused():
    two, three = simulate(gpipe(2, 2)), simulate(gpipe(3, 2))
    with pytest.raises(ValueError, match="2 ranks and a prediction for 3"):
        plot.pipeline(two, predicted=three)


def test_a_new_figure_has_the_size_of_the_book():
    from matplotlib import pyplot as plt

    sizes = [
        plot.schedule(gpipe(P, 2)).figure.get_size_inches().tolist() for P in (2, 16)
    ]
    plt.close("all")
    assert sizes[0] == [6.4, 2.2]
    assert sizes[1][1] > 5


def test_a_figure_has_one_legend_for_all_its_axes():
    figure = Figure()
    for ax, schedule in zip(
        figure.subplots(2), (zero_bubble(2, 2), gpipe(2, 2)), strict=True
    ):
        plot.schedule(schedule, ax=ax)
    assert len(figure.legends) == 1
    names = ["forward", "backward", "input gradient I", "weight gradient W", "idle"]
    assert legend(ax) == names


# ---- the player --------------------------------------------------------------------


def test_the_player_stops_at_each_event():
    shown = plot.schedule_player(one_f_one_b(2, 2), alt="Two ranks")
    found = re.search(r"labels = (\[.*?\]);", shown.page)
    assert found is not None
    assert json.loads(found[1]) == [f"t = {time}" for time in (1, 2, 4, 5, 6, 7, 9)]
    assert shown.num_frames == 7
    with pytest.raises(ValueError, match="say in a sentence"):
        plot.schedule_player(gpipe(2, 2), alt="")


def draw_moment(schedule, timeline, now):
    ax = Figure(figsize=(6.4, 2.2)).subplots()
    _draw_moment(schedule, timeline, now, ax)
    return ax


@pytest.mark.parametrize(
    "schedule",
    [
        one_f_one_b(3, 5),
        interleaved(2, 2, num_virtual_stages=2),
        zero_bubble(2, 3, variant="v"),
    ],
    ids=repr,
)
def test_the_boxes_beside_a_rank_are_what_it_keeps(schedule):
    timeline = simulate(schedule)
    end, most = timeline.makespan_s, [0] * schedule.num_ranks
    forwards = [s for own in timeline.spans for s in own if s.action.kind == "F"]
    for now in {span.end_s - 0.5 for span in forwards}:
        drawn = boxes(draw_moment(schedule, timeline, now))
        for rank, own in enumerate(timeline.spans):
            kept = [start for r, start, _ in drawn if r == rank and start > end]
            begun = [start for r, start, _ in drawn if r == rank and start < end]
            assert begun == [span.start_s for span in own if span.start_s < now]
            most[rank] = max(most[rank], len(kept))
    assert most == schedule.peak_in_flight


def test_arrows_show_the_messages_that_leave():
    schedule = one_f_one_b(2, 2)
    timeline = simulate(schedule)
    arrows = {}
    for now in (0, 1, 2, 4, 5, 7, 9):
        ax = draw_moment(schedule, timeline, now)
        found = [text for text in ax.texts if isinstance(text, Annotation)]
        ends = [(text.xyann[1], text.xy[1]) for text in found if text.arrow_patch]
        arrows[now] = ends
    sent = {1: [(0, 1)], 2: [(0, 1)], 4: [(1, 0)], 7: [(1, 0)]}
    assert arrows == {now: sent.get(now, []) for now in arrows}
