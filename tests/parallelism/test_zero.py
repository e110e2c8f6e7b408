"""`ZeroOptimizer`: what the laws of all engines do not test."""

import copy
import gc
import pickle
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn

import labpkg as lab
from labpkg.foundations.optimizers import elementwise_defaults
from labpkg.parallelism.zero import ZeroOptimizer
from labpkg.processes import collectives
from labpkg.processes.flat import shard_of

TOLERANCE = 1e-12


class Branches(nn.Module):
    """`never` is used by nobody, `sometimes` only by samples with x[0] > 0."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(6, 6)
        self.sometimes = nn.Linear(6, 6)
        self.never = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x):
        y = torch.tanh(self.frozen(self.trunk(x)))
        if (x[:, 0] > 0).any():
            y = y + self.sometimes(y) * (x[:, :1] > 0)
        return y


MODELS = {"mlp": lambda: lab.MLP(6, 11, 6), "branches": Branches}
OPTIMIZERS = {
    "sgd": (lab.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (lab.AdamW, {"lr": 0.01}),
    "torch adamw": (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
}


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator(device="cpu").manual_seed(1000 + step)
    x = torch.randn(12, 6, dtype=torch.float64, generator=g, device="cpu")
    x[:, 0] = torch.linspace(-1, 1, 12)  # the first ranks never take the branch
    return x, torch.randn(12, 6, dtype=torch.float64, generator=g, device="cpu")


def build(name: str = "mlp") -> nn.Module:
    torch.manual_seed(42 + (dist.get_rank() if dist.is_initialized() else 0))
    return MODELS[name]().double()


def groups(model: nn.Module) -> list[dict]:
    """Return two groups with options of their own."""
    parameters = [*model.parameters()]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]


def reference(name: str, optimizer: str, num_parts: int = 4) -> dict:
    """Train in one process, the global batch as accumulated parts."""
    model = build(name)
    cls, options = OPTIMIZERS[optimizer]
    opt = cls(groups(model), **options)
    for step in range(5):
        opt.param_groups[0]["lr"] = 0.01 * (step + 1)
        x, y = batch(step)
        for a, b in zip(x.chunk(num_parts), y.chunk(num_parts), strict=True):
            (((model(a) - b) ** 2).mean() / num_parts).backward()
        opt.step()
        opt.zero_grad()
    return {k: p.detach() for k, p in model.named_parameters()}


def train(name, optimizer, stage, *, accumulate="", silent=False, **kwargs) -> dict:
    mesh = lab.make_mesh(dp=dist.get_world_size())["dp"]
    n, rank = mesh.size(), mesh.get_local_rank()
    model = build(name)
    cls, options = OPTIMIZERS[optimizer]
    options |= kwargs
    opt = ZeroOptimizer(groups(model), cls, mesh, stage=stage, **options)
    with lab.count_comms() as log, collectives.off() if silent else nullcontext():
        steps(model, opt, n, rank, accumulate)
    assert all(p.grad is None for p in model.parameters())
    return {
        "params": {k: p.detach().clone() for k, p in model.named_parameters()},
        "reduced": log["dp", "reduce_scatter"].payload_bytes,
        "gathered": log["dp", "all_gather"].payload_bytes,
        "flags": log["dp", "all_reduce"].payload_bytes,
    }


def steps(model, opt, n, rank, accumulate) -> None:
    for step in range(5):
        opt.param_groups[0]["lr"] = 0.01 * (step + 1)  # as a scheduler does
        x, y = (t.chunk(n)[rank] for t in batch(step))
        loss = lambda part: ((model(x[part]) - y[part]) ** 2).mean()  # noqa: B023
        if accumulate == "no_sync":
            with opt.no_sync():
                (loss(slice(0, len(x) // 3)) / 3).backward()
                (loss(slice(len(x) // 3, 2 * len(x) // 3)) / 3).backward()
            (loss(slice(2 * len(x) // 3, len(x))) / 3).backward()
        elif accumulate:
            for part in range(3):
                rows = slice(part * len(x) // 3, (part + 1) * len(x) // 3)
                with opt.no_sync() if accumulate == "at once" else nullcontext():
                    (loss(rows) / 3).backward()
            if accumulate == "at once":
                opt.reduce_gradients()
        else:
            loss(slice(None)).backward()
        opt.step()
        opt.zero_grad()


def deviation(found: dict, want: dict) -> float:
    return max(((found[k] - want[k]).norm() / want[k].norm()).item() for k in want)


@pytest.fixture(scope="module")
def trained_on_four(world4):
    cases = [(n, o, s) for n in MODELS for o in OPTIMIZERS for s in (1, 2)]
    return world4.run(lambda: {it: train(*it, bucket_bytes=300) for it in cases})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_parameters_equal_one_process(trained_on_four, name, stage, optimizer):
    want = reference(name, optimizer)
    model = build(name)
    size = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    for of_rank in trained_on_four:
        found = of_rank[name, optimizer, stage]
        assert deviation(found["params"], want) <= 10 * TOLERANCE
        assert found["reduced"] == found["gathered"] == 5 * size
        trainable = sum(p.requires_grad for p in model.parameters())
        assert found["flags"] == 5 * trainable


@pytest.mark.parametrize("stage", [1, 2])
def test_silent_ranks_end_elsewhere(world2, stage):
    want = reference("mlp", "adamw", 2)
    for found in world2.run(train, "mlp", "adamw", stage, silent=True):
        assert deviation(found["params"], want) > 1e-2


@pytest.mark.parametrize("accumulate", ["no_sync", "reduce each", "at once"])
@pytest.mark.parametrize("stage", [1, 2])
def test_accumulated_gradients_are_those_of_the_whole_batch(world2, stage, accumulate):
    want = reference("mlp", "adamw", 6)
    size = sum(p.nbytes for p in build().parameters())
    for found in world2.run(train, "mlp", "adamw", stage, accumulate=accumulate):
        assert deviation(found["params"], want) <= 10 * TOLERANCE
        times = 3 if accumulate == "reduce each" else 1
        assert found["reduced"] == times * 5 * size


def only_before(stage, at_once):
    """Use the branch under `no_sync` on rank 1 only, and not afterwards."""
    mesh = lab.make_mesh(dp=2)["dp"]
    model = build("branches")
    opt = ZeroOptimizer(
        model.parameters(), lab.SGD, mesh, stage=stage, bucket_bytes=300, lr=0.1
    )
    x, _ = batch(0)
    with opt.no_sync():
        model(x[6 * mesh.get_local_rank() :][:6]).square().sum().backward()
    with opt.no_sync() if at_once else nullcontext():
        model(x[:6]).square().sum().backward()
    if at_once:
        opt.reduce_gradients()
    return lab.full_gradients(model)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_parameter_that_was_used_only_under_no_sync_is_reduced(world2, stage):
    model = build("branches")
    x, _ = batch(0)
    for part in (x[:6], x[6:], x[:6], x[:6]):
        (model(part).square().sum() / 2).backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    assert want["sometimes.weight"] is not None
    runs = world2.run(lambda: [only_before(stage, once) for once in (False, True)])
    for found in (found for of_rank in runs for found in of_rank):
        assert [n for n in found if found[n] is None] == [
            n for n in want if want[n] is None
        ]
        used = [n for n in want if want[n] is not None]
        assert deviation(found, {n: want[n] for n in used}) <= 10 * TOLERANCE


def buckets_held(stage):
    mesh = lab.make_mesh(dp=2)["dp"]
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(9)))
    opt = ZeroOptimizer(
        model.parameters(), lab.SGD, mesh, stage=stage, bucket_bytes=1, lr=0.1
    )
    held = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(b.gradient is not None for b in opt._buckets))
        )
    model(torch.ones(2, 4)).sum().backward()
    return held


@pytest.mark.parametrize(("stage", "want"), [(1, [*range(1, 10)]), (2, [1] * 9)])
def test_stage_2_keeps_only_the_bucket_that_travels(world2, stage, want):
    assert world2.run(buckets_held, stage) == [want] * 2


def bitwise(stage, cls):
    mesh = lab.make_mesh(dp=4)["dp"]
    model = build().float()
    opt = ZeroOptimizer(
        model.parameters(), cls, mesh, stage=stage, deterministic=True, lr=0.01
    )
    for step in range(5):
        x, y = (t.float().chunk(4)[mesh.get_local_rank()] for t in batch(step))
        (((model(x) - y) ** 2).mean()).backward()
        opt.step()
        opt.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.fixture(scope="module")
def checked4():
    with lab.World(4, device="cpu", check=True) as world:  # torch's own collectives
        yield world


@pytest.mark.parametrize("cls", [lab.SGD, lab.AdamW])
@pytest.mark.parametrize("stage", [1, 2])
def test_rank_order_makes_it_bitwise_one_process(checked4, stage, cls):
    model = build().float()
    opt = cls(model.parameters(), lr=0.01)
    for step in range(5):
        for x, y in zip(*(t.float().chunk(4) for t in batch(step)), strict=True):
            (((model(x) - y) ** 2).mean() / 4).backward()
        opt.step()
        opt.zero_grad()
    for found in checked4.run(bitwise, stage, cls):
        for a, b in zip(found, model.parameters(), strict=True):
            assert torch.equal(a, b)


def memory(stage):
    mesh = lab.make_mesh(dp=dist.get_world_size())["dp"]
    model = lab.MLP(784, 128, 10)
    opt = ZeroOptimizer(model.parameters(), torch.optim.Adam, mesh, stage=stage, lr=0.1)
    model(torch.ones(2, 784)).sum().backward()
    opt.step()
    state = sum(
        t.nbytes for s in opt.inner.state.values() for t in s.values() if t.ndim
    )
    gradients = sum(
        t.nbytes
        for b in opt._buckets
        for t in {id(t): t for t in (b.gradient, b.slice) if t is not None}.values()
        if t._base is None
    )
    return state, gradients


@pytest.mark.parametrize("stage", [1, 2])
def test_state_is_cut_evenly(world2, stage):
    whole = 101_770 * 4
    for state, gradients in world2.run(memory, stage):
        assert state == whole  # two moments, half of each
        assert gradients == {1: whole, 2: whole / 2}[stage]


@pytest.mark.parametrize("world_size", [1, 3])
def test_other_world_sizes(world_size):
    size = 149  # elements
    with lab.World(world_size, device="cpu") as world:
        found = world.run(train, "mlp", "adamw", 2)
        counts = world.run(owned)
    want = reference("mlp", "adamw", world_size)
    for rank in found:
        assert deviation(rank["params"], want) <= 10 * TOLERANCE
    assert sum(counts) == size
    assert max(counts) - min(counts) <= 1


def owned():
    mesh = lab.make_mesh(dp=dist.get_world_size())["dp"]
    model = build()
    opt = ZeroOptimizer(model.parameters(), lab.SGD, mesh, stage=1, lr=0.1)
    parameters = opt.param_groups[0]["params"]
    return sum(shard_of(p).local.numel() for p in parameters)


def refused():
    full = lab.make_mesh(dp=2)
    mesh, messages = full["dp"], []
    model, other = build("branches"), build()
    warnings.simplefilter("ignore", UserWarning)  # torch's, of a parameter given twice
    engine = lab.DataParallel(other, mesh)
    cuda = nn.Linear(2, 2, device="meta")
    make = lambda p, cls=lab.SGD, on=mesh, stage=1, **o: ZeroOptimizer(
        p, cls, on, stage=stage, **({"lr": 0.1} | o)
    )
    tries = [
        lambda: make(model.parameters(), stage=3),
        lambda: make(model.parameters(), bucket_bytes=0),
        lambda: make(model.parameters(), on=full),
        lambda: make(engine.parameters()),
        lambda: make(cuda.parameters()),
        lambda: make([nn.Parameter(torch.ones(1))]),
        lambda: make([nn.Parameter(torch.ones(2 + dist.get_rank()))]),
        lambda: make(model.parameters(), torch.optim.LBFGS),
        lambda: make(model.parameters(), torch.optim.Adafactor),
        lambda: make(model.parameters(), lr=-1),
        lambda: make([{"params": model.parameters(), "lr": -2}]),
        lambda: make(model.parameters(), Counting),
        lambda: make([model.trunk.weight, model.trunk.bias, model.trunk.weight]),
    ]
    for number, attempt in enumerate(tries):
        with lab.count_comms() as log, pytest.raises(ValueError) as info:
            attempt()
        messages.append(str(info.value))
        assert log.axes == ([] if number != 6 else ["dp"])
    assert not any(map(shard_of, model.parameters()))
    return messages


def test_bad_input_raises_on_every_rank(world2):
    wanted = (
        "stage 3 is fully_shard",
        "at least one byte",
        "takes one, such as mesh['dp']",
        "belongs to another DataParallel already",
        "materialize(model)",
        "1 trainable elements cannot be cut over 2 ranks",
        "holds another model",
        "LBFGS cannot update slices",
        "Adafactor cannot update slices",
        "lr=-1",
        "lr=-2",
        "Counting cannot update slices",
        "given twice",
    )
    for messages in world2.run(refused):
        for message, part in zip(messages, wanted, strict=True):
            assert part in message


def refused_later():
    mesh = lab.make_mesh(dp=2)["dp"]
    model = build("branches")
    opt = ZeroOptimizer(model.parameters(), lab.SGD, mesh, stage=2, lr=0.1)
    loss = lambda: model(batch(0)[0]).sum()
    with pytest.raises(ValueError, match="make a new ZeroOptimizer"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    loss().backward()
    opt.step()
    model.zero_grad()
    for reduce in (opt.reduce_gradients, lambda: loss().backward()):
        with pytest.raises(RuntimeError, match="zero_grad"):
            reduce()
    opt.zero_grad()
    with opt.no_sync():
        loss().backward()
    with pytest.raises(RuntimeError, match="belongs outside"):
        opt.step()
    opt.zero_grad()
    with pytest.raises(TypeError, match="full_state_dict"):
        copy.deepcopy(opt)
    model.frozen.requires_grad_(True)
    loss().backward()
    with pytest.raises(ValueError, match="frozen or unfrozen"):
        opt.step()
    model.frozen.requires_grad_(False)
    state = opt.state_dict()
    opt.load_state_dict(state)
    with pytest.raises(ValueError, match=r"cut for \[ranks, rank, "):
        opt.load_state_dict(state | {"layout": [4, *state["layout"][1:]]})
    with pytest.raises(ValueError, match=r"elements of buckets\] = None"):
        opt.load_state_dict(lab.SGD(model.parameters(), lr=0.1).state_dict())
    weight = model.get_parameter("trunk.weight")
    weight.data = weight.data.clone()
    with pytest.raises(ValueError, match="moved, cast or replaced"):
        opt.step()
    alive = weakref.ref(opt)
    del opt
    gc.collect()
    assert alive() is None
    with pytest.raises(RuntimeError, match="ZeroOptimizer around this model is gone"):
        loss().backward()
    return True


class Counting(lab.SGD):
    """Counts steps itself, so it must be asked once for all parameters."""

    def step(self, closure=None):
        self.num_steps = getattr(self, "num_steps", 0) + 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.num_steps
        return super().step(closure)


def order_of_buckets():
    mesh = lab.make_mesh(dp=2)["dp"]
    model = build()
    opt = ZeroOptimizer(groups(model), lab.SGD, mesh, stage=1, bucket_bytes=1, lr=0.1)
    names = {p: name for name, p in model.named_parameters()}
    return [[names[p] for p in bucket.parameters] for bucket in opt._buckets]


def test_buckets_of_all_groups_leave_in_the_order_of_backward(world2):
    layers = [name.rpartition(".")[0] for name, _ in build().named_parameters()]
    for order in world2.run(order_of_buckets):
        found = [name.rpartition(".")[0] for bucket in order for name in bucket]
        assert found == layers[::-1]


def zeroed(stage):
    mesh = lab.make_mesh(dp=2)["dp"]
    model = build()
    opt = ZeroOptimizer(model.parameters(), lab.SGD, mesh, stage=stage, lr=0.1)
    x, _ = batch(0)
    model(x).sum().backward()
    once = lab.full_gradients(model)
    opt.zero_grad(set_to_none=False)
    zeros = lab.full_gradients(model)
    model(x).sum().backward()
    return once, zeros, lab.full_gradients(model)


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_can_be_set_to_zero_instead_of_none(world2, stage):
    for once, zeros, again in world2.run(zeroed, stage):
        for name, gradient in once.items():
            assert not zeros[name].any()
            assert torch.equal(again[name], gradient)


def state_dict_round_trip():
    mesh = lab.make_mesh(dp=2)["dp"]
    make = lambda model, **o: ZeroOptimizer(
        groups(model), lab.AdamW, mesh, stage=1, lr=0.1, **o
    )
    first, second = build(), build()
    opts = make(first, bucket_bytes=300), make(second, bucket_bytes=300)

    def step(model, opt):
        model(batch(0)[0]).square().sum().backward()
        opt.step()
        opt.zero_grad()

    step(first, opts[0])
    opts[0].param_groups[0]["lr"] = 0.02  # by a scheduler, after the step
    state = opts[0].state_dict()
    second.load_state_dict(first.state_dict())
    opts[1].load_state_dict(pickle.loads(pickle.dumps(state)))
    assert [group["lr"] for group in opts[1].param_groups] == [0.02, 0.1]
    with pytest.raises(ValueError, match="elements of buckets"):
        make(build()).load_state_dict(state)
    for model, opt in zip((first, second), opts, strict=True):
        step(model, opt)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_its_state_dict_continues_a_run(world2):
    assert world2.run(state_dict_round_trip) == [True, True]


def after_its_end():
    mesh = lab.make_mesh(dp=2)["dp"]
    model = build()
    opt = ZeroOptimizer(model.parameters(), lab.SGD, mesh, stage=1, lr=0.1)
    saved = pickle.loads(pickle.dumps(model))
    assert not any(map(shard_of, saved.parameters()))
    model(batch(0)[0]).sum().backward()
    gradient = weakref.ref(shard_of(next(model.parameters())).local)
    del opt
    gc.collect()
    assert gradient() is None
    engine = lab.DataParallel(model, mesh)
    engine(batch(0)[0]).sum().backward()
    before = lab.clip_grad_norm(model, 1e-3)
    after = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).norm()
    return before.item(), after.item()


def test_parameters_forget_an_optimizer_that_is_gone(world2):
    for before, after in world2.run(after_its_end):
        assert before > 1
        assert after == pytest.approx(1e-3, rel=1e-3)


def sparse():
    mesh = lab.make_mesh(dp=2)["dp"]
    table = nn.Embedding(4, 3, sparse=True)
    opt = ZeroOptimizer(table.parameters(), lab.SGD, mesh, stage=2, lr=0.1)
    table(torch.tensor([1])).sum().backward()
    opt.step()


def test_a_sparse_gradient_is_named(world2):
    with pytest.raises(lab.RankError, match="sparse=False"):
        world2.run(sparse)


def test_misuse_is_named(world2):
    assert world2.run(refused_later) == [True, True]


class Decaying(lab.SGD):
    """Counts the steps of each group, and divides the learning rate by them."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr"] = 0.1 / group["count"]
        return super().step(closure)


def discarded():
    mesh = lab.make_mesh(dp=2)["dp"]
    model = build()
    opt = ZeroOptimizer(
        model.parameters(), Decaying, mesh, stage=1, bucket_bytes=1, lr=0.1
    )
    before = [p.detach().clone() for p in model.parameters()]
    with opt.no_sync():
        model(batch(0)[0]).sum().backward()
    opt.zero_grad()
    for _ in range(3):
        opt.step()
    (group,) = opt.param_groups
    pairs = zip(before, model.parameters(), strict=True)
    return group["count"], group["lr"], all(torch.equal(a, b) for a, b in pairs)


def test_zero_grad_discards_whole_gradients_and_step_returns_options(world2):
    assert world2.run(discarded) == [(3, 0.1 / 3, True)] * 2


def backward_on_one_rank():
    mesh = lab.make_mesh(dp=2)["dp"]
    model = build()
    opt = ZeroOptimizer(
        model.parameters(), lab.SGD, mesh, stage=1, bucket_bytes=1, lr=0.1
    )
    if dist.get_rank() == 0:
        model(batch(0)[0]).sum().backward()
    opt.step()


def test_a_rank_that_leaves_out_a_backward_is_told_why_it_fails(world2):
    with pytest.raises(
        lab.RankError, match=r"^rank \d: .*different collectives.*all_ga"
    ):
        world2.run(backward_on_one_rank)


def broken_off():
    mesh = lab.make_mesh(dp=2)["dp"]
    model = build()
    opt = ZeroOptimizer(model.parameters(), lab.SGD, mesh, stage=2, lr=0.1)
    first, *_ = model.parameters()
    hook = first.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(batch(0)[0]).sum().backward()
    hook.remove()
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="after one that broke off"):
        model(batch(0)[0]).sum().backward()
    for go_on in (opt.step, opt.reduce_gradients):
        with pytest.raises(RuntimeError, match="did not end"):
            go_on()
    return True


def test_a_backward_that_broke_off_is_noticed(world2):
    assert world2.run(broken_off) == [True, True]


@pytest.mark.parametrize(
    "cls", [lab.SGD, lab.AdamW, torch.optim.Adam, torch.optim.RAdam, torch.optim.Rprop]
)
def test_elementwise_optimizers_pass(cls):
    assert elementwise_defaults(cls, {"lr": 0.1})["lr"] == 0.1


class Normalized(lab.SGD):
    """Scales each gradient by its norm, as LARS and LAMB do."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad /= p.grad.norm()
        return super().step(closure)


def test_an_optimizer_that_takes_norms_is_found():
    with pytest.raises(ValueError, match="one element depends on others"):
        elementwise_defaults(Normalized, {"lr": 0.1})
