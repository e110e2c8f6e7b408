"""`batches` with workers: the same batches, readable errors, nothing left behind."""

import contextlib
import gc
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

import labpkg as lab
from labpkg.foundations.data import _moved, batches
from labpkg.foundations.workers import WorkerTraceback, _how_it_ended, map_ahead

DATA = TensorDataset(torch.rand(23, 2, generator=torch.Generator().manual_seed(0)))


class Numbers(Dataset):
    """A data set of single samples that may do something when one is read."""

    def __init__(self, read=lambda i: None) -> None:
        self.read = read

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int):
        self.read(index)
        return torch.tensor(float(index)), index


def noisy(columns, positions):
    """Add noise that is a function of the position of a sample."""
    noise = [np.random.default_rng((3, p)).normal(size=2) for p in positions.tolist()]
    noise = torch.tensor(np.array(noise).reshape(-1, 2), dtype=torch.float32)
    return (columns[0] + noise, *columns[1:])


def drawn(data=DATA, **options):
    options = {"global_batch_size": 4, "seed": 7} | options
    return list(batches(data, **options))


def stream(data=DATA, **options):
    options = {"global_batch_size": 4, "seed": 7, "num_workers": 1} | options
    return batches(data, **options)


def are_equal(a, b):
    """Compare two lists of batches bit by bit."""
    return len(a) == len(b) and all(
        torch.equal(x, y) and x.dtype == y.dtype
        for rows in zip(a, b, strict=True)
        for x, y in zip(*rows, strict=True)
    )


def comes_down_to(num_fds):
    """Wait up to 2 s until so few files are open: torch's threads close some late."""
    gc.collect()
    deadline = time.monotonic() + 2
    while psutil.Process().num_fds() > num_fds and time.monotonic() < deadline:
        time.sleep(0.01)
    return psutil.Process().num_fds() <= num_fds


@pytest.fixture(autouse=True)
def no_process_left():
    """Whatever a test does to its workers: none is left, not even as a zombie."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    gc.collect()
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        now = {child.pid for child in psutil.Process().children(recursive=True)}
        if now <= before:
            return
        time.sleep(0.01)
    pytest.fail(f"left: {[psutil.Process(pid) for pid in now - before]}")


# ---- the same batches ----------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"steps": 9, "start_step": 3}, {"prefetch": 1}]
)
def test_workers_change_no_bit(num_workers, options):
    expected = {k: v for k, v in options.items() if k != "prefetch"}
    for transform in (None, noisy):
        got = drawn(num_workers=num_workers, transform=transform, **options)
        assert are_equal(got, drawn(transform=transform, **expected))


def test_a_dataset_of_single_samples_and_of_windows():
    for data in (Numbers(), lab.stdlib_text("validation", sequence_length=8)):
        assert are_equal(
            drawn(data, num_workers=2, steps=4), drawn(data, steps=4, num_workers=0)
        )


class Axis:
    def __init__(self, rank, num_ranks):
        self.rank, self.num_ranks = rank, num_ranks

    def size(self):
        return self.num_ranks

    def get_local_rank(self):
        return self.rank


def test_shards_also_empty_ones():
    for rank in range(3):
        options = {"shard": Axis(rank, 3), "global_batch_size": 2, "transform": noisy}
        got = drawn(num_workers=2, **options)
        assert are_equal(got, drawn(**options))
        assert (rank == 0) == all(len(x) == 0 for (x,) in got)


def _in_a_rank(num_workers):
    mesh = lab.make_mesh(dp=2)["dp"]
    options = {"global_batch_size": 5, "steps": 6, "seed": 7, "shard": mesh}
    return list(lab.batches(DATA, transform=noisy, num_workers=num_workers, **options))


def test_workers_of_ranks(world2):
    whole = drawn(transform=noisy, global_batch_size=5, steps=6)
    parts = world2.run(_in_a_rank, 2)
    together = [(torch.cat([x, y]),) for (x,), (y,) in zip(*parts, strict=True)]
    assert are_equal(together, whole)
    assert are_equal(world2.run(_in_a_rank, 0)[1], parts[1])


def test_batches_are_made_by_other_processes_ahead_of_time():
    def who(columns, positions):
        return (torch.full((len(positions),), os.getpid()),)

    rows = [x.tolist() for (x,) in stream(num_workers=2, transform=who)]
    processes = [set(row) for row in rows]
    assert all(len(row) == 1 for row in processes)
    assert set.union(*processes[::2]) != set.union(*processes[1::2])
    assert os.getpid() not in set.union(*processes)


def test_waiting_is_shared_and_prefetched():
    def slow(columns, positions):
        time.sleep(0.15)
        return columns

    def seconds(**options):
        began = time.monotonic()
        assert len(drawn(global_batch_size=2, transform=slow, **options)) == 12
        return time.monotonic() - began

    alone = seconds()
    assert alone >= 12 * 0.15
    assert seconds(num_workers=6) < 0.7 * alone  # most of that is a busy machine


def test_the_generators_of_the_caller_are_left_alone():
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(3), random.random()
    torch.manual_seed(5)
    random.seed(5)
    drawn(num_workers=2)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]


def test_global_generators_of_workers_differ_and_repeat():
    def draw(columns, positions):
        size = len(positions)
        columns = torch.rand(size), torch.from_numpy(np.random.rand(size))
        return (*columns, torch.full((size,), random.random()))

    first, again = (drawn(num_workers=2, transform=draw) for _ in range(2))
    assert are_equal(first, again)
    for ours, others in zip(first[0], first[1], strict=True):
        assert not torch.equal(ours, others)


def test_tensors_arrive_on_the_default_device():
    with torch.device("meta"):
        it = stream(transform=lambda columns, _: (columns[0] + 1,))
        assert next(it)[0].device.type == "meta"
    del it


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16),
        *(torch.bfloat16, torch.float64, torch.complex64),
    ],
)
def test_any_dtype_and_shape_arrives(dtype):
    def several(columns, positions):
        wide = torch.arange(60).view(4, 3, 5).to(dtype)
        return wide, wide.transpose(1, 2), wide[:, :0], wide[:, 0, 0], columns[0]

    got = next(stream(transform=several))
    assert are_equal([got], [next(stream(transform=several, num_workers=0))])
    got[0].zero_()  # it is the reader's own memory
    assert not got[0].any()
    assert got[1].any()


def test_values_that_torch_conjugates_later_arrive():
    def lazy(columns, positions):
        x = torch.arange(8).view(4, 2).to(torch.complex64) * (1 + 2j)
        return x.conj(), x.conj().imag

    got = next(stream(transform=lazy))
    assert are_equal([got], [next(stream(transform=lazy, num_workers=0))])


def test_large_batches_arrive():
    def large(columns, positions):
        return (positions[:, None] + torch.arange(10**6),)

    for k, (x,) in enumerate(stream(num_workers=2, transform=large, steps=4)):
        assert torch.equal(x[:, 7], torch.arange(4) + 4 * k + 7)


def test_batches_that_are_kept_keep_no_file_open():
    before = psutil.Process().num_fds()
    kept = drawn(num_workers=1, steps=40)
    assert comes_down_to(before)
    assert are_equal(kept, drawn(steps=40))


# ---- errors --------------------------------------------------------------------------


def divide_by_zero_at(sample):
    return lambda i: 1 / (i - sample)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_names_its_sample(num_workers):
    data = Numbers(divide_by_zero_at(11))
    with pytest.raises(ZeroDivisionError, match="division by zero") as caught:
        drawn(data, num_workers=num_workers)
    assert caught.value.__notes__ == ["in sample 11 of the data"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_the_transform_names_its_positions(num_workers):
    def fail(columns, positions):
        if 9 in positions:
            raise KeyError("no such word")
        return columns

    order = torch.cat([y for _, y in drawn(Numbers())]).tolist()
    with pytest.raises(KeyError, match="no such word") as caught:
        drawn(Numbers(), num_workers=num_workers, transform=fail)
    assert caught.value.__notes__ == [
        f"in the transform of positions 8 up to 12, which are the samples {order[8:12]}"
    ]


def test_the_traceback_of_a_worker_begins_at_the_readers_line():
    with pytest.raises(ZeroDivisionError) as caught:
        drawn(Numbers(divide_by_zero_at(3)), num_workers=1)
    assert isinstance(caught.value.__cause__, WorkerTraceback)
    lines = str(caught.value.__cause__).splitlines()
    files = [line for line in lines if line.startswith("  File")]
    assert len(files) == 2
    assert all(__file__ in line for line in files)
    assert "return lambda i: 1 / (i - sample)" in str(caught.value.__cause__)
    assert lines[-2:] == ["in sample 3 of the data", '"""']


class TwoArgumentsError(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def test_an_error_that_cannot_be_pickled_keeps_its_text():
    def fail(columns, positions):
        raise TwoArgumentsError("this", "that")

    with pytest.raises(RuntimeError, match="in the transform") as caught:
        next(stream(transform=fail))
    assert "TwoArgumentsError: this and that" in str(caught.value.__cause__)


def test_leaving_is_an_error():
    with pytest.raises(RuntimeError, match=r"the worker left by SystemExit\(3\)"):
        next(stream(transform=lambda columns, _: sys.exit(3)))


def test_what_cannot_be_sent_is_refused():
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"requires grad.*num_workers=0"):
        next(stream(transform=lambda columns, _: (columns[0] * weight,)))
    with pytest.raises(ValueError, match=r"on a device.*num_workers=0"):
        next(stream(transform=lambda columns, _: (columns[0].to("meta"),)))
    with pytest.raises(ValueError, match=r"of layout torch\.sparse_coo"):
        next(stream(transform=lambda columns, _: (columns[0].to_sparse(),)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_transform_of_another_kind_is_refused(num_workers):
    with pytest.raises(TypeError, match="returned a NoneType"):
        next(stream(transform=lambda *_: None, num_workers=num_workers))


def _fails_in_a_rank():
    mesh = lab.make_mesh(dp=2)["dp"]
    data = Numbers(divide_by_zero_at(5))
    options = {"global_batch_size": 4, "seed": 7, "shard": mesh}
    for _ in lab.batches(data, num_workers=2, **options):
        lab.barrier(mesh)


def test_an_error_in_a_worker_of_a_rank(world2):
    with pytest.raises(lab.RankError) as caught:
        world2.run(_fails_in_a_rank)
    assert "return lambda i: 1 / (i - sample)" in caught.value.traceback
    assert "in sample 5 of the data" in caught.value.traceback


# ---- workers that hang or die --------------------------------------------------------


def loop(columns, positions):
    while True:
        pass


def loop_in_c(columns, positions):
    sum(iter(int, 1))


def stop(columns, positions):
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep(columns, positions):
    time.sleep(1000)


@pytest.mark.parametrize("hang", [loop, loop_in_c, sleep, stop])
def test_a_worker_that_hangs_ends_at_the_limit(hang):
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="the batch of step 0 did not arrive") as it:
        next(stream(transform=hang, num_workers=2, worker_timeout_s=0.5))
    assert 0.5 <= time.monotonic() - began < 3
    assert "worker 0 (process " in str(it.value)
    where = "is stopped" if hang is stop else f"in {hang.__name__}"
    assert where in str(it.value).splitlines()[-1]


def test_a_late_batch_of_a_later_step_is_named():
    def late(columns, positions):
        if 12 in positions:
            time.sleep(1000)
        return columns

    it = stream(num_workers=2, transform=late, worker_timeout_s=0.5, steps=9)
    with pytest.raises(TimeoutError, match=r"the batch of step 3 .*: worker 1 "):
        list(it)


def test_there_may_be_no_limit():
    def slow(columns, positions):
        time.sleep(0.3)
        return columns

    assert len(next(stream(transform=slow, worker_timeout_s=math.inf))[0]) == 4
    with pytest.raises(TimeoutError):
        next(stream(transform=slow, worker_timeout_s=0.1))


@pytest.mark.parametrize(
    ("die", "how"),
    [
        (
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            "killed by SIGKILL, as when mem",
        ),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "killed by SIGSEGV"),
        (lambda: os._exit(4), "exited with status 4"),
    ],
)
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_worker_that_dies_is_named(die, how, in_thread):
    def transform(columns, positions):
        if 5 in positions:
            die()
        return columns

    errors = []

    def read():
        try:
            drawn(num_workers=2, transform=transform, worker_timeout_s=2)
        except RuntimeError as error:
            errors.append(str(error))

    if in_thread:  # where torch's handler of SIGCHLD cannot raise
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    else:
        read()
    (message,) = errors
    assert message.startswith("worker 1 (process ")
    assert how in message
    assert "at the batch of step 1" in message


def test_a_signal_without_a_name_is_a_number():
    assert _how_it_ended(-50) == "was killed by signal 50"  # of those for real time


def test_the_next_run_works_after_a_failure():
    with pytest.raises(TimeoutError):
        next(stream(transform=loop, worker_timeout_s=0.2))
    assert are_equal(drawn(num_workers=2), drawn())


# ---- the end -------------------------------------------------------------------------


def test_an_iterator_that_is_dropped_ends_its_workers():
    # `no_process_left` looks after each of them.
    it = stream(num_workers=3)
    next(it)
    del it
    for _ in stream(num_workers=2):
        break
    for _ in range(5):
        it = stream(num_workers=4, transform=lambda columns, _: columns)
        next(it)
        it.close()
    stream(num_workers=2)  # never begun


def test_dropping_does_not_wait_for_busy_workers():
    def slow_later(columns, positions):
        time.sleep(1000 * (positions[0].item() > 0))
        return columns

    it = stream(num_workers=3, transform=slow_later)
    next(it)
    began = time.monotonic()
    it.close()
    assert time.monotonic() - began < 1


def children():
    return [child.pid for child in psutil.Process().children()]


def test_an_error_in_the_loop_ends_the_workers():
    before, started = children(), []

    def fail_in_the_loop():
        for _ in stream(num_workers=2):
            started.extend(pid for pid in children() if pid not in before)
            raise ValueError("of the reader")

    with pytest.raises(ValueError, match="of the reader"):
        fail_in_the_loop()
    assert len(started) == 2
    assert not any(pid in children() for pid in started)


def test_an_interrupt_ends_the_wait_and_the_workers():
    it = stream(num_workers=2, transform=loop)
    timer = threading.Timer(0.7, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        next(it)
    assert time.monotonic() - began < 3
    timer.join()


def test_nothing_stays_open():
    assert are_equal(drawn(num_workers=2), drawn())  # what stays open once, stays
    before = psutil.Process().num_fds()
    for k in range(10):
        hangs = {"transform": loop, "worker_timeout_s": 0.1} if k % 3 == 0 else {}
        it = stream(num_workers=2, **hangs)
        with contextlib.suppress(TimeoutError):
            next(it)
        it.close()
    assert comes_down_to(before)


def all_end(pids):
    """Wait up to 2 s until no process runs; who buries orphans is not our affair."""
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        states = [
            psutil.Process(pid).status() for pid in pids if psutil.pid_exists(pid)
        ]
        if set(states) <= {psutil.STATUS_ZOMBIE}:
            return True
        time.sleep(0.02)
    return False


def test_no_file_is_left(tmp_path, monkeypatch):
    # torch's workers make a folder with a socket here, which a killed one leaves.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    it = stream(num_workers=2)
    next(it)
    it.close()
    with pytest.raises(TimeoutError):
        next(stream(transform=loop, worker_timeout_s=0.2))
    assert not list(tmp_path.iterdir())


def _leave_workers():
    it = stream(num_workers=2)
    next(it)
    globals()["kept"] = it
    return [child.pid for child in psutil.Process().children()]


def test_the_workers_of_a_rank_end_with_its_run(world2):
    pids = [pid for of_rank in world2.run(_leave_workers) for pid in of_rank]
    assert len(pids) == 4
    assert all_end(pids)


SCRIPT = """
    import os, signal, sys, time, torch, psutil
    from torch.utils.data import TensorDataset
    import labpkg as lab

    def hang(columns, positions):
        if 4 in positions:
            while True:
                pass
        return columns

    it = lab.batches(TensorDataset(torch.zeros(20)), global_batch_size=4, seed=0,
                     num_workers=2, transform=hang)
    next(it)
    print(*[child.pid for child in psutil.Process().children()], flush=True)
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["kill", "leave"])
def test_no_worker_outlives_its_process(end):
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), end],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.stderr == ""
    assert run.returncode == (-signal.SIGKILL if end == "kill" else 0)
    pids = [int(pid) for pid in run.stdout.split()]
    assert len(pids) == 2
    assert all_end(pids)


# ---- arguments -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": -1}, "num_workers=-1 must be a whole number"),
        ({"num_workers": 1.5}, r"num_workers=1\.5 must be"),
        ({"prefetch": 2}, "prefetch=2 has no effect with num_workers=0"),
        ({"worker_timeout_s": 5}, "worker_timeout_s=5 has no effect"),
        ({"num_workers": 1, "prefetch": 0}, "prefetch=0 must be a whole number"),
        ({"num_workers": 1, "worker_timeout_s": 0}, "worker_timeout_s=0 must be"),
        ({"num_workers": 1, "worker_timeout_s": math.nan}, "worker_timeout_s=nan must"),
        ({"num_workers": 1, "worker_timeout_s": "5"}, "worker_timeout_s='5' must be"),
    ],
)
def test_bad_options_raise_at_the_call(options, message):
    with pytest.raises(ValueError, match=message):
        batches(DATA, global_batch_size=2, seed=0, **options)


def test_systems_that_cannot_fork_are_told(monkeypatch):
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(ValueError, match="can fork"):
        stream(num_workers=2)


def test_any_tasks_are_mapped_in_order():
    results = map_ahead(
        lambda a, b: (torch.tensor(a * b),),
        ((k, 2) for k in range(7)),
        num_workers=3,
        prefetch=1,
        timeout_s=30,
        seed=0,
        describe=str,
    )
    assert [x.item() for (x,) in results] == [0, 2, 4, 6, 8, 10, 12]


# ---- GPUs ----------------------------------------------------------------------------


class Recorder:
    """Stands in for a tensor: it notes how it is moved."""

    def __init__(self, device):
        self.device, self.calls = torch.device(device), []

    def pin_memory(self):
        self.calls.append("pin")
        return self

    def to(self, device, **options):
        self.calls.append((device.type, options))
        return self


def test_columns_go_to_a_gpu_from_pinned_memory_without_waiting():
    def calls(source, target):
        return _moved(Recorder(source), torch.device(target)).calls

    assert calls("cpu", "cuda") == ["pin", ("cuda", {"non_blocking": True})]
    # The copy back must be waited for, and memory of a GPU cannot be pinned.
    assert calls("cuda", "cpu") == [("cpu", {})]
    assert calls("cuda", "cuda") == [("cuda", {})]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_reading_waits_for_no_gpu(num_workers):
    expected = drawn(transform=noisy)
    with torch.device("cuda"):
        torch.zeros(1)  # a context, which workers must leave alone
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = drawn(num_workers=num_workers)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert got[0][0].device.type == "cuda"
    assert are_equal([tuple(x.cpu() for x in row) for row in got], drawn())
    with torch.device("cuda"):
        got = drawn(num_workers=2, transform=noisy)
    assert are_equal([tuple(x.cpu() for x in row) for row in got], expected)
