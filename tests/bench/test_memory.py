"""Bytes are counted one by one; the sizes here are worked out by hand."""

import threading

import pytest
import torch
from torch import nn

import labpkg as lab
from labpkg.bench.memory import LiveBytes, peak_bytes


def test_views_and_changes_in_place_occupy_nothing():
    with LiveBytes() as live:
        x = torch.zeros(10, 10)
        assert live.now == 400
        y = x.view(-1)[3:].add_(1)
        assert live.now == 400
        del x
        assert live.now == 400  # y is a view of it
        del y
        _ = torch.empty(1000, device="meta") + 1
    assert (live.now, live.peak) == (0, 400)


def test_what_is_alive_at_once_is_the_peak():
    with LiveBytes() as live:
        for _ in range(3):
            x = torch.zeros(100, dtype=torch.uint8)
            del x
        assert (live.now, live.peak) == (0, 100)
        kept = [torch.zeros(100, dtype=torch.uint8) for _ in range(3)]
        assert (live.now, live.peak) == (300, 300)
        kept.clear()
        live.peak = live.now
    assert (live.now, live.peak) == (0, 0)


def test_a_resized_storage_is_counted_anew():
    resize = torch.UntypedStorage.resize_
    with LiveBytes() as live:
        x = torch.zeros(100)
        x.untyped_storage().resize_(0)
        assert live.now == 0
        x.untyped_storage().resize_(800)
        assert live.now == 800
    assert torch.UntypedStorage.resize_ is resize


def test_what_another_thread_lets_go_is_gone():
    with LiveBytes() as live:
        kept = [torch.zeros(100)]
        thread = threading.Thread(target=kept.clear)
        thread.start()
        thread.join()
    assert (live.now, live.peak) == (0, 400)


def test_activations_that_only_autograd_holds_count():
    with LiveBytes() as live:
        w = torch.ones(100, requires_grad=True)
        y = (w.exp() * 2).sum()  # exp keeps its result
        assert live.now == 400 + 400 + 4
        y.backward()
        assert w.grad is not None
        assert live.now == 400 + 4 + 400  # w, y and the gradient


def make_step():
    model = nn.Linear(8, 4)  # 144 bytes
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step():
        optimizer.zero_grad()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()

    return step


@pytest.mark.parametrize("warm_up", [1, 2])
def test_a_step_has_weights_gradients_and_momentum(warm_up):
    assert peak_bytes(make_step, warm_up=warm_up) == 3 * 144


def buckets_of_ddp():
    def make():
        group = lab.make_mesh(dp=2)["dp"].get_group()
        model = nn.Linear(250, 100, bias=False)
        kept = nn.parallel.DistributedDataParallel(model, process_group=group)
        return lambda: kept

    return peak_bytes(make)


def test_buckets_that_torch_allocates_count(world2):
    for found in world2.run(buckets_of_ddp):
        assert found == 2 * 250 * 100 * 4  # weights and gradients


def sharded_by_fsdp2():
    def make():
        from torch.distributed.fsdp import fully_shard

        model = nn.Linear(250, 100, bias=False)
        fully_shard(model, mesh=lab.make_mesh(dp=2)["dp"])
        return lambda: model(torch.zeros(1, 250))

    return peak_bytes(make)


def test_shards_and_gathered_parameters_of_fsdp2_count(world2):
    """The gathered weights come twice: as received, and cut into parameters."""
    weights = 250 * 100 * 4
    for found in world2.run(sharded_by_fsdp2):
        assert 1.5 * weights <= found < 2.6 * weights
