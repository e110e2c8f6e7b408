"""The contract of `World`, as far as nothing goes wrong."""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import random
import re
import signal
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

import labpkg as lab
from labpkg.processes.fork_server import ForkServer


def total(x):
    t = torch.full((2,), float(x))
    dist.all_reduce(t)
    return t


@dataclasses.dataclass
class Answer:
    rank: int


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)


def test_values_come_in_rank_order(world4):
    assert [v.tolist() for v in world4.run(total, 3)] == [[12.0, 12.0]] * 4
    assert world4.run(dist.get_rank) == [0, 1, 2, 3]


def test_closures_and_classes_travel(world4):
    scale = 10

    def fn(*, offset):
        Net().linear(torch.ones(1, 2)).sum().backward()
        return Answer(dist.get_rank() * scale + offset)

    got = world4.run(fn, offset=1)
    assert got == [Answer(1), Answer(11), Answer(21), Answer(31)]
    assert type(got[0]) is Answer


def test_an_attribute_that_is_called_like_a_module_of_torch_travels(world2):
    assert "torch.distributed.config" in sys.modules

    def fn(model):
        return model.config.width * dist.get_rank()

    model = lab.GPT(
        lab.GPTConfig(num_layers=1, width=8, num_heads=1, sequence_length=2)
    )
    assert world2.run(fn, model) == [0, 8]


def test_keyword_arguments_may_have_any_other_name(world2):
    assert world2.run(lambda **kw: kw, fn=1, self=2) == [{"fn": 1, "self": 2}] * 2


def test_big_values_and_small_views(world2):
    x = torch.randn(2_000_000)
    assert all(torch.equal(v, x) for v in world2.run(lambda x: x, x))
    view = world2.run(lambda: torch.zeros(10_000_000)[3:5])[0]
    assert view.untyped_storage().nbytes() < 100
    # the same holds for arguments: nothing of the large storage travels
    assert world2.run(lambda v: v.untyped_storage().nbytes(), x[:2])[0] < 100


def test_models_and_gradients(world2):
    def train():
        net = Net()
        net.linear(torch.ones(1, 2)).sum().backward()
        return net, net.linear.weight.grad

    net, grad = world2.run(train)[1]
    assert isinstance(net, Net)
    assert net.linear.weight.requires_grad
    assert net.linear.weight.grad is None
    assert grad.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_output_of_chosen_ranks(world4, capfd):
    def talk():
        print("hello")
        os.system("echo from C")
        print("no newline", end="")

    world4.run(talk)
    assert capfd.readouterr().out == "[0] hello\n[0] from C\n[0] no newline\n"
    world4.run(talk, show="all")
    lines = sorted(capfd.readouterr().out.splitlines())
    texts = ("from C", "hello", "no newline")
    assert lines == [f"[{rank}] {text}" for rank in range(4) for text in texts]
    world4.run(talk, show=2)
    assert capfd.readouterr().out.startswith("[2] hello\n")
    world4.run(talk, show=None)
    assert capfd.readouterr() == ("", "")


def test_output_is_live_and_may_be_long(world2, monkeypatch):
    seen = []

    class Out:
        def write(self, text):
            seen.append((time.monotonic(), text))

        def flush(self):
            pass

    def talk():
        for i in range(3):
            print(i)
            time.sleep(0.2)
        print("x" * 1_000_000)

    monkeypatch.setattr(sys, "stdout", Out())
    world2.run(talk)
    when = {text: t for t, text in seen}
    assert 0.25 < when["[0] 2\n"] - when["[0] 0\n"] < 2
    assert sum(len(text) for _, text in seen) > 1_000_000


def test_a_function_may_close_its_output(world2, capsys):
    def close():
        print("last words", end="")
        sys.stdout.close()
        return dist.get_rank()

    assert world2.run(close) == [0, 1]
    assert capsys.readouterr().out == "[0] last words\n"


def test_progress_bars_end_lines_with_a_carriage_return(world2, capsys):
    world2.run(lambda: print("10%\r20%\rdone\r\nend"))
    assert capsys.readouterr().out == "[0] 10%\r[0] 20%\r[0] done\r\n[0] end\n"


def test_every_run_starts_from_the_seed():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    with lab.World(2) as world, lab.World(2, seed=2**64 - 1) as other:
        first = world.run(draw)
        assert first[0] == first[1]
        assert world.run(draw) == first
        assert not set(other.run(draw)[0]) & set(first[0])


def test_every_run_gets_fresh_ranks(world2):
    def remember():
        import labpkg

        before = getattr(labpkg, "mark", None)
        labpkg.mark = 1
        return before, os.getpid()

    runs = [*world2.run(remember), *world2.run(remember)]
    assert [before for before, _ in runs] == [None] * 4
    assert len({pid for _, pid in runs}) == 4
    assert not any(psutil.pid_exists(pid) for _, pid in runs)


def test_environment_of_a_rank(world2, monkeypatch, tmp_path):
    monkeypatch.setenv("SET_IN_THE_KERNEL", "yes")
    monkeypatch.chdir(tmp_path)

    def look():
        sizes = ["WORLD_SIZE", "LOCAL_WORLD_SIZE"]
        names = ["RANK", "LOCAL_RANK", *sizes, "SET_IN_THE_KERNEL"]
        device = torch.empty(0).device.type, torch.get_default_device().type
        return [os.environ[n] for n in names], os.getcwd(), device

    device = (world2.device,) * 2
    assert world2.run(look) == [
        ([str(rank), str(rank), "2", "2", "yes"], str(tmp_path), device)
        for rank in range(2)
    ]


def test_a_cpu_rank_has_one_thread():
    assert lab.World(2, device="cpu").run(torch.get_num_threads) == [1, 1]


def test_mesh_groups_wait_longer_than_the_kernel(world2):
    def timeouts():
        group = lab.make_mesh(dp=2)["dp"].get_group()
        return [
            it._get_backend(torch.device("cpu")).options._timeout.days
            for it in (group, dist.group.WORLD)
        ]

    if world2.backend != "gloo":
        pytest.skip("asks gloo's groups; the World has NCCL")
    assert world2.run(timeouts) == [[365, 365]] * 2


def test_data_loader_workers_in_a_rank(world2):
    def load():
        data = torch.utils.data.TensorDataset(torch.arange(8.0))
        loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=2)
        return [batch[0].sum().item() for batch in loader]

    assert world2.run(load) == [[6.0, 22.0]] * 2


def test_a_rank_that_returns_early_does_not_harm_its_peers(world4):
    def uneven():
        pair = dist.new_group([0, 1])
        if dist.get_rank() > 1:
            return 0.0
        time.sleep(0.3)
        x = torch.ones(1)
        dist.all_reduce(x, group=pair)
        return x.item()

    assert world4.run(uneven) == [2.0, 2.0, 0.0, 0.0]


def test_no_time_limit():
    with lab.World(2, timeout_s=0.05) as world:
        assert world.run(lambda: time.sleep(0.2), timeout_s=None) == [None, None]
        with pytest.raises(lab.RankError, match=r"did not end within 0\.05 s"):
            world.run(time.sleep, 5)


def test_everything_listens_on_the_loopback(world4):
    def listening():
        dist.barrier()
        return [
            c.laddr.ip
            for c in psutil.Process().net_connections("inet")
            if c.status == psutil.CONN_LISTEN
        ]

    before = len(psutil.Process().net_connections("inet"))
    addresses = world4.run(listening)
    assert set().union(*addresses) == {"127.0.0.1"}
    assert len(addresses[0]) == 2  # the store and gloo
    assert len(psutil.Process().net_connections("inet")) == before


def test_several_worlds_from_threads(world2):
    results = []
    with lab.World(3) as three:

        def work(world):
            results.extend(world.run(total, 1)[0].tolist()[0] for _ in range(3))

        threads = [
            threading.Thread(target=work, args=(world,))
            for world in (world2, three, world2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(results) == [2.0] * 6 + [3.0] * 3


def launch(world, times):
    for number in range(times):
        values = world.run(total_of_both, number, show="all")
        assert values == [4.0 * number] * 4


def total_of_both(number):
    small = lab.all_reduce(torch.full((1,), float(number)))
    large = lab.all_reduce(torch.full((1000,), float(number)))  # shared memory
    assert large[-1] == small[0]
    return small.item()


def train(world, times):
    def step():
        mesh = lab.make_mesh(dp=2, tp=2)
        net = torch.nn.parallel.DistributedDataParallel(
            Net(), process_group=mesh["dp"].get_group()
        )
        net.myself = net  # a cycle: only the garbage collector could end it
        net.module.linear(torch.ones(1, 2)).sum().backward()
        return lab.all_reduce(torch.ones(1), mesh["tp"]).item()

    for _ in range(times):
        assert world.run(step, show="all") == [2.0] * 4


def open_worlds(times):
    """Open worlds and never close them."""
    kernel = psutil.Process()
    lab.World(2, device="cpu").run(dist.get_rank)
    before = len(kernel.children(recursive=True)), kernel.num_fds()
    worlds = [lab.World(2, device="cpu") for _ in range(times)]
    for world in worlds:
        assert world.run(dist.get_rank) == [0, 1]
    assert (len(kernel.children(recursive=True)), kernel.num_fds()) == before


@pytest.mark.timeout(300)
def test_launches_in_a_row_are_clean(world4, capfd):
    launch(world4, 50)
    train(world4, 5)
    open_worlds(5)
    out, err = capfd.readouterr()
    assert (err, {line.split(":")[0] for line in out.splitlines()}) == ("", {"World"})


@pytest.mark.soak
def test_500_launches_and_50_worlds_are_clean(world4, capfd):
    launch(world4, 500)
    train(world4, 50)
    open_worlds(50)
    out, err = capfd.readouterr()
    assert (err, {line.split(":")[0] for line in out.splitlines()}) == ("", {"World"})


class RunsAgain:
    """A value that starts a run while the run that returns it still waits."""

    def __setstate__(self, state):
        self.values = state["world"]().run(dist.get_rank)


def test_a_run_inside_a_run(world2):
    def outer():
        value = RunsAgain()
        value.world = lambda: lab.World(3, device="cpu")
        return value if dist.get_rank() == 1 else 0

    zero, again = world2.run(outer)
    assert (zero, again.values) == (0, [0, 1, 2])
    before = signal.getsignal(signal.SIGINT)
    assert before is signal.default_int_handler  # as we found it


def test_a_handler_of_the_kernel_is_left_alone(world2):
    seen = []
    signal.signal(signal.SIGINT, lambda *_: seen.append("mine"))
    try:
        timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
        timer.start()
        assert world2.run(lambda: time.sleep(0.6)) == [None, None]
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert seen == ["mine"]


def test_nothing_grows(world2):
    kernel, server = psutil.Process(), psutil.Process(ForkServer.get().pid)

    def size():
        world2.run(total, 1)
        time.sleep(0.1)  # the server closes its files after the last report
        files = kernel.num_fds(), server.num_fds()
        return files, kernel.num_threads(), server.num_threads(), server.children()

    before = size()
    for _ in range(20):
        world2.run(total, 1)
    assert size() == before


def test_the_fork_server_is_warm_and_fork_safe(world2):
    def modules():
        return set(sys.modules), torch.cuda.is_initialized()

    names, cuda = world2.run(modules)[0]
    warm = {"torch._dynamo", "numpy", "labpkg.processes.mesh", "labpkg.planning.cost"}
    assert warm <= names
    assert "matplotlib" not in names
    assert not cuda or world2.device == "cuda"
    server = psutil.Process(ForkServer.get().pid)
    assert server.num_threads() == 1
    assert os.getpgid(server.pid) == server.pid


def test_results_have_a_limit():
    with lab.World(2, max_result_bytes=100_000) as world:
        assert len(world.run(bytes, 90_000)[1]) == 90_000
        with pytest.raises(lab.RankError, match="max_result_bytes=100000"):
            world.run(lambda: bytes(200_000) if dist.get_rank() == 1 else None)


def test_arguments_that_cannot_be_pickled(world2):
    with pytest.raises(TypeError, match="pickle"):
        world2.run(total, threading.Lock())
    assert world2.run(dist.get_rank) == [0, 1]


@pytest.mark.parametrize("name", ["timeout_s", "show"])
def test_functions_that_want_our_arguments(world2, name):
    fn = eval(f"lambda {name}=1: {name}")
    for refused in (fn, functools.partial(fn, **{name: 5})):
        with pytest.raises(ValueError, match=f"'{name}'.*rename.*lambda$"):
            world2.run(refused)
    assert world2.run(lambda: fn(**{name: 5})) == [5, 5]
    bound = functools.partial(lambda x: x, 5)
    assert world2.run(bound) == [5, 5]


@pytest.mark.parametrize("show", [2, -1, True, "rank 0", 1.0])
def test_impossible_show(world2, show):
    with pytest.raises(ValueError, match="show="):
        world2.run(dist.get_rank, show=show)


@pytest.mark.parametrize("timeout_s", [0, -1, "60", True, float("nan")])
def test_impossible_timeout(world2, timeout_s):
    with pytest.raises(ValueError, match="timeout_s="):
        world2.run(dist.get_rank, timeout_s=timeout_s)
    with pytest.raises(ValueError, match="timeout_s="):
        lab.World(2, timeout_s=timeout_s)


@pytest.mark.parametrize(
    "request_",
    [
        {"world_size": 0},
        {"world_size": 2.0},
        {"world_size": True},
        {"device": "tpu"},
        {"backend": "mpi"},
        {"device": "cpu", "backend": "nccl"},
        {"world_size": 1000, "backend": "nccl"},
        {"max_result_bytes": 0},
        {"seed": "a"},
        {"seed": 1.0},
        {"seed": True},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_impossible_worlds(request_, monkeypatch):
    monkeypatch.setattr(ForkServer, "get", lambda: pytest.fail("a process starts"))
    with pytest.raises(ValueError):
        lab.World(**request_)


def test_a_world_says_what_it_chose(capsys):
    world = lab.World(1, device="cpu")
    assert re.match(r"World: 1 rank on cpu \(gloo\): \w+", capsys.readouterr().out)
    assert repr(world) == "World(1, device='cpu', backend='gloo')"
    assert world.run(dist.get_world_size) == [1]
    assert lab.World(device="cpu").world_size == 2


def test_close():
    world = lab.World(2)
    world.close()
    world.close()
    assert "closed" in repr(world)
    with pytest.raises(RuntimeError, match="closed"):
        world.run(total, 1)


def test_no_world_inside_a_rank(world2, monkeypatch, tmp_path):
    with pytest.raises(lab.RankError, match="RANK is set"):
        world2.run(lambda: lab.World(2))
    with pytest.raises(lab.RankError, match="RANK is set"):
        world2.run(lambda: world2.run(dist.get_rank))
    (tmp_path / "makes_a_world.py").write_text(
        "import labpkg as lab\nlab.World(2)\ndef f(): return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__("makes_a_world")
    with pytest.raises(lab.RankError, match="make the World outside"):
        world2.run(module.f)
    monkeypatch.setenv("RANK", "3")  # torchrun sets it
    with pytest.raises(RuntimeError, match="without torchrun"):
        lab.World(2)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_of_the_kernel_owns_nothing(world2):
    world2.run(total, 1)
    server = ForkServer.get()
    if (pid := os.fork()) == 0:
        server.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert world2.run(total, 1)[0].tolist() == [2.0, 2.0]
    assert ForkServer.get() is server


def test_a_rank_error_can_be_pickled():
    error = lab.RankError(1, "broken", "Traceback", {0: "had returned"})
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.rank, copy.others, str(copy)) == (1, error.others, str(error))
    assert str(error) == "rank 1: broken\n  (rank 0: had returned)\n\nTraceback"
