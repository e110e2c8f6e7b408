import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from labpkg import bench
from labpkg.bench import measure
from labpkg.bench.measure import MIN_QUIET, Sample, alternate, compare


def quiet(wall_s, cpu_s=1.0):
    return Sample(wall_s=wall_s, cpu_s=cpu_s, foreign_share=0.02)


def noisy(wall_s, cpu_s=1.0, share=0.6):
    return Sample(wall_s=wall_s, cpu_s=cpu_s, foreign_share=share)


def test_order_rotates_and_all_are_called_equally_often(world2):
    def record():
        order = []
        variants = {name: lambda name=name: order.append(name) for name in "abc"}
        samples = alternate(variants, num_rounds=3, warm_up=1, sample_s=1e-9)
        return "".join(order), {name: len(s) for name, s in samples.items()}

    for order, counts in world2.run(record):
        assert order == "abc" + "abc" + "abc" + "bca" + "cab"
        assert counts == {"a": 3, "b": 3, "c": 3}


@pytest.mark.parametrize(("sample_s", "num_calls"), [(0.11, 6), (0.001, 1)])
def test_a_sample_has_calls_enough_to_be_long(monkeypatch, sample_s, num_calls):
    taken = []

    def sample(call, n, cpu_clock):
        taken.append(n)
        return quiet(0.02 if call is int else 1.0)  # the first one decides

    monkeypatch.setattr(measure, "_sample", sample)
    alternate({"a": int, "b": str}, num_rounds=1, warm_up=0, sample_s=sample_s)
    assert taken == [1, 1, num_calls, num_calls]
    taken.clear()
    alternate({"a": int, "b": int}, num_rounds=1, warm_up=0, sample_s=0.0)
    assert taken == [1, 1]  # no call to find out how long one takes


def test_one_process_can_be_measured_without_ranks():
    assert not dist.is_initialized()
    calls = {"a": lambda: time.sleep(0.002), "b": lambda: time.sleep(0.02)}
    samples = alternate(calls, num_rounds=3, warm_up=0, sample_s=0.0)
    assert compare(samples, base="a", config="")[1]["wall_ratio"] > 1.5
    assert not dist.is_initialized()


def test_what_was_begun_is_settled_outside_the_samples():
    pending, taken = [], []

    def settle():
        taken.append(len(pending))
        pending.clear()
        time.sleep(0.05)

    begin = {"begin": lambda: pending.append(1), "nothing": int}
    options = {"warm_up": 1, "sample_s": 0.0, "settle": settle}
    samples = bench.alternate(begin, num_rounds=2, **options)
    assert taken == [1, 0, 1, 0, 0, 1]  # after the warm-up, two rounds
    assert max(s.wall_s for column in samples.values() for s in column) < 0.05


def test_the_clock_of_cpu_seconds_can_be_another():
    seconds = iter((10.0, 17.0))
    options = {"warm_up": 0, "sample_s": 0.0, "cpu_clock": lambda: next(seconds)}
    (sample,) = alternate({"a": int}, num_rounds=1, **options)["a"]
    assert sample.cpu_s == 7.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alternate({}, num_rounds=3), "0 variants in num_rounds=3"),
        (lambda: alternate({"a": int}, num_rounds=0), "1 variants in num_rounds=0"),
        (lambda: compare({"a": []}, base="b", config=""), "base='b' was not measured"),
    ],
)
def test_nothing_to_measure_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("busy_s", "share"), [(5.0, 0.1), (2.0, 0.0)])
def test_a_sample_is_of_one_call_and_own_work_is_not_foreign(
    monkeypatch, busy_s, share
):
    """2 calls in 4 s on 5 cores, with 3 CPU-seconds of their own."""
    clock = SimpleNamespace(perf_counter=iter((10.0, 14.0)).__next__)
    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(measure, "_busy_s", iter((100.0, 100.0 + busy_s)).__next__)
    monkeypatch.setattr(measure.os, "cpu_count", lambda: 5)
    sample = measure._sample(int, 2, iter((1.0, 4.0)).__next__)
    assert sample == Sample(wall_s=2.0, cpu_s=1.5, foreign_share=share)
    assert sample.is_quiet  # up to QUIET_SHARE


def test_ranks_agree_on_every_number(world2):
    def uneven():
        work = lambda: time.sleep(0.02 if dist.get_rank() else 0.0)
        return alternate({"a": work}, num_rounds=2, sample_s=1e-9)["a"]

    mine, theirs = world2.run(uneven)
    assert mine == theirs
    assert all(sample.wall_s >= 0.02 for sample in mine)


def test_cpu_seconds_are_summed_over_ranks_and_do_not_see_waiting(world2):
    def burn():
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass

    def run():
        variants = {"work": burn, "wait": lambda: time.sleep(0.05)}
        return alternate(variants, num_rounds=1, warm_up=0, sample_s=1e-9)

    samples = world2.run(run)[0]
    assert samples["work"][0].cpu_s >= 0.1
    assert samples["wait"][0].cpu_s < 0.05


@pytest.mark.parametrize(("busy", "expected"), [(1e9, 4), (0.0, 2), (None, 2)])
def test_a_busy_machine_gets_more_rounds(world2, busy, expected):
    def run():
        now = iter(range(1000))
        measure._busy_s = lambda: None if busy is None else next(now) * busy
        return alternate({"a": int}, num_rounds=2, max_rounds=4, sample_s=1e-9)["a"]

    samples = world2.run(run)[0]
    assert len(samples) == expected
    assert samples[0].is_quiet == (busy != 1e9)
    assert (samples[0].foreign_share is None) == (busy is None)


def test_ratios_are_medians_of_quiet_pairs():
    base = [quiet(t) for t in (1.0, 2.0, 4.0, 1.0, 2.0)] + [noisy(1.0)] * 6
    twice = [quiet(2 * s.wall_s, 9 * s.cpu_s) for s in base[:5]]
    twice += [noisy(99.0, 3.0)] * 6  # CPU-seconds of all pairs count
    row = compare({"base": base, "new": twice}, base="base", config="here")[1]
    assert row == {
        "config": "here",
        "variant": "new",
        "wall_ratio": 2.0,
        "cpu_ratio": 3.0,
        "samples": 5,
        "value": 4000.0,
        "unit": "ms",
    }


def test_a_pair_is_noisy_if_the_base_was():
    base = [noisy(10.0), *[quiet(1.0)] * 6]
    row = compare({"base": base, "new": [quiet(1.0)] * 7}, base="base", config="")[1]
    assert (row["samples"], row["wall_ratio"]) == (6, 1.0)


def test_without_enough_quiet_pairs_the_quietest_count():
    shares = [0.9, 0.8, 0.6, 0.2, 0.3, 0.02, 0.4]
    base = [noisy(1.0, share=share) for share in shares]
    new = [noisy(5.0 if share > 0.5 else 1.5, share=0.01) for share in shares]
    row = compare({"base": base, "new": new}, base="base", config="")[1]
    assert MIN_QUIET == 5
    assert (row["samples"], row["wall_ratio"]) == (1, 1.5)


def test_the_base_has_ratio_1():
    samples = {"base": [quiet(t, t) for t in (1.0, 3.0, 2.0)]}
    (row,) = compare(samples, base="base", config="")
    assert (row["wall_ratio"], row["cpu_ratio"], row["value"]) == (1.0, 1.0, 2000.0)


def test_load_is_read_from_the_system_or_unknown(monkeypatch, tmp_path):
    stat = tmp_path / "stat"
    monkeypatch.setattr(measure, "_STAT", stat)
    assert measure._busy_s() is None
    stat.write_text("cpu  100 20 30 4000 500 6 7 8 9 10\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    monkeypatch.setattr(measure.os, "sysconf", lambda _: 100)
    assert measure._busy_s() == pytest.approx(1.71)  # not idle, not waiting for disks


def test_the_harness_is_public_in_the_package():
    assert (bench.alternate, bench.compare, bench.Sample) == (
        alternate,
        compare,
        Sample,
    )
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        bench.no_such  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("uses_gpu", [False, True])
def test_what_is_queued_on_a_gpu_is_in_the_sample(monkeypatch, uses_gpu):
    done = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: uses_gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("queue"))
    work = {"work": lambda: done.append("call")}
    alternate(work, num_rounds=1, warm_up=0, sample_s=0.0)
    assert done == (["queue", "call", "queue"] if uses_gpu else ["call"])
