"""Simulated times against the longest paths of a graph, and against closed forms."""

import graphlib
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labpkg.planning.actions import Action, Schedule, parse
from labpkg.planning.schedules import gpipe, interleaved, one_f_one_b, zero_bubble
from labpkg.planning.simulator import Span, StageCost, Timeline, simulate
from tests.planning.orders import few, graph_of, made

times = st.integers(0, 5)  # sums of integers are exact
costs = st.builds(
    StageCost,
    forward_s=times,
    backward_s=times,
    input_s=times,
    weight_s=times,
    transfer_s=times,
)


def longest_paths(schedule, costs):
    """Return when each action starts, from the graph of who waits for whom alone."""

    def seconds(action):
        cost = costs[action[0]]
        by_kind = (cost.forward_s, cost.backward_s, cost.input_s, cost.weight_s)
        return by_kind["FBIW".index(action[1])]

    def arrival(source, action):
        moved = schedule.rank_of(source[0]) != schedule.rank_of(action[0])
        return start[source] + seconds(source) + moved * costs[source[0]].transfer_s

    graph, start = graph_of(schedule.ranks), {}
    for action in graphlib.TopologicalSorter(graph).static_order():
        start[action] = max((arrival(s, action) for s in graph[action]), default=0)
    return start


@few(60)
@given(schedule=made, data=st.data())
def test_times_are_the_longest_paths(schedule, data):
    S = schedule.num_stages
    each = data.draw(st.lists(costs, min_size=S, max_size=S))
    start = longest_paths(schedule, each)
    timeline = simulate(schedule, each)
    for actions, own in zip(schedule.ranks, timeline.spans, strict=True):
        assert tuple(span.action for span in own) == actions
        assert [span.start_s for span in own] == [start[action] for action in actions]
    ends = [span.end_s for own in timeline.spans for span in own]
    assert timeline.makespan_s == max(ends)
    work = sum(span.end_s - span.start_s for own in timeline.spans for span in own)
    if max(ends):
        idle = 1 - work / (max(ends) * schedule.num_ranks)
        assert timeline.bubble_fraction == pytest.approx(idle, abs=1e-12)
    else:
        assert timeline.bubble_fraction == 0


@few(60)
@given(schedule=made)
def test_default_costs_give_the_numbers_of_the_schedule(schedule):
    timeline = simulate(schedule)
    assert timeline.bubble_fraction == pytest.approx(
        schedule.bubble_fraction, abs=1e-12
    )
    assert timeline.peak_in_flight == schedule.peak_in_flight
    for rank, own in enumerate(timeline.spans):
        start = [span.start_s for span in own if span.action.kind == "F"]
        end = [span.end_s for span in own if span.action.kind in "BW"]
        alive = [sum(s <= t for s in start) - sum(e <= t for e in end) for t in start]
        assert max(alive) == timeline.peak_in_flight[rank]


@few(40)
@given(P=st.integers(1, 8), M=st.integers(1, 16), f=times, b=times, t=times)
def test_closed_forms_with_transfers(P, M, f, b, t):
    cost = StageCost(forward_s=f, backward_s=b, transfer_s=t)
    # One micro-batch travels down and up; M of them leave GPipe's pipe one by one.
    down_and_up = P * (f + b) + 2 * (P - 1) * t
    assert simulate(gpipe(P, 1), cost).makespan_s == down_and_up
    assert simulate(gpipe(P, M), cost).makespan_s == down_and_up + (M - 1) * (f + b)


def test_a_slow_stage_decides():
    """With M large, each micro-batch costs as much as it does on the slowest stage."""
    costs = [StageCost(), StageCost(forward_s=3.0, backward_s=5.0), StageCost()]
    longer, shorter = (simulate(one_f_one_b(3, M), costs).makespan_s for M in (50, 40))
    assert longer - shorter == 10 * 8


@pytest.mark.parametrize("M", [8, 16, 32])
def test_only_one_f_one_b_pays_for_a_transfer_again_and_again(M):
    """Its ranks send F and wait for B in turn; the others have work in between."""

    def slower_by(make):
        slow, fast = StageCost(transfer_s=0.25), StageCost()
        schedule = make(2, M)
        return simulate(schedule, slow).makespan_s - simulate(schedule, fast).makespan_s

    assert slower_by(gpipe) == 2 * 0.25
    assert slower_by(zero_bubble) == 4 * 0.25
    assert slower_by(one_f_one_b) == M * 0.25


def test_zero_bubble_h1_needs_less_idle_time_with_any_cheap_w():
    """Idle time of rank 0 is (P - 1)(F + I - W), where 1F1B has (P - 1)(F + I + W)."""
    P, M = 4, 12
    for weight in (0.25, 0.5, 1.0):
        cost = StageCost(weight_s=weight, backward_s=1 + weight)
        work = M * (2 + weight)
        fused = simulate(one_f_one_b(P, M), cost).makespan_s
        split = simulate(zero_bubble(P, M), cost).makespan_s
        assert fused - work == pytest.approx((P - 1) * (2 + weight))
        assert split - work == pytest.approx((P - 1) * (2 - weight))


def test_thin_stages_are_faster():
    P, M, v = 4, 8, 2
    thin = StageCost(forward_s=1 / v, backward_s=2 / v)
    makespan = simulate(interleaved(P, M, num_virtual_stages=v), thin).makespan_s
    assert makespan == pytest.approx(3 * M + 3 * (P - 1) / v)
    assert simulate(one_f_one_b(P, M)).makespan_s == 3 * M + 3 * (P - 1)


def test_neighbours_on_one_rank_need_no_transfer():
    alone = parse("0F0 1F0 2F0 2B0 1B0 0B0")
    assert simulate(alone, StageCost(transfer_s=7.0)).makespan_s == 9
    assert simulate(gpipe(3, 1), StageCost(transfer_s=7.0)).makespan_s == 9 + 4 * 7


# ---- the values --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["forward_s", "weight_s", "transfer_s"])
@pytest.mark.parametrize("wrong", [-1.0, math.inf, math.nan])
def test_a_cost_is_a_time(name, wrong):
    with pytest.raises(ValueError, match=f"{name}={wrong} must be finite"):
        StageCost(**{name: wrong})


def test_costs_are_those_of_the_stages():
    with pytest.raises(ValueError, match=r"3 costs for the 4 stages of <Schedule of 2"):
        simulate(interleaved(2, 2, num_virtual_stages=2), [StageCost()] * 3)


def test_a_measured_timeline_has_its_own_zero():
    f, b = Action(0, "F", 0), Action(0, "B", 0)
    timeline = Timeline([[Span(f, 2.0, 3.0), Span(b, 4.0, 6.0)]])
    assert timeline.makespan_s == 4
    assert timeline.bubble_fraction == 0.25
    assert timeline == Timeline(([Span(f, 2.0, 3.0), Span(b, 4.0, 6.0)],))
    assert hash(timeline) == hash(Timeline(timeline.spans))


@pytest.mark.parametrize(
    ("spans", "problem"),
    [
        ([], "at least one span on each rank"),
        ([[]], "at least one span on each rank"),
        ([[Span(Action(0, "F", 0), 1.0, 0.5)]], "0F0 on rank 0 lasts from 1.0 to 0.5"),
        (
            [[Span(Action(0, "F", 0), 0.0, 2.0), Span(Action(0, "B", 0), 1.0, 3.0)]],
            "0B0 on rank 0 lasts from 1.0 to 3.0, and the action before it until 2.0",
        ),
    ],
)
def test_a_timeline_is_in_order(spans, problem):
    with pytest.raises(ValueError, match=problem):
        Timeline(spans)


@pytest.mark.parametrize(
    "make",
    [
        lambda: one_f_one_b(64, 512),
        lambda: interleaved(16, 256, num_virtual_stages=4),
        lambda: zero_bubble(16, 256, variant="v"),
    ],
)
def test_large_schedules_take_no_second(make):
    def cpu_s(function):
        start = time.process_time()
        result = function()
        return result, time.process_time() - start

    made = [cpu_s(make) for _ in range(2)]
    simulated = [cpu_s(lambda: simulate(made[0][0])) for _ in range(2)]
    assert isinstance(made[0][0], Schedule)
    for runs in (made, simulated):
        assert min(seconds for _, seconds in runs) < 1


def test_the_oracle_sees_a_rank_that_waits():
    """A graph without the order of the ranks would start too early."""
    start = longest_paths(one_f_one_b(2, 2), [StageCost()] * 2)
    assert start[Action(1, "F", 1)] == 4
    assert sorted(start.values())[:3] == [0, 1, 1]
