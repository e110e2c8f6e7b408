"""Times and bytes of communication: the formulas against the algorithms as they run."""

import math
import queue
import threading
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labpkg.planning.communication import (
    AlphaBeta,
    Level,
    all_reduce_time,
    all_reduce_wire_bytes,
    crossover_bytes,
    hierarchical_all_reduce_time,
    level_between,
)
from labpkg.planning.cost import wire_bytes
from labpkg.processes import algorithms

NAMES = ["ring", "tree", "recursive_doubling"]
LINK = AlphaBeta(3e-4, 2e-9)


class Clocks:
    """Ranks as threads; each has a clock, and a message takes what the link says."""

    def __init__(self, n, link):
        self.n, self.link = n, link
        self.me, self.clock = threading.local(), [0.0] * n
        self.sent = [0] * n
        pairs = [(a, b) for a in range(n) for b in range(n)]
        self.mail = {pair: queue.Queue() for pair in pairs}
        self.receipts = {pair: queue.Queue() for pair in pairs}

    def axis_of(self, _):
        return SimpleNamespace(size=self.n, rank=self.me.rank)

    def post(self, x, dst):
        self.sent[self.me.rank] += x.nbytes
        self.mail[self.me.rank, dst].put((self.clock[self.me.rank], x.clone()))

    def fetch(self, src):
        """Return the message and when it is there: both ends had to be ready."""
        rank = self.me.rank
        ready, x = self.mail[src, rank].get(timeout=20)
        end = max(ready, self.clock[rank]) + self.link.time_s(x.nbytes)
        self.receipts[src, rank].put(end)
        return x, end

    def send(self, x, dst, _):
        self.post(x, dst)
        self.clock[self.me.rank] = self.receipts[self.me.rank, dst].get(timeout=20)

    def recv(self, _like, src, _):
        x, self.clock[self.me.rank] = self.fetch(src)
        return x

    def sendrecv(self, x, _like, *, dst, src, mesh):
        self.post(x, dst)
        theirs, end = self.fetch(src)
        mine = self.receipts[self.me.rank, dst].get(timeout=20)
        self.clock[self.me.rank] = max(end, mine)
        return theirs

    def run(self, reduce, inputs):
        results = [None] * self.n

        def work(rank):
            self.me.rank = rank
            results[rank] = reduce(inputs[rank])

        threads = [threading.Thread(target=work, args=(r,)) for r in range(self.n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        return results


@pytest.mark.parametrize("n", range(1, 10))
@pytest.mark.parametrize("name", NAMES)
def test_formulas_are_what_the_algorithm_takes(name, n, monkeypatch):
    clocks = Clocks(n, LINK)
    for function in ("axis_of", "send", "recv", "sendrecv"):
        monkeypatch.setattr(algorithms, function, getattr(clocks, function))
    inputs = [torch.arange(10080.0) + r for r in range(n)]  # divisible by 1 to 9
    results = clocks.run(getattr(algorithms, f"{name}_all_reduce"), inputs)
    for result in results:
        torch.testing.assert_close(result, sum(inputs))
    num_bytes = inputs[0].nbytes
    predicted = all_reduce_time(num_bytes, n, LINK, algorithm=name)
    assert max(clocks.clock) == pytest.approx(predicted)
    assert clocks.sent == all_reduce_wire_bytes(num_bytes, n, algorithm=name)


@given(n=st.integers(1, 300), num_bytes=st.integers(0, 2**40))
def test_the_ring_sends_the_least(n, num_bytes):
    ring, tree, doubling = (
        all_reduce_wire_bytes(num_bytes, n, algorithm=name) for name in NAMES
    )
    assert ring == [pytest.approx(wire_bytes("all_reduce", num_bytes, n))] * n
    assert sum(tree) == pytest.approx(sum(ring)) == 2 * (n - 1) * num_bytes
    assert sum(doubling) >= sum(tree)
    assert max(tree) == tree[0]
    assert len(ring) == len(tree) == len(doubling) == n


@given(
    n=st.integers(1, 300),
    alpha=st.floats(1e-7, 1e-2),
    beta=st.floats(1e-12, 1e-8),
    small=st.sampled_from(NAMES),
    large=st.sampled_from(NAMES),
)
def test_the_times_cross_where_they_should(n, alpha, beta, small, large):
    link = AlphaBeta(alpha, beta)

    def gain_s(size):
        few, many = (
            all_reduce_time(size, n, link, algorithm=it) for it in (small, large)
        )
        return (few - many) / (few + many or 1)

    size = crossover_bytes(n, link, small=small, large=large)
    if size == math.inf:
        assert gain_s(1e18) < 0
    elif size == 0:
        assert gain_s(1) >= 0
        assert gain_s(1e15) >= 0
    else:
        assert gain_s(size) == pytest.approx(0, abs=1e-9)
        assert gain_s(size / 2) < 0 < gain_s(2 * size)


def test_crossover_of_four_ranks_by_hand():
    assert crossover_bytes(4, LINK) == pytest.approx(8 * LINK.half_bytes)
    assert crossover_bytes(2, LINK) == math.inf  # as many bytes, one round less
    assert crossover_bytes(4, AlphaBeta(1e-4, 0.0)) == math.inf
    assert crossover_bytes(4, AlphaBeta(0.0, 1e-9)) == 0
    assert crossover_bytes(8, LINK, small="tree", large="recursive_doubling") == 0


samples_of = st.lists(
    st.tuples(st.integers(0, 10**9), st.floats(1e-6, 10)),
    min_size=2,
    max_size=12,
    unique_by=lambda sample: sample[0],
)


@given(alpha=st.floats(1e-7, 1e-2), beta=st.floats(1e-12, 1e-7))
def test_the_fit_finds_an_exact_link(alpha, beta):
    link = AlphaBeta(alpha, beta)
    samples = [(4**k, link.time_s(4**k)) for k in range(14)]
    found = AlphaBeta.fit(samples)
    assert found.alpha_s == pytest.approx(alpha, rel=1e-6)
    assert found.beta_s_per_byte == pytest.approx(beta, rel=1e-6)
    assert found.error(samples).max < 1e-6


@given(samples=samples_of, step=st.sampled_from([-1e-3, 1e-3]))
@settings(deadline=None)
def test_no_neighbour_of_the_fit_is_better(samples, step):
    link = AlphaBeta.fit(samples)

    def cost(alpha, beta):
        # Exact, since neighbours differ in the last digits.
        a, b = Fraction(alpha), Fraction(beta)
        return sum(((a + size * b) / Fraction(t) - 1) ** 2 for size, t in samples)

    alpha, beta = link.alpha_s, link.beta_s_per_byte
    best, slack = cost(alpha, beta), 1 + Fraction(1, 10**6)
    move_s = step * max(t for _, t in samples)
    for a, b in [(alpha + move_s, beta), (alpha, beta * (1 + step) + abs(step) * 1e-9)]:
        if a >= 0 and b >= 0:
            assert best <= cost(a, b) * slack + Fraction(1, 10**12)


def test_the_fit_never_goes_below_zero():
    falling = [(1, 2.0), (10, 1.0)]
    link = AlphaBeta.fit(falling)
    assert (link.alpha_s, link.beta_s_per_byte) == (pytest.approx(1.2), 0.0)
    steep = [(10, 1.0), (20, 3.0)]
    link = AlphaBeta.fit(steep)
    assert (link.alpha_s, link.beta_s_per_byte) == (0.0, pytest.approx(3 / 26))


def test_the_fit_is_relative():
    """One microsecond at 64 bytes counts as much as a tenth of a second at 64 MB."""
    link = AlphaBeta(1e-5, 1e-9)
    samples = [(4**k, link.time_s(4**k)) for k in range(3, 14)]
    disturbed = [*samples[:-1], (samples[-1][0], samples[-1][1] * 1.5)]
    assert AlphaBeta.fit(disturbed).alpha_s == pytest.approx(1e-5, rel=0.1)


def test_error_is_relative_to_the_measurement():
    link = AlphaBeta(1.0, 0.0)
    assert link.error([(1, 2.0), (5, 0.8)]) == (pytest.approx(0.375), 0.5)
    assert link.error([(1, 1.0)]).max == 0


def test_half_of_the_time_is_latency_at_half_bytes():
    assert LINK.time_s(LINK.half_bytes) == pytest.approx(2 * LINK.alpha_s)
    assert AlphaBeta(1.0, 0.0).half_bytes == math.inf


MACHINE = [
    Level("socket", 2, AlphaBeta(1e-6, 1e-11)),
    Level("node", 3, AlphaBeta(2e-6, 1e-10)),
    Level("network", 4, AlphaBeta(1e-5, 1e-9)),
]


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        (0, 1, "socket"),
        (1, 2, "node"),
        (5, 0, "node"),
        (5, 6, "network"),
        (23, 0, "network"),
        (22, 23, "socket"),
    ],
)
def test_ranks_meet_at_the_innermost_common_level(first, second, name):
    assert level_between(MACHINE, first, second).name == name


def test_level_by_level_is_reduce_scatter_all_reduce_all_gather():
    S, t = 1e6, 0.0
    inside, across, outside = (level.link for level in MACHINE)
    t += 2 * 1 * inside.time_s(S / 2)  # scatter 2 pieces, and gather them again
    t += 2 * 2 * across.time_s(S / 2 / 3)
    t += 2 * 3 * outside.time_s(S / 6 / 4)
    assert hierarchical_all_reduce_time(S, MACHINE) == pytest.approx(t)
    one = [Level("node", 8, LINK)]
    assert hierarchical_all_reduce_time(S, one) == all_reduce_time(S, 8, LINK)
    assert hierarchical_all_reduce_time(S, []) == 0


def test_the_levels_send_no_more_than_one_ring():
    """The bytes are those of a single ring, however the ranks are divided."""
    free = AlphaBeta(0.0, 1.0)
    levels = [Level("a", 2, free), Level("b", 3, free), Level("c", 4, free)]
    flat = all_reduce_time(1.0, 24, free)
    assert hierarchical_all_reduce_time(1.0, levels) == pytest.approx(flat)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AlphaBeta(-1e-6, 1e-9), r"alpha_s=-1e-06 .* at least 0; give"),
        (lambda: AlphaBeta(1e-6, math.inf), r"beta_s_per_byte=inf .* finite"),
        (lambda: AlphaBeta.fit([(8, 1.0), (8, 2.0)]), "2 different sizes .*got 1"),
        (lambda: AlphaBeta.fit([]), "got 0"),
        (lambda: AlphaBeta.fit([(8, 1.0), (9, 0.0)]), r"sample \(9.0 bytes, 0.0 s\)"),
        (lambda: AlphaBeta.fit([(-8, 1.0), (9, 1.0)]), r"\(-8.0 bytes"),
        (lambda: LINK.error([]), "at least 1 different sizes"),
        (lambda: all_reduce_time(8, 0, LINK), "n=0 .* at least 1"),
        (lambda: all_reduce_time(-8, 2, LINK), "num_bytes=-8 must be"),
        (
            lambda: all_reduce_time(8, 2, LINK, algorithm="star"),
            "'star' is unknown; choose one of ring, tree",
        ),
        (lambda: all_reduce_wire_bytes(math.nan, 2), "num_bytes=nan"),
        (lambda: all_reduce_wire_bytes(8, 0), "n=0"),
        (lambda: crossover_bytes(4, LINK, small="star"), "'star' is unknown"),
        (lambda: Level("node", 0, LINK), "'node' has size=0"),
        (lambda: level_between(MACHINE, 3, 3), "two different ranks .* 24"),
        (lambda: level_between(MACHINE, 0, 24), "from 0 to 23"),
        (lambda: level_between(MACHINE, -1, 2), "ranks -1 and 2"),
        (lambda: hierarchical_all_reduce_time(-1, MACHINE), "num_bytes=-1"),
    ],
)
def test_bad_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def wire(name):
    import torch.distributed as dist

    import labpkg as lab

    with lab.count_comms() as log:
        getattr(lab, f"{name}_all_reduce")(torch.ones(12) * dist.get_rank())
    return log["world"].wire_bytes


@pytest.mark.parametrize("name", NAMES)
def test_counted_bytes_are_the_formula(world4, name):
    assert world4.run(wire, name) == all_reduce_wire_bytes(48, 4, algorithm=name)
