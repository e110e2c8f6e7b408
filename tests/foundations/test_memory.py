"""Live bytes: exact for models in training, each storage once; what stays hidden."""

import gc
import time

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import labpkg as lab
from labpkg.foundations.memory import live_tensor_bytes
from labpkg.parallelism.fsdp import fully_shard
from labpkg.parallelism.zero import ZeroOptimizer
from labpkg.planning.cost import model_state_bytes
from labpkg.processes.in_place import all_reduce_


@pytest.fixture
def grown():
    before = live_tensor_bytes()
    return lambda: live_tensor_bytes() - before


def test_training_holds_weights_gradients_and_two_moments(grown):
    model = lab.MLP(64, 33, 10)
    p = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert grown() == p
    model(torch.rand(5, 64)).sum().backward()
    assert grown() == p + p
    optimizer = lab.AdamW(model.parameters(), lr=0.1)
    optimizer.step()
    assert grown() == p + p + 2 * p
    optimizer.zero_grad()
    assert grown() == p + 2 * p
    del optimizer
    assert grown() == p


def train_replica():
    mesh = lab.make_mesh(dp=2)["dp"]
    first = torch.zeros(1)
    all_reduce_(first, mesh).wait()  # opens what the transport keeps
    before = live_tensor_bytes()
    model = lab.DataParallel(lab.MLP(64, 33, 10), mesh, bucket_bytes=4000)
    optimizer = lab.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.rand(5, 64)).sum().backward()
        optimizer.step()
    assert first == 0
    return live_tensor_bytes() - before


def test_replicas_hold_everything_and_the_flags_of_their_buckets(world2):
    model = lab.MLP(64, 33, 10)
    p = 4 * sum(parameter.numel() for parameter in model.parameters())
    expected = p + lab.data_parallel_bytes(model) + 2 * p
    assert world2.run(train_replica) == [expected] * 2


def settled_bytes():
    """Count once a thread of the backend has let go of what it has sent."""
    counts = [live_tensor_bytes()]
    for _ in range(5):
        time.sleep(0.01)
        counts.append(live_tensor_bytes())
    return min(counts)


def hold_what_refuses_to_be_read():
    mesh = lab.make_mesh(dp=2)["dp"]
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    old = lab.SGD(model.parameters(), lr=0.1)  # holds parameters that are cut below
    seen = []  # while a unit is whole and the other hidden
    model[0].register_forward_hook(lambda *_: seen.append(live_tensor_bytes()))
    fully_shard(model, mesh)
    before = settled_bytes()
    x = torch.ones(4, 8)
    with torch.no_grad():
        model(x)  # there is no order yet, in which to gather ahead
    del model
    assert old.param_groups
    return seen[0] - before


def test_parameters_that_refuse_to_be_read_are_counted_right(world2):
    # The input, the output and the parameters of the only unit that is whole.
    assert world2.run(hold_what_refuses_to_be_read) == 2 * [4 * (32 + 32 + 72)]


def train_at(stage):
    mesh = lab.make_mesh(dp=4)["dp"]
    first = torch.zeros(1)
    all_reduce_(first, mesh).wait()
    before = live_tensor_bytes()
    model = lab.MLP(64, 256, 256, 10)  # four ranks divide no bucket evenly
    if stage == 0:
        model = lab.DataParallel(model, mesh)
    if stage == 3:
        model = fully_shard(model, mesh)
    if stage in (1, 2):
        optimizer = ZeroOptimizer(
            model.parameters(), lab.AdamW, mesh, stage=stage, lr=0.1
        )
    else:
        optimizer = lab.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.rand(5, 64)).sum().backward()
        optimizer.step()
    return live_tensor_bytes() - before


@pytest.mark.parametrize("stage", range(4))
def test_stages_hold_what_the_formula_says(world4, stage):
    num_elements = sum(p.numel() for p in lab.MLP(64, 256, 256, 10).parameters())
    predicted = model_state_bytes(num_elements, stage=stage, n=4)
    # The flags of the used parameters are not in the formula.
    assert world4.run(train_at, stage) == pytest.approx([predicted] * 4, abs=32)


def test_views_and_ties_share_a_storage(grown):
    base = torch.zeros(10, 10, dtype=torch.float64)
    views = [base[i] for i in range(10)]
    tied = nn.Linear(10, 10, bias=False)
    tied.weight = nn.Parameter(base)
    assert grown() == 800
    del base, tied
    assert grown() == 800  # one row keeps the whole matrix
    kept = views[0].clone()
    del views
    assert grown() == kept.nbytes


def test_tensors_without_memory_count_nothing(grown):
    with FakeTensorMode():
        pretended = torch.zeros(1000)
    absent = torch.zeros(1000, device="meta")
    freed = torch.zeros(1000)
    freed.untyped_storage().resize_(0)
    assert grown() == 0
    del pretended, absent, freed


def test_a_wrapper_counts_what_it_wraps(grown):
    jagged = torch.nested.nested_tensor(
        [torch.zeros(3), torch.zeros(4)], layout=torch.jagged
    )
    assert grown() == jagged.values().nbytes + jagged.offsets().nbytes


def test_dead_cycles_do_not_count(grown):
    gc.disable()
    try:
        cycle = {"x": torch.zeros(100)}
        cycle["self"] = cycle
        del cycle
        assert grown() == 0
    finally:
        gc.enable()


def test_devices_are_told_apart(grown):
    before = live_tensor_bytes("cpu")
    tensor = torch.zeros(100)
    assert live_tensor_bytes("cpu") - before == tensor.nbytes == grown()
    assert live_tensor_bytes(torch.device("cuda", 7)) == 0


def test_saved_tensors_without_a_python_name_are_not_seen(grown):
    x = torch.zeros(100, requires_grad=True)
    y = torch.exp(torch.exp(x)).sum()
    assert grown() == x.nbytes + y.nbytes  # both results of exp are saved, too
