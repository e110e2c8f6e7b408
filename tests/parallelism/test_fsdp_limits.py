"""`fully_shard` beside the straight road: evaluation, errors, changes, endings."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import labpkg as lab
from labpkg.parallelism.fsdp import fully_shard
from labpkg.parallelism.whole import full_gradients, full_state_dict
from labpkg.processes.flat import shard_of
from labpkg.processes.in_place import all_reduce_
from tests.parallelism.towers import (
    TOLERANCE,
    WIDTH,
    Tower,
    alone,
    axis,
    batch,
    build,
    deviation,
    loss_of,
    sharded,
    whole_bytes,
)


def evaluated():
    model = sharded(reshard_after_forward=False)
    loss_of(model).backward()
    want = full_gradients(model)
    model.zero_grad()
    loss = loss_of(model)  # an evaluation between forward and backward
    values = []
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            values.append(loss_of(model).clone())
        assert whole_bytes() == 0
    loss.backward()
    assert deviation(full_gradients(model), want) <= TOLERANCE
    return values, loss.detach()


def test_evaluation_frees_at_once(world2):
    for values, loss in world2.run(evaluated):
        assert all(torch.equal(value, loss) for value in values)


ORDERS = (0, 1, 2), (0, 2), (2, 0, 1), (0, 1, 2)


class Fragile(nn.Module):
    """Raises in the middle when told; can change the order of its units."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.fails, self.order = False, (0, 1, 2)

    def forward(self, x):
        for i in self.order:
            if self.fails and i == 1:
                raise KeyError("planted")
            x = self.blocks[i](x)
        return x


def survives():
    model = sharded(Fragile)
    found = []
    for order in ORDERS:
        model.zero_grad()
        model.order = order
        loss_of(model).backward()
        found.append(full_gradients(model))
        assert whole_bytes() == 0
    model.fails = True
    with pytest.raises(KeyError):
        loss_of(model)
    assert whole_bytes() == 0
    assert all(shard_of(p) is not None for p in model.parameters())
    model.fails = False
    model.zero_grad()
    loss_of(model).backward()
    found.append(full_gradients(model))
    return found


def test_other_orders_and_exceptions_leave_it_whole(world2):
    wants = []
    for order in (*ORDERS, (0, 1, 2)):
        model = build(Fragile)
        model.order = order
        loss_of(model, shard=False).backward()
        wants.append({n: p.grad for n, p in model.named_parameters()})
    for found in world2.run(survives):
        for got, want in zip(found, wants, strict=True):
            assert deviation(got, want) <= TOLERANCE


class Break(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *_):
        raise KeyError("planted")


def breaks():
    model = sharded(Fragile)
    with pytest.raises(KeyError):
        model.blocks[1](Break.apply(model.blocks[0](batch()[0]))).sum().backward()
    with pytest.raises(RuntimeError, match="did not end"):
        model(batch()[0])
    model = sharded(Fragile)
    x = batch()[0].requires_grad_()
    out = model.blocks[1](checkpoint(model.blocks[0], x, use_reentrant=True))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        out.sum().backward()
    model = sharded(Fragile)
    loss = loss_of(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    with pytest.raises(RuntimeError, match="between a forward pass"):
        loss.backward()
    model = sharded(Fragile, reshard_after_forward=False)
    x = batch()[0].requires_grad_()
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return True


def test_broken_passes_are_named(world2):
    assert world2.run(breaks) == [True, True]


def bad_input():
    mesh = lab.make_mesh(dp=2)
    dp, rank = mesh["dp"], dist.get_rank()
    with lab.count_comms() as log:
        for match, model, options in (
            ("takes one, such as", nn.Linear(2, 2), {"mesh": mesh}),
            ("0 elements in 0 parameters, fewer", nn.ReLU(), {}),
            ("1 elements in 1 parameters", nn.Linear(1, 1, bias=False), {}),
            (
                "weight lies on meta, but the mesh is one of cpu",
                nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")),
                {},
            ),
            ("sparse=False", nn.Embedding(4, 2, sparse=True), {}),
            (
                r"units\[0\], a Linear, is no submodule",
                nn.Linear(2, 2),
                {"units": [nn.Linear(2, 2)]},
            ),
        ):
            with pytest.raises(ValueError, match=match):
                fully_shard(model, options.pop("mesh", dp), **options)
        tower = Tower()
        for match, units in (
            ("is no submodule", [tower]),
            ("is norm again", [tower.norm, tower.norm]),
            ("never called", [tower.blocks]),
            ("no parameters", [tower.blocks[0].inner[1]]),
        ):
            with pytest.raises(ValueError, match=match):
                fully_shard(tower, dp, units=units)
    assert log["dp"].calls == 0
    with pytest.raises(ValueError, match=r"rank \d of the axis holds another"):
        fully_shard(nn.Linear(2, 2 + rank), dp)
    averaged = lab.DataParallel(nn.Linear(2, 2), dp)
    with pytest.raises(ValueError, match="belongs to another DataParallel"):
        fully_shard(averaged.module, dp)
    model = sharded(Fragile)
    with pytest.raises(ValueError, match="sharded already"):
        fully_shard(model, dp)
    with pytest.raises(ValueError, match="belongs to another fully_shard"):
        lab.DataParallel(model, dp)
    return True


def test_bad_input_raises_before_communication(world2):
    assert world2.run(bad_input) == [True, True]


def changed_afterwards():
    x = batch()[0]

    def add(model):
        model.extra = nn.Linear(WIDTH, WIDTH).double()

    def replace(model):
        model.blocks[0].weight = nn.Parameter(torch.ones(WIDTH, WIDTH))

    def assign(model):
        state = {name: t.clone() for name, t in model.state_dict().items()}
        model.load_state_dict(state, assign=True)

    for match, change in (
        ("extra.weight was added", add),
        ("weight was replaced", replace),
        ("weight was replaced", assign),
        ("moved or converted", lambda model: model.float()),
        ("unfrozen", lambda model: model.blocks[1].requires_grad_(True)),
    ):
        model = build(Fragile)
        model.blocks[1].requires_grad_(False)
        fully_shard(model, axis())
        model(x)
        change(model)
        with pytest.raises(ValueError, match=match):
            model(x)
    return True


def test_changes_after_sharding_are_refused(world2):
    assert world2.run(changed_afterwards) == [True, True]


def frozen_afterwards():
    model = sharded(Fragile)
    model.blocks[1].requires_grad_(False)
    loss_of(model).backward()
    return [n for n, g in full_gradients(model).items() if g is None]


def test_parameters_may_be_frozen_later(world2):
    assert world2.run(frozen_afterwards) == 2 * [["blocks.1.weight", "blocks.1.bias"]]


class Reads(Fragile):
    """Reads a weight of one unit in another, or outside of all."""

    reads, is_late = None, False

    def forward(self, x):
        assert next(self.blocks[0].parameters()).shape == (WIDTH, WIDTH)
        assert self.blocks[1].weight.dtype == torch.float64
        if self.reads is not None and not self.is_late:
            x = self.reads(x, self.blocks[0])
        x = super().forward(x)
        return self.reads(x, self.blocks[0]) if self.reads and self.is_late else x


def read_outside():
    for keep in (False, True):
        for match, reads in (
            (r"Linear\.weight is read outside", lambda x, b: x @ b.weight),
            ("Linear.bias is", lambda x, b: x * b.bias[:1]),  # slices would give it
            ("a parameter is read", lambda x, b: x + b.weight.data[0, 0]),
        ):
            model = sharded(Reads, reshard_after_forward=not keep)
            for model.is_late in (False, True):  # later it may be there, or on its way
                model.reads = None
                loss_of(model).backward()
                model.reads = reads
                with pytest.raises(RuntimeError, match=match):
                    loss_of(model)
                assert all(type(p) is nn.Parameter for p in model.parameters())
        whole = sharded(Reads, reshard_after_forward=not keep, units="none")
        whole.reads = reads
        loss_of(whole).backward()
    return full_gradients(whole)


def test_weights_are_read_in_their_units_only(world2):
    alone = build(Reads)
    alone.reads = lambda x, b: x + b.weight.data[0, 0]
    loss_of(alone, shard=False).backward()
    want = {n: p.grad for n, p in alone.named_parameters()}
    for found in world2.run(read_outside):
        assert deviation(found, want) <= TOLERANCE


class Gives(nn.Module):
    """A unit that returns its weight, as it is or changed."""

    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
            self.change = torch.clone

        def forward(self):
            return self.change(self.weight)

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.Unit()])

    def forward(self, x):
        return x @ self.blocks[0]()


def given_away():
    model = sharded(Gives)
    for change in (lambda w: w, torch.t):
        model.blocks[0].change = change
        with pytest.raises(RuntimeError, match="returned a parameter"):
            loss_of(model)
    model.blocks[0].change = torch.clone
    loss_of(model).backward()
    return full_gradients(model)


def test_a_unit_may_not_return_its_parameters(world2):
    want = alone(Gives)
    for found in world2.run(given_away):
        assert deviation(found, want) <= TOLERANCE


class Mapped(Fragile):
    def forward(self, x):
        return torch.func.vmap(super().forward)(x)


def mapped():
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        loss_of(sharded(Mapped))
    model = sharded(Mapped, units="none")
    loss_of(model).backward()
    return full_gradients(model)


def test_transforms_belong_inside_a_unit(world2):
    want = alone(Mapped)
    for found in world2.run(mapped):
        assert deviation(found, want) <= TOLERANCE


def interrupted():
    model = sharded(Fragile)

    def stop(*_):
        raise KeyboardInterrupt

    hook = model.blocks[1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        loss_of(model)
    hook.remove()
    loss_of(model).backward()
    assert whole_bytes() == 0
    return full_gradients(model)


def test_an_interrupt_leaves_it_usable(world2):
    want = alone(Fragile)
    for found in world2.run(interrupted):
        assert deviation(found, want) <= TOLERANCE


def old_optimizer_and_copies():
    model = build(Fragile)
    model.blocks[0].weight.tag = "kept"
    early = lab.SGD(model.parameters(), lr=0.1)
    names = [n for n, _ in model.named_parameters()]
    fully_shard(model, axis())
    assert [n for n, _ in model.named_parameters()] == names
    assert model.blocks[0].weight.tag == "kept"
    loss_of(model).backward()
    for use in (early.step, early.zero_grad):
        with pytest.raises(RuntimeError, match="make the optimizer after fully_shard"):
            use()
    model = sharded(lab.MLP, 6, 11, 6)
    for use in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            use(model)
    return True


def test_what_could_not_train_is_refused(world2):
    assert world2.run(old_optimizer_and_copies) == [True, True]


def not_elementwise():
    model = sharded(lab.MLP, 6, 11, 6)
    loss_of(model).backward()
    before = full_state_dict(model)
    with lab.count_comms() as log:
        for cls in (torch.optim.Adafactor, torch.optim.LBFGS):
            with pytest.raises(ValueError, match=f"{cls.__name__} cannot update"):
                cls(model.parameters()).step(lambda: 0.0)
    assert log["dp"].calls == 0
    assert all(torch.equal(full_state_dict(model)[n], t) for n, t in before.items())
    lab.AdamW(model.parameters(), lr=0.1).step()
    assert not torch.equal(full_state_dict(model)["0.weight"], before["0.weight"])
    return True


def test_optimizers_of_whole_parameters_are_refused(world2):
    assert world2.run(not_elementwise) == [True, True]


def dropped():
    model = sharded(lab.MLP, 6, 11, 6)
    loss = loss_of(model)
    loss.backward()
    last = model(batch()[0])  # a graph that is never used keeps nothing either
    alive = [weakref.ref(model), *(weakref.ref(p) for p in model.parameters())]
    del model, loss
    gc.collect()
    with pytest.raises(RuntimeError, match="is gone"):
        last.sum().backward()
    del last
    gc.collect()
    return [ref() is None for ref in alive]


def test_a_dropped_model_frees_its_memory(world2):
    for found in world2.run(dropped):
        assert all(found)


def in_flight_together():
    """Use the axis for other traffic while a unit is gathered ahead."""
    model, mesh = sharded(), axis()
    total = torch.ones(3)
    model.blocks[1].register_forward_hook(
        lambda *_: all_reduce_(total, mesh).wait() and None
    )
    for _ in range(2):
        loss_of(model).backward()
    return total, full_gradients(model)


def test_other_collectives_may_come_between(world2):
    want = alone()
    for total, found in world2.run(in_flight_together):
        assert total.tolist() == [4, 4, 4]
        doubled = {n: g if g is None else 2 * g for n, g in want.items()}
        assert deviation(found, doubled) <= TOLERANCE


def one_element(n):
    model = nn.Module()
    model.gain = nn.Parameter(torch.full((n,), 1.0 + dist.get_rank()))
    model.forward = lambda x: (model.gain * x).sum()
    fully_shard(model, axis())
    optimizer = lab.SGD(model.parameters(), lr=1.0)
    model(float(dist.get_rank())).backward()
    optimizer.step()
    return model.gain.numel(), full_state_dict(model)["gain"]


@pytest.mark.parametrize("n", [4, 5])
def test_one_parameter(world4, n):
    ranks = world4.run(one_element, n)
    assert [size for size, _ in ranks] == {4: [1, 1, 1, 1], 5: [2, 1, 1, 1]}[n]
    for _, gain in ranks:
        assert gain.tolist() == n * [-0.5]  # 1 - mean of 0, 1, 2, 3
