"""What `fully_shard` adds to the laws of every engine: when a parameter is whole."""

import copy
import gc
import pickle
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import labpkg as lab
from labpkg.parallelism.fsdp import fully_shard
from labpkg.parallelism.whole import full_gradients, full_state_dict
from labpkg.processes.flat import shard_of
from labpkg.processes.in_place import all_reduce_
from labpkg.processes.traffic import off

TOLERANCE = 1e-12
WIDTH = 6


class Block(nn.Module):
    """A residual block with a unit inside it; checkpoints as it is told."""

    def __init__(self, recompute: str = "") -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 11)
        self.inner = nn.Sequential(nn.Linear(11, 11), nn.Tanh())
        self.down = nn.Linear(11, WIDTH)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if self.recompute == "inside":
            hidden = checkpoint(self.inner, hidden, use_reentrant=False)
        else:
            hidden = self.inner(hidden)
        return x + self.down(hidden)


class Tower(nn.Module):
    """Units in a list, a tied head, a branch for some ranks, a buffer."""

    def __init__(self, recompute: str = "", num_blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList(Block(recompute) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embed.weight
        self.sometimes = nn.Linear(WIDTH, WIDTH)
        self.never = nn.Linear(WIDTH, 1)
        self.register_buffer("scale", torch.rand(1))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        for block in self.blocks:
            if self.recompute == "around":
                y = checkpoint(block, y, use_reentrant=False)
            else:
                y = block(y)
        y = self.norm(y)
        if (x[:, 0] > 0).any():  # the first ranks never take the branch
            y = y + self.sometimes(y) * (x[:, :1] > 0)
        return self.head(y) * self.scale


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator(device="cpu").manual_seed(1000 + step)
    x, y = torch.randn(2, 12, WIDTH, dtype=torch.float64, generator=g, device="cpu")
    x[:, 0] = torch.linspace(-1, 1, 12)
    return x, y


def build(kind=Tower, *args, **kwargs) -> Any:
    torch.manual_seed(42 + (dist.get_rank() if dist.is_initialized() else 0))
    return kind(*args, **kwargs).double()


def axis():
    return lab.make_mesh(dp=dist.get_world_size())["dp"]


def sharded(kind=Tower, *args, units="default", **options) -> Any:
    model = build(kind, *args)
    if units == "nested":
        options["units"] = [*model.blocks, *(b.inner for b in model.blocks)]
    elif units == "none":
        options["units"] = []
    return fully_shard(model, axis(), **options)


def loss_of(model: nn.Module, step: int = 0, *, shard: bool = True) -> Tensor:
    x, y = batch(step)
    if shard:
        n, rank = dist.get_world_size(), dist.get_rank()
        x, y = x.chunk(n)[rank], y.chunk(n)[rank]
    return ((model(x) - y) ** 2).mean()


def alone(kind=Tower, *args) -> dict:
    """Return the gradients of one process."""
    model = build(kind, *args)
    loss_of(model, shard=False).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def deviation(got: dict, want: dict) -> float:
    """Return the largest relative norm of a difference; None must meet None."""
    assert got.keys() == want.keys()
    worst = 0.0
    for name, w in want.items():
        g = got[name]
        assert (g is None) == (w is None), name
        if w is not None:
            worst = max(worst, float((g - w).norm() / (w.norm() + 1e-30)))
    return worst


def whole_bytes() -> int:
    """Return the bytes of the buffers in which parameters are whole now."""
    gc.collect()
    flats = {}
    for o in gc.get_objects():
        if type(o) is nn.Parameter and shard_of(o) is None:
            storage = o.untyped_storage()
            flats[storage.data_ptr()] = storage.nbytes()
    return sum(flats.values())


# ---- gradients ---------------------------------------------------------------------


def gradients(recompute, keep):
    found = []
    for units in ("default", "nested", "none"):
        model = sharded(Tower, recompute, units=units, reshard_after_forward=not keep)
        for _ in range(3):  # the first pass knows no order, later ones gather ahead
            model.zero_grad()
            loss_of(model).backward()
            found.append(full_gradients(model))
            assert whole_bytes() == 0
    return found


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("recompute", ["", "inside", "around"])
def test_gradients_equal_one_process(world4, recompute, keep):
    want = alone()
    for passes in world4.run(gradients, recompute, keep):
        assert max(deviation(found, want) for found in passes) <= TOLERANCE


def accumulated():
    results = []
    for keep in (False, True):
        model = sharded(reshard_after_forward=keep)
        x, y = (t.chunk(2)[dist.get_rank()] for t in batch())
        halves = [slice(0, 3), slice(3, 6)]
        for half in halves:  # forward and backward in turn
            (((model(x[half]) - y[half]) ** 2).mean() / 2).backward()
        results.append(full_gradients(model))
        model.zero_grad(set_to_none=False)
        losses = [((model(x[half]) - y[half]) ** 2).mean() / 2 for half in halves]
        sum(losses).backward()  # two forward passes before one backward
        results.append(full_gradients(model))
        model.zero_grad()
        losses = [((model(x[half]) - y[half]) ** 2).mean() / 2 for half in halves]
        for loss in losses:  # and before two
            loss.backward()
        results.append(full_gradients(model))
        model.zero_grad()
        loss = ((model(x) - y) ** 2).mean() / 2
        loss.backward(retain_graph=True)
        loss.backward()
        results.append(full_gradients(model))
        assert whole_bytes() == 0
    return results


def test_several_passes_add_up(world2):
    want = alone()
    for found in world2.run(accumulated):
        for i, grads in enumerate(found):
            if i % 4 == 1:  # zeros are kept by `set_to_none=False`
                grads["never.weight"] = want["never.weight"] = None
                grads["never.bias"] = want["never.bias"] = None
            assert deviation(grads, want) <= TOLERANCE


class Twice(nn.Module):
    """A unit that is called twice, and weights tied between units."""

    def __init__(self):
        super().__init__()
        first, second = (nn.Linear(WIDTH, WIDTH) for _ in range(2))
        second.weight = first.weight
        self.blocks = nn.ModuleList([first, second, nn.Linear(WIDTH, WIDTH), first])

    def forward(self, x):
        for block in (*self.blocks, self.blocks[2]):
            x = torch.tanh(block(x))
        return x


class Remote(nn.Module):
    """The output of a unit is an object, and its input is changed in place."""

    @dataclass(slots=True)
    class Answer:
        hidden: dict[str, Tensor]
        note: str = "opaque"

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)

        def forward(self, x, *, options):
            x.mul_(2)
            return Remote.Answer(
                {"y": self.down(torch.relu(self.up(x + options["b"])))}
            )

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([self.Inner(), self.Inner()])

    def forward(self, x):
        y = x * 1
        for layer in self.layers:
            y = layer(y, options={"b": 0.5}).hidden["y"]
        return y


class Lists(nn.Module):
    """Lists in lists and dictionaries: only what is called can be a unit."""

    def __init__(self):
        super().__init__()
        rows = [nn.ModuleList([nn.Linear(WIDTH, WIDTH)]) for _ in range(2)]
        self.rows = nn.ModuleList(rows)
        layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.PReLU())  # 1 element
        self.named = nn.ModuleDict({"a": layers})
        self.lstm = nn.LSTM(2, 2, batch_first=True)
        self.gains = nn.ParameterList([nn.Parameter(torch.ones(WIDTH))])

    def forward(self, x):
        for row in self.rows:
            x = torch.relu(row[0](x)) * self.gains[0]
        return self.named["a"](self.lstm(x.view(-1, 3, 2))[0].flatten(1))


def gradients_of(kind):
    model = sharded(kind)
    for _ in range(2):
        model.zero_grad()
        loss_of(model).backward()
    assert whole_bytes() == 0
    return full_gradients(model)


@pytest.mark.parametrize("kind", [Twice, Remote, Lists])
def test_unusual_models_equal_one_process(world4, kind):
    want = alone(kind)
    for found in world4.run(gradients_of, kind):
        assert deviation(found, want) <= TOLERANCE


def some_inputs_and_some_outputs():
    model = sharded(reshard_after_forward=False)
    x = batch()[0][:2].requires_grad_()
    y = model(x)
    (slope,) = torch.autograd.grad(y.sum(), x)  # no parameter is asked for
    assert all(p.grad is None for p in model.parameters())
    assert whole_bytes() == 0
    model.blocks[0](x).sum().backward()  # a unit alone
    touched = {n for n, g in full_gradients(model).items() if g is not None}
    model.zero_grad()
    features = []
    hook = model.blocks[0].register_forward_hook(lambda *v: features.append(v[2]))
    model(x)
    hook.remove()
    (early,) = torch.autograd.grad(features[0].sum(), x)  # past the root's output
    for p in model.parameters():  # a penalty on the slices themselves
        p.grad = None
    sum(p.pow(2).sum() for p in model.parameters()).backward()
    penalty = full_gradients(model)
    return (slope, early), touched, penalty, full_state_dict(model)


def test_other_ways_into_the_graph(world2):
    model = build()
    x = batch()[0][:2].requires_grad_()
    wants = (
        *torch.autograd.grad(model(x).sum(), x),
        *torch.autograd.grad(model.blocks[0](model.embed(x)).sum(), x),
    )
    for slopes, touched, penalty, state in world2.run(some_inputs_and_some_outputs):
        for slope, want in zip(slopes, wants, strict=True):
            assert torch.allclose(slope, want, rtol=TOLERANCE, atol=0)
        assert touched == {n for n in penalty if n.startswith("blocks.0.")}
        for name, gradient in penalty.items():
            assert torch.equal(gradient, 2 * state[name])


# ---- numbers -----------------------------------------------------------------------


def steps_in_rank_order(num_steps):
    model = sharded(lab.MLP, 6, 11, 6, deterministic=True)
    optimizer = lab.AdamW(model.parameters(), lr=0.01)
    for step in range(num_steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return full_state_dict(model)


def test_rank_order_is_bitwise_accumulation(world4):
    model = build(lab.MLP, 6, 11, 6)
    optimizer = lab.AdamW(model.parameters(), lr=0.01)
    for step in range(5):
        optimizer.zero_grad()
        x, y = batch(step)
        for x_part, y_part in zip(x.chunk(4), y.chunk(4), strict=True):
            (((model(x_part) - y_part) ** 2).mean() / 4).backward()
        optimizer.step()
    for state in world4.run(steps_in_rank_order, 5):
        for name, value in model.state_dict().items():
            assert torch.equal(state[name], value)


def silent():
    with off():
        model = sharded(lab.MLP, 6, 11, 6)
        loss_of(model).backward()
        return full_gradients(model)


def test_deviates_without_communication(world4):
    want = alone(lab.MLP, 6, 11, 6)
    for found in world4.run(silent):
        assert deviation(found, want) > 1000 * TOLERANCE


def counted(keep, num_frozen):
    model = build()
    for block in model.blocks[:num_frozen]:
        block.requires_grad_(False)
    fully_shard(model, axis(), reshard_after_forward=not keep)
    logs = []
    for _ in range(2):
        with lab.count_comms() as log:
            loss_of(model).backward()
        logs.append(log)
    buckets = {shard_of(p).bucket: p.requires_grad for p in model.parameters()}
    return (
        [
            (log["dp", op].calls, log["dp", op].payload_bytes)
            for log in logs
            for op in ("all_gather", "reduce_scatter", "all_reduce")
        ],
        [(8 * b.num_elements, trains) for b, trains in buckets.items()],
        sum(p.requires_grad for p in model.parameters()),
    )


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("num_frozen", [0, 2])
def test_every_byte_is_counted(world4, keep, num_frozen):
    for found, buckets, num_trained in world4.run(counted, keep, num_frozen):
        gathered = sum(size for size, _ in buckets)
        trained = [size for size, trains in buckets if trains]
        times = 1 if keep else 2
        assert len(buckets) == 4
        assert found == 2 * [
            (times * 4, times * gathered),
            (len(trained), sum(trained)),
            (1, num_trained),
        ]


def bytes_of(tensors) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def memory(keep):
    model = build(Tower, "", 5)
    for p in (*model.sometimes.parameters(), *model.never.parameters()):
        p.requires_grad_(False)  # a group without gradients
    fully_shard(model, axis(), reshard_after_forward=not keep)
    seen = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear):  # watched in forward and in backward
            layer.register_forward_hook(lambda *_: seen.append(whole_bytes()))
            layer.register_forward_hook(
                lambda *v: (
                    v[2].register_hook(lambda _: seen.append(whole_bytes())) and None
                )
            )
    for _ in range(2):
        loss_of(model).backward()
        assert whole_bytes() == 0
    units = [0, 0, 0, 0, 0, 0]
    for name, p in model.named_parameters():
        unit = 1 + int(name.split(".")[1]) if name.startswith("blocks") else 0
        units[unit] += 8 * shard_of(p).shape.numel()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert bytes_of(p.grad for p in trained) == bytes_of(trained)
    return units, bytes_of(model.parameters()), max(seen)


def test_memory_is_a_slice_and_at_most_two_units_besides_the_root(world4):
    ranks = world4.run(memory, False)
    root, *blocks = ranks[0][0]
    assert sum(held for _, held, _ in ranks) == root + sum(blocks)
    for _, held, peak in ranks:
        assert abs(held - (root + sum(blocks)) / 4) <= 7 * 8  # an element for a group
        assert peak == root + 2 * blocks[0]
    for _, _, peak in world4.run(memory, True):
        assert peak == root + sum(blocks)


def mixed(reduce_dtype):
    mesh = axis()
    torch.manual_seed(dist.get_rank())
    model = Tower().float()
    fully_shard(model, mesh, param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    x, y = (t.chunk(2)[dist.get_rank()].float() for t in batch())
    start = full_state_dict(model)
    with lab.count_comms() as log:
        out = model(x)
        ((out.float() - y) ** 2).mean().backward()
    optimizer = lab.AdamW(model.parameters(), lr=0.01)
    optimizer.step()
    size = sum(
        {
            shard_of(p).bucket: shard_of(p).bucket.num_elements
            for p in model.parameters()
        }.values()
    )
    kinds = {p.dtype for p in model.parameters()} | {
        p.grad.dtype for p in model.parameters() if p.grad is not None
    }
    sent = [
        log["dp", op].payload_bytes / size for op in ("all_gather", "reduce_scatter")
    ]
    return start, out, full_gradients(model), kinds, sent


@pytest.mark.parametrize("reduce_dtype", [None, torch.float32])
def test_bf16_computes_from_fp32_slices(world2, reduce_dtype):
    ranks = world2.run(mixed, reduce_dtype)
    torch.manual_seed(0)
    model = Tower().float()
    model.load_state_dict(ranks[0][0])
    x, y = (t.float() for t in batch())
    halves = copy.deepcopy(model).bfloat16()
    halves.scale = model.scale  # buffers keep their dtype
    outs = [halves(part.bfloat16()) for part in x.chunk(2)]
    sum(
        ((out.float() - part) ** 2).mean() / 2
        for out, part in zip(outs, y.chunk(2), strict=True)
    ).backward()
    want = {n: p.grad for n, p in halves.named_parameters()}
    for rank, (_, out, grads, kinds, sent) in enumerate(ranks):
        assert (out - outs[rank]).norm() <= 0.02 * out.norm()
        assert kinds == {torch.float32}
        assert sent == [4, 2 if reduce_dtype is None else 4]
        for name, gradient in grads.items():
            assert (gradient is None) == (want[name] is None)
            if gradient is not None:
                gap = (gradient - want[name].float()).norm()
                assert gap <= 0.05 * gradient.norm() + 1e-4, name


# ---- evaluation, errors, state -----------------------------------------------------


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
    for order in ((0, 1, 2), (2, 0, 1), (0, 2), (0, 1, 2)):
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
    for order in ((0, 1, 2), (2, 0, 1), (0, 2), (0, 1, 2), (0, 1, 2)):
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
            ("weight is on meta, the mesh on cpu", nn.Linear(2, 2, device="meta"), {}),
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
