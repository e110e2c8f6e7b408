"""Schedules as values: what the makers promise, and what a wrong schedule is told."""

import copy
import dataclasses
import graphlib
import math
import pickle
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labpkg.planning.actions import Action, Message, Schedule, parse
from labpkg.planning.schedules import gpipe, interleaved, one_f_one_b, zero_bubble
from tests.planning.orders import M_, P_, V_, few, graph_of, made, random_ranks, randoms

# ---- the makers --------------------------------------------------------------------


@few(60)
@given(P=P_, M=M_)
def test_gpipe_and_one_f_one_b(P, M):
    for make, peak in ((gpipe, lambda s: M), (one_f_one_b, lambda s: min(P - s, M))):
        schedule = make(P, M)
        assert schedule.bubble_fraction == (P - 1) / (M + P - 1)
        assert schedule.peak_in_flight == [peak(s) for s in range(P)]
        assert not schedule.splits_backward


def test_the_numbers_of_the_text():
    schedule = one_f_one_b(num_stages=4, num_micro_batches=8)
    assert schedule.bubble_fraction == 3 / 11
    assert schedule.peak_in_flight == [4, 3, 2, 1]
    assert gpipe(4, 1).bubble_fraction == 3 / 4


@few(80)
@given(P=P_, M=M_, v=V_)
def test_interleaved(P, M, v):
    schedule = interleaved(P, M, num_virtual_stages=v)
    fill = (P - 1) + (v - 1) * max(0, P - M)
    assert schedule.bubble_fraction == pytest.approx(fill / (v * M + fill), abs=1e-15)
    group = math.ceil(M / max(1, M // P))
    peaks = [min(v * M, (v - 1) * group + 2 * (P - 1 - r) + 1) for r in range(P)]
    if v == 1:
        assert schedule == one_f_one_b(P, M)
        return
    assert schedule.peak_in_flight == peaks
    assert [schedule.stages_of(r) for r in range(P)] == [
        tuple(range(r, v * P, P)) for r in range(P)
    ]
    if M % P == 0:
        assert peaks[0] == min(v * M, v * P + P - 1)


@few(80)
@given(P=P_, M=M_)
def test_zero_bubble_h1(P, M):
    schedule = zero_bubble(P, M, variant="h1")
    idle = P - 1 + max(0, P - M)
    assert schedule.bubble_fraction == idle / (3 * M + idle)
    assert schedule.peak_in_flight == [min(P, M)] * P
    assert schedule == zero_bubble(P, M)
    assert schedule.splits_backward
    if M >= P:  # a third of what 1F1B leaves idle; fractions of different makespans
        assert (3 * M + 3 * idle) * one_f_one_b(P, M).bubble_fraction == (
            pytest.approx(3 * idle)
        )


@few(80)
@given(P=P_, M=M_)
def test_zero_bubble_v(P, M):
    schedule = zero_bubble(P, M, variant="v")
    idle = P - 1 + max(0, 3 * P - 1 - 2 * M)
    assert schedule.bubble_fraction == idle / (6 * M + idle)
    assert max(schedule.peak_in_flight) == min(2 * P, 2 * M)
    assert all(schedule.stages_of(r) == (r, 2 * P - 1 - r) for r in range(P))
    if M >= 2 * P - 1:
        assert schedule.peak_in_flight == [2 * P] * P
        for rank, ticks in enumerate(schedule.ticks()):  # each lasts one unit of time
            assert ticks == tuple(range(rank, rank + 6 * M))


@few(60)
@given(rng=randoms, P=st.integers(1, 5), M=st.integers(1, 8), split=st.booleans())
def test_no_order_beats_the_bounds(rng, P, M, split):
    """The last rank starts P - 1 late; and whole backwards have to come back, too."""
    sizes = {"num_stages": P, "num_micro_batches": M, "one_each": True}
    schedule = Schedule(random_ranks(rng, **sizes, split=float(split)))
    bound = (P - 1) / (3 * M + P - 1) if split else (P - 1) / (M + P - 1)
    assert schedule.bubble_fraction >= bound - 1e-15


@few(40)
@given(P=P_, M=M_, v=V_)
def test_the_order_of_bubbles(P, M, v):
    """Where M >= 2 P - 1, each schedule is at least as good as the one before."""
    M += 2 * P - 2
    bubbles = [
        gpipe(P, M).bubble_fraction,
        one_f_one_b(P, M).bubble_fraction,
        interleaved(P, M, num_virtual_stages=min(v, 3)).bubble_fraction,
        zero_bubble(P, M).bubble_fraction,
        zero_bubble(P, M, variant="v").bubble_fraction,
    ]
    assert bubbles == sorted(bubbles, reverse=True)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: gpipe(0, 1), "num_stages=0 must be an integer of at least 1"),
        (lambda: one_f_one_b(2, 0), "num_micro_batches=0"),
        (lambda: one_f_one_b(2, 2.0), "num_micro_batches=2.0"),
        (lambda: interleaved(2, 2, num_virtual_stages=0), "num_virtual_stages=0"),
        (lambda: zero_bubble(-1, 1), "num_ranks=-1"),
        (lambda: zero_bubble(2, 2, variant="h2"), "variant='h2' is none"),
    ],
)
def test_impossible_sizes(make, problem):
    with pytest.raises(ValueError, match=problem):
        make()


# ---- the value ---------------------------------------------------------------------


@few(60)
@given(schedule=made)
def test_the_grid_is_the_schedule(schedule):
    text = str(schedule)
    assert parse(text) == Schedule.parse(text) == schedule
    assert hash(parse(text)) == hash(schedule)
    lines = text.splitlines()
    assert len(lines) == schedule.num_ranks
    for rank, line in enumerate(lines):
        label, cells = line.split("|")
        assert label.split() == ["rank", str(rank)]
        columns = [i for i, cell in enumerate(cells.split()) if cell != "."]
        assert tuple(columns) == schedule.ticks()[rank]


def test_the_grid_shows_idle_steps_in_columns():
    assert str(gpipe(2, 2)) == (
        "rank 0 | 0F0 0F1 .   .   0B0 0B1\nrank 1 | .   1F0 1F1 1B0 1B1 ."
    )
    text = str(one_f_one_b(12, 11))
    assert text.startswith("rank  0 | 0F0   0F1 ")
    words = {len(line.split("|")[1].split()) for line in text.splitlines()}
    assert len(words) == 1


def test_a_text_without_labels_is_enough():
    text = "\n  0F0 0I0 0W0 \n\n . 1F0 . 1B0\n"
    assert parse(text) == Schedule(
        [
            [Action(0, "F", 0), Action(0, "I", 0), Action(0, "W", 0)],
            [Action(1, "F", 0), Action(1, "B", 0)],
        ]
    )


def test_a_schedule_is_a_value():
    schedule = interleaved(2, 4, num_virtual_stages=2)
    assert {schedule: 1}[interleaved(2, 4, num_virtual_stages=2)] == 1
    assert schedule != interleaved(2, 5, num_virtual_stages=2)
    assert copy.deepcopy(schedule) == pickle.loads(pickle.dumps(schedule)) == schedule
    assert pickle.loads(pickle.dumps(schedule)).messages(0) == schedule.messages(0)
    assert repr(schedule) == "<Schedule of 2 ranks, 4 stages, 4 micro-batches>"
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.ranks = ()
    with pytest.raises(AttributeError):
        schedule.num_ranks = 1


def test_where_stages_live():
    schedule = zero_bubble(3, 2, variant="v")
    assert (schedule.num_ranks, schedule.num_stages) == (3, 6)
    assert schedule.num_micro_batches == 2
    assert [schedule.rank_of(stage) for stage in range(6)] == [0, 1, 2, 2, 1, 0]
    assert Schedule(schedule.ranks[::-1]).stages_of(2) == (0, 5)
    with pytest.raises(ValueError, match=r"stage=6 is none .* 0 to 5"):
        schedule.rank_of(6)
    with pytest.raises(ValueError, match=r"rank=3 is none .* 0 to 2"):
        schedule.stages_of(3)
    with pytest.raises(ValueError, match=r"rank=-1 is none"):
        schedule.messages(-1)


# ---- messages ----------------------------------------------------------------------


@few(60)
@given(schedule=made)
def test_both_ends_share_the_order_of_messages(schedule):
    P, S = schedule.num_ranks, schedule.num_stages
    of_rank = [schedule.messages(rank) for rank in range(P)]
    for a in range(P):
        assert list(of_rank[a]) == sorted(of_rank[a])
        for b in range(P):
            pair = {a, b}
            here = [m for m in of_rank[a] if {m.src, m.dst} == pair]
            assert here == [m for m in of_rank[b] if {m.src, m.dst} == pair]
            assert a != b or not here
    tick_of = {
        action: tick
        for actions, ticks in zip(schedule.ranks, schedule.ticks(), strict=True)
        for action, tick in zip(actions, ticks, strict=True)
    }
    sent = [m for rank in range(P) for m in of_rank[rank] if m.src == rank]
    for message in sent:
        assert tick_of[message.producer] == message.tick < tick_of[message.consumer]
        assert schedule.rank_of(message.producer.stage) == message.src
        assert schedule.rank_of(message.consumer.stage) == message.dst
        step = 1 if message.producer.kind == "F" else -1
        assert message.consumer.stage - message.producer.stage == step
        assert (message.consumer.kind == "F") == (message.producer.kind == "F")
        assert message.consumer.micro_batch == message.producer.micro_batch
    borders = [schedule.rank_of(s) != schedule.rank_of(s + 1) for s in range(S - 1)]
    assert len(set(sent)) == len(sent) == 2 * sum(borders) * schedule.num_micro_batches


def test_the_messages_of_a_v():
    schedule = zero_bubble(2, 1, variant="v")  # stages 0 and 3, stages 1 and 2
    a = Action.parse
    assert schedule.messages(0) == (
        Message(0, a("0F0"), a("1F0"), 0, 1),
        Message(2, a("2F0"), a("3F0"), 1, 0),
        Message(4, a("3I0"), a("2I0"), 0, 1),
        Message(7, a("1I0"), a("0I0"), 1, 0),
    )
    assert schedule.messages(1) == schedule.messages(0)


# ---- wrong schedules ---------------------------------------------------------------


@few(150)
@given(rng=randoms, S=st.integers(1, 4), M=st.integers(1, 3), swaps=st.integers(0, 4))
def test_exactly_the_orders_without_a_cycle_are_valid(rng, S, M, swaps):
    ranks = random_ranks(rng, num_stages=S, num_micro_batches=M)
    for _ in range(swaps):
        own = rng.choice(ranks)
        i, j = rng.randrange(len(own)), rng.randrange(len(own))
        own[i], own[j] = own[j], own[i]
    try:
        graphlib.TopologicalSorter(graph_of(ranks)).prepare()
        possible = True
    except graphlib.CycleError:
        possible = False
    if possible:
        Schedule(ranks)
        return
    with pytest.raises(ValueError, match="order"):
        Schedule(ranks)


@few(60)
@given(rng=randoms, S=st.integers(1, 4), M=st.integers(1, 4))
def test_a_broken_schedule_is_refused(rng, S, M):
    ranks = random_ranks(rng, num_stages=S, num_micro_batches=M)
    own = rng.choice(ranks)
    i = rng.randrange(len(own))
    stage, kind, m = own[i]
    breaks = [
        lambda: own.pop(i),
        lambda: own.append(own[i]),
        lambda: own.insert(i, Action(stage, {"B": "W"}.get(kind, "B"), m)),
        lambda: own.append(Action(stage, kind, M)),
        lambda: own.append(Action(S + 1, "F", 0)),
        lambda: ranks.append([own[i]]),
        lambda: ranks.append([]),
    ]
    rng.choice(breaks)()
    with pytest.raises(ValueError, match="; "):
        Schedule(ranks)


def test_the_advice_for_a_deadlock_works():
    """Each move breaks a cycle; after some of them the order is valid."""
    rng = random.Random(0)
    advised = 0
    for _ in range(60):
        ranks = random_ranks(rng, num_stages=4, num_micro_batches=3, split=0.3)
        for own in ranks:
            if rng.random() < 0.5:  # B of a stage before B of the stage after
                own.sort(key=lambda a: (a.micro_batch, "FBIW".index(a.kind), a.stage))
        while problem := deadlock(ranks):
            advised += 1
            assert advised < 1000
            words = problem.split(". Put ")[1].split()
            rank, head = int(words[-1]), Action.parse(words[-4])
            moved = [Action.parse(w) for w in words[: words.index("before")][::2]]
            rest = [action for action in ranks[rank] if action not in moved]
            at = rest.index(head)
            ranks[rank] = rest[:at] + moved + rest[at:]
    assert advised > 10


def deadlock(ranks):
    """Return what a schedule says about these ranks, nothing if it is valid."""
    try:
        Schedule(ranks)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "0F0 0B0 0F1 0B1\n1F1 1F0 1B0 1B1",
            "this order never ends: rank 0 waits at step 1, 0B0, for the gradient of "
            "1B0, which rank 1 does after 1F1; rank 1 waits at step 0, 1F1, for the "
            "activations of 0F1, which rank 0 does after 0B0. Cycle of ranks: "
            "0 -> 1 -> 0. Put 0F1 before 0B0 on rank 0",
        ),
        (
            "0F0 0F1 0B0 0B1\n1F0 1F1 1B0 1B1\n2F0 2B1 2F1 2B0",
            "rank 2 has 2F1 at step 2, 2B1 at step 1; backward uses",
        ),
        (
            "0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1\n2F0 2F1 2B0 2B1",
            "rank 0 waits at step 2, 0B0, for the gradient of 1B0, which rank 1 cannot "
            "start; rank 1 waits at step 1, 1B0, for the gradient of 2B0, which rank 2 "
            "does after 2F1; rank 2 waits at step 1, 2F1, for the activations of 1F1, "
            "which rank 1 does after 1B0. Cycle of ranks: 1 -> 2 -> 1. Put 1F1 before "
            "1B0 on rank 1",
        ),
        ("1F0 0F0 0B0 1B0", "Cycle of ranks: 0 -> 0. Put 0F0 before 1F0 on rank 0"),
        ("0F0 0B0\n1F0", "stage 1 on rank 1 does F for micro-batch 0; it needs F, and"),
        (
            "0F0 0B0 0F1 0B1\n1F0 1B0",
            "stage 1 on rank 1 does nothing for micro-batch 1",
        ),
        ("0F0 0B0 0I0 0W0", "stage 0 on rank 0 does F and B and I and W"),
        ("0B0 0F0", "rank 0 has 0F0 at step 1, 0B0 at step 0; backward uses"),
        ("0F0 0W0 0I0", "0I0 at step 2, 0W0 at step 1"),
        ("0F0 0F0 0B0", "0F0 comes twice on rank 0, at steps 0 and 1"),
        ("0F0 0B0\n2F0 2B0", "no rank has stage 1, but rank 1 has stage 2"),
        ("0F0 0B0\n0F1 0B1", "stage 0 is on rank 0, but 0F1 is on rank 1"),
        ("0F0 x", "'x' is not an action; write stage, kind"),
        ("0F0 0B0 -1F0", "'-1F0' is not an action"),
        ("rank 1 | 0F0 0B0", "a line says rank 1, but is that of rank 0"),
        ("0F0 0B0\nrank 1 | .", "rank 1 of 2 has no action"),
        ("", "a schedule of no ranks"),
    ],
)
def test_the_text_for_a_wrong_schedule(text, problem):
    with pytest.raises(ValueError) as raised:
        parse(text)
    assert problem in str(raised.value)


@pytest.mark.parametrize(
    "wrong",
    ["0F0", (0, "F", 0), Action(0, "X", 0), Action(-1, "F", 0), Action(0, "F", 0.5)],
)
def test_a_schedule_takes_actions_only(wrong):
    with pytest.raises(ValueError, match="on rank 0 is not an action; use Action"):
        Schedule([[wrong]])


def test_an_action_reads_its_own_text():
    for action in (Action(12, "F", 3), Action(0, "W", 10)):
        assert Action.parse(str(action)) == action
    for text in ("F3", "2f5", "2F", "2 F 5", "2F5 ", ""):
        with pytest.raises(ValueError, match="such as 2F5"):
            Action.parse(text)
