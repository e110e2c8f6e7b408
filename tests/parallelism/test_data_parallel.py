"""`DataParallel` beyond the laws of every engine, which are in test_laws.py."""

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn

import labpkg as lab
from labpkg.parallelism.data_parallel import average_gradients_bucketed
from labpkg.processes import transport

TOLERANCE = 1e-12


class Tied(nn.Module):
    """Output weights are the embedding; backward reaches them twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 6, bias=False)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.body(self.embed(x))))


class Branches(nn.Module):
    """`never` is used by nobody, `sometimes` only by samples with x[0] > 0."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(6, 6)
        self.sometimes = nn.Linear(6, 6)
        self.never = nn.Linear(6, 6)

    def forward(self, x):
        y = self.trunk(x)
        if (x[:, 0] > 0).any():
            y = y + self.sometimes(y) * (x[:, :1] > 0)
        return y


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 3, 3, padding=1)
        self.register_buffer("scale", torch.full((1,), 0.5))
        self.out = nn.Linear(18, 6)

    def forward(self, x):
        return self.out(torch.relu(self.conv(x[:, None])).flatten(1) * self.scale)


MODELS = {
    "mlp": lambda: lab.MLP(6, 11, 6),
    "tied": Tied,
    "branches": Branches,
    "conv": Conv,
}
OPTIMIZERS = {
    "sgd": lambda p: lab.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: lab.AdamW(p, lr=0.01),
}


def global_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator(device="cpu").manual_seed(1000 + step)
    x = torch.randn(12, 6, dtype=torch.float64, generator=g, device="cpu")
    x[:, 0] = torch.linspace(-1, 1, 12)  # the first ranks never take the branch
    return x, torch.randn(12, 6, dtype=torch.float64, generator=g, device="cpu")


def build(name: str) -> nn.Module:
    torch.manual_seed(42 + (dist.get_rank() if dist.is_initialized() else 0))
    return MODELS[name]().double()


def reference(name: str, optimizer: str, steps: int = 5) -> dict:
    model = build(name)
    opt = OPTIMIZERS[optimizer](model.parameters())
    for step in range(steps):
        x, y = global_batch(step)
        opt.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        opt.step()
    grads = {n: p.grad for n, p in model.named_parameters()}
    return {"grads": grads, "params": model.state_dict()}


def train(name: str, optimizer: str, bucket_bytes: int) -> dict:
    mesh = lab.make_mesh(dp=dist.get_world_size())["dp"]
    model = lab.DataParallel(build(name), mesh, bucket_bytes=bucket_bytes)
    opt = OPTIMIZERS[optimizer](model.parameters())
    for step in range(5):
        x, y = (t.chunk(mesh.size())[mesh.get_local_rank()] for t in global_batch(step))
        opt.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        opt.step()
    return model.state_dict()


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


@pytest.mark.parametrize("bucket_bytes", [1, 2**30])
def test_bucket_size_changes_nothing(world2, bucket_bytes):
    want = reference("branches", "adamw")["params"]
    for found in world2.run(train, "branches", "adamw", bucket_bytes):
        assert deviation(found, want) <= 10 * TOLERANCE


def several_backwards():
    mesh = lab.make_mesh(dp=2)["dp"]
    model = lab.DataParallel(build("mlp"), mesh)
    x, y = (t.chunk(2)[mesh.get_local_rank()] for t in global_batch(0))
    for part in (slice(0, 3), slice(3, 6)):
        (((model(x[part]) - y[part]) ** 2).mean() / 2).backward()
    return {k: p.grad for k, p in model.named_parameters()}


def test_several_synchronised_backwards_add_up(world2):
    want = reference("mlp", "sgd", steps=1)["grads"]
    for grads in world2.run(several_backwards):
        assert deviation(grads, want) <= TOLERANCE


def used_only_in_the_first_micro_batch(reduce_dtype, at_once):
    mesh = lab.make_mesh(dp=2)["dp"]
    model = lab.DataParallel(build("branches"), mesh, reduce_dtype=reduce_dtype)
    x = torch.full((1, 6), mesh.get_local_rank() + 1.0, dtype=torch.float64)
    with model.no_sync():
        model(x).sum().backward()  # x[0] > 0 takes the branch
    with model.no_sync() if at_once else nullcontext():
        model(-x).sum().backward()
    for _ in range(2 * at_once):  # averages of averages are the same
        with lab.count_comms() as log:
            model.reduce_gradients()
        size = (reduce_dtype or x.dtype).itemsize
        assert log["dp"].payload_bytes == lab.data_parallel_bytes(model, itemsize=size)
    return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(
    ("reduce_dtype", "tolerance"), [(None, TOLERANCE), (torch.float32, 1e-6)]
)
def test_a_gradient_from_an_earlier_micro_batch_is_averaged(
    world2, reduce_dtype, tolerance, at_once
):
    model = build("branches")
    for value in (1.0, -1.0, 2.0, -2.0):
        model(torch.full((1, 6), value, dtype=torch.float64)).sum().backward()
    grads = {k: p.grad / 2 for k, p in model.named_parameters() if p.grad is not None}
    for found in world2.run(used_only_in_the_first_micro_batch, reduce_dtype, at_once):
        assert deviation(found, grads) <= tolerance


def manual(average):
    mesh = lab.make_mesh(dp=4)["dp"]
    model = build("tied")
    for p in model.parameters():
        p.data = lab.broadcast(p.detach(), mesh)
    x, y = (t.chunk(4)[mesh.get_local_rank()] for t in global_batch(0))
    ((model(x) - y) ** 2).mean().backward()
    average(model, mesh)
    return {k: p.grad for k, p in model.named_parameters()}


@pytest.mark.parametrize("average", [lab.average_gradients, average_gradients_bucketed])
def test_naive_versions_equal_one_process(world4, average):
    want = reference("tied", "sgd", steps=1)["grads"]
    for grads in world4.run(manual, average):
        assert deviation(grads, want) <= TOLERANCE


def uneven(counts):
    mesh = lab.make_mesh(dp=len(counts))["dp"]
    rank = mesh.get_local_rank()
    model = lab.DataParallel(build("mlp"), mesh)
    x, _ = global_batch(0)
    start, labels = sum(counts[:rank]), torch.arange(12) % 6
    mine = slice(start, start + counts[rank])
    loss = lab.cross_entropy(model(x[mine]), labels[mine])
    (loss * lab.mean_weight(counts[rank], mesh)).backward()
    return {k: p.grad for k, p in model.named_parameters()}


@pytest.mark.parametrize("counts", [(5, 4, 3, 0), (12, 0, 0, 0), (1, 1, 1, 9)])
def test_uneven_and_empty_shards_are_weighted(world4, counts):
    model, (x, _) = build("mlp"), global_batch(0)
    lab.cross_entropy(model(x), torch.arange(12) % 6).backward()
    want = {k: p.grad for k, p in model.named_parameters()}
    for grads in world4.run(uneven, counts):
        assert deviation(grads, want) <= TOLERANCE


def test_mean_weight_refuses_what_has_no_mean(world2):
    def refuse():
        mesh = lab.make_mesh(dp=2)["dp"]
        for counts in ((0, 0), (3, -1), (3, float("nan")), (float("inf"), 3)):
            with pytest.raises(ValueError, match="one sample in all"):
                lab.mean_weight(counts[mesh.get_local_rank()], mesh)
        return lab.mean_weight(1 + 2 * mesh.get_local_rank(), mesh)

    assert world2.run(refuse) == [0.5, 1.5]


def bad_models():
    mesh = lab.make_mesh(dp=2)
    with pytest.raises(ValueError, match="takes one, such as"):
        lab.DataParallel(nn.Linear(2, 2), mesh)
    with pytest.raises(ValueError, match="no parameter that needs a gradient"):
        lab.DataParallel(nn.ReLU(), mesh["dp"])
    for option, value in (
        ("bucket_bytes", 0),
        ("check_every", -1),
        ("reduce_dtype", torch.int32),
    ):
        with lab.count_comms() as log, pytest.raises(ValueError, match=f"{option}="):
            lab.DataParallel(nn.Linear(2, 2), mesh["dp"], **{option: value})
        assert log["dp"].calls == 0
    elsewhere = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with (
        lab.count_comms() as log,
        pytest.raises(ValueError, match=r"1\.weight lies on meta.*materialize"),
    ):
        lab.DataParallel(elsewhere, mesh["dp"])
    assert log["dp"].calls == 0
    complex_model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match="complex gradients"):
        lab.DataParallel(complex_model, mesh["dp"], reduce_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"rank \d of the axis holds another"):
        lab.DataParallel(nn.Linear(2, 2 + dist.get_rank()), mesh["dp"])
    return True


def test_bad_input_raises_on_every_rank(world2):
    assert world2.run(bad_models) == [True, True]


def names_and_zeroing():
    mesh = lab.make_mesh(dp=2)["dp"]
    model = lab.DataParallel(build("conv"), mesh)
    inner = model.module
    assert list(model.state_dict()) == list(inner.state_dict())
    assert [n for n, _ in model.named_parameters()] == [
        n for n, _ in inner.named_parameters()
    ]
    assert [n for n, _ in model.named_buffers()] == ["scale"]
    model.load_state_dict(inner.state_dict())
    x, y = global_batch(0)
    results = []
    for to_none in (True, False, True):
        model.zero_grad(set_to_none=to_none)
        ((model(x) - y) ** 2).mean().backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    return True


def test_names_carry_no_prefix_and_zero_grad_works(world2):
    assert world2.run(names_and_zeroing) == [True, True]


def broken_backward():
    mesh = lab.make_mesh(dp=2)["dp"]
    model = lab.DataParallel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), mesh)

    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, *_):
            raise KeyError("planted")

    first, second = model.module
    with pytest.raises(KeyError):
        second(Break.apply(first(torch.ones(1, 2)))).sum().backward()
    for go_on in (lambda: model(torch.ones(1, 2)), model.reduce_gradients):
        with pytest.raises(RuntimeError, match="did not end"):
            go_on()
    return True


def test_a_broken_backward_is_named(world2):
    assert world2.run(broken_backward) == [True, True]


def reentrant():
    from torch.utils.checkpoint import checkpoint

    mesh = lab.make_mesh(dp=2)["dp"]
    layer = nn.Linear(3, 3)
    model = lab.DataParallel(layer, mesh)
    x = torch.ones(1, 3, requires_grad=True)
    model(checkpoint(layer, x, use_reentrant=False)).sum().backward()
    model.zero_grad()
    out = model(checkpoint(layer, x, use_reentrant=True))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        out.sum().backward()
    return True


def test_gradients_that_come_twice_are_refused(world2):
    assert world2.run(reentrant) == [True, True]


def mixed_model(rank):
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).bfloat16())
    return model.append(nn.Linear(3, 3).double())


def mixed_loss(model, rank):
    first, second, third = model
    y = first(torch.full((1, 3), 1.0 + rank))
    return third(second(y.bfloat16()).double()).square().sum()


def mixed_dtypes():
    mesh = lab.make_mesh(dp=2)["dp"]
    model = lab.DataParallel(mixed_model(dist.get_rank()), mesh)
    with lab.count_comms() as log:
        mixed_loss(model.module, dist.get_rank()).backward()
    assert log["dp"].payload_bytes == lab.data_parallel_bytes(model)
    assert log["dp"].calls == 3
    return [p.grad for p in model.parameters()]


def test_mixed_dtypes_get_buckets_of_their_own(world2):
    model = mixed_model(0)
    for rank in range(2):
        (mixed_loss(model, rank) / 2).backward()
    for grads in world2.run(mixed_dtypes):
        for grad, parameter in zip(grads, model.parameters(), strict=True):
            assert grad.dtype == parameter.dtype
            assert torch.equal(grad, parameter.grad)


def refused_after_wrapping():
    mesh = lab.make_mesh(dp=2)["dp"]
    layer = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False))
    model = lab.DataParallel(layer, mesh)
    x = torch.ones(1, 3)
    with pytest.raises(ValueError, match=r"0\.weight belongs to another DataParallel"):
        lab.DataParallel(layer, mesh)
    with pytest.raises(TypeError, match=r"copy its \.module"):
        copy.deepcopy(model)
    layer[1].requires_grad_(True)
    with pytest.raises(ValueError, match=r"1\.weight was unfrozen"):
        model(x)
    layer[1].requires_grad_(False)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    with pytest.raises(ValueError, match="replaced, cast or moved after"):
        model(x)
    with pytest.raises(ValueError, match="sparse=False"):
        lab.DataParallel(nn.Embedding(4, 2, sparse=True), mesh)
    model = lab.DataParallel(nn.Linear(3, 3), mesh).double()
    with pytest.raises(ValueError, match=r"weight was .* cast or moved"):
        model(x.double())
    cut = lab.fully_shard(nn.Linear(3, 3), mesh)
    for average in (lab.average_gradients, average_gradients_bucketed):
        with pytest.raises(ValueError, match="no replicas to average"):
            average(cut, mesh)
    return True


def test_what_would_not_be_averaged_is_refused(world2):
    assert world2.run(refused_after_wrapping) == [True, True]


def dropped_wrapper():
    mesh = lab.make_mesh(dp=2)["dp"]
    layer = nn.Linear(3, 3)
    engine = lab.DataParallel(layer, mesh)
    alive = weakref.ref(engine)
    engine(torch.ones(1, 3)).sum().backward()
    del engine
    gc.collect()
    assert alive() is None  # nothing keeps the buckets
    with pytest.raises(RuntimeError, match="keep the wrapper"):
        layer(torch.ones(1, 3)).sum().backward()
    engine = lab.DataParallel(layer, mesh)  # a new one takes over
    engine.zero_grad()
    engine(torch.full((1, 3), 1.0 + dist.get_rank())).sum().backward()
    return layer.bias.grad, layer.weight.grad


def test_a_dropped_wrapper_frees_its_buckets_and_never_trains_alone(world2):
    for bias, weight in world2.run(dropped_wrapper):
        assert torch.equal(bias, torch.ones(3))
        assert torch.equal(weight, torch.full((3, 3), 1.5))


def complex_and_unused():
    mesh = lab.make_mesh(dp=2)["dp"]
    model = nn.Module()
    model.used = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    model.unused = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    model.forward = lambda scale: (model.used * scale).abs().sum()
    engine = lab.DataParallel(model, mesh)
    engine(1.0 + dist.get_rank()).backward()
    return model.used.grad, model.unused.grad


def test_complex_parameters_are_averaged_too(world2):
    for used, unused in world2.run(complex_and_unused):
        assert torch.allclose(used, torch.full((2,), 1.5 + 0j))
        assert unused is None


def weighted_by_tokens():
    mesh = lab.make_mesh(dp=4)["dp"]
    model = lab.DataParallel(build("mlp"), mesh)
    x, labels = token_batch()
    x, labels = (t.chunk(4)[mesh.get_local_rank()] for t in (x, labels))
    count = int((labels != -100).sum())
    (lab.cross_entropy(model(x), labels) * lab.mean_weight(count, mesh)).backward()
    return {k: p.grad for k, p in model.named_parameters()}


def token_batch():
    labels = torch.arange(12) % 6
    labels[[0, 1, 2, 4, 11]] = -100  # rank 0 counts nothing, the others 2, 3, 2
    return global_batch(0)[0], labels


def test_losses_are_weighted_by_tokens(world4):
    model, (x, labels) = build("mlp"), token_batch()
    lab.cross_entropy(model(x), labels).backward()
    want = {k: p.grad for k, p in model.named_parameters()}
    for grads in world4.run(weighted_by_tokens):
        assert deviation(grads, want) <= TOLERANCE


def accumulate_in_one_process(optimizer, steps=5):
    model = build("mlp").float()
    opt = OPTIMIZERS[optimizer](model.parameters())
    for step in range(steps):
        opt.zero_grad()
        for x, y in zip(*(t.float().chunk(4) for t in global_batch(step)), strict=True):
            (((model(x) - y) ** 2).mean() / 4).backward()
        opt.step()
    return model.state_dict()


def train_in_rank_order(optimizer, *, deterministic=True, steps=5):
    mesh = lab.make_mesh(dp=4)["dp"]
    transport.use_messages(mesh.get_group())
    model = lab.DataParallel(
        build("mlp").float(), mesh, bucket_bytes=200, deterministic=deterministic
    )
    opt = OPTIMIZERS[optimizer](model.parameters())
    for step in range(steps):
        x, y = (t.float().chunk(4)[mesh.get_local_rank()] for t in global_batch(step))
        opt.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        opt.step()
    return model.state_dict()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rank_order_is_bitwise_one_process_by_messages_too(world4, optimizer):
    want = accumulate_in_one_process(optimizer)
    for found in world4.run(train_in_rank_order, optimizer):
        assert all(torch.equal(found[name], want[name]) for name in want)


def test_a_ring_is_not_in_rank_order(world4):
    want = accumulate_in_one_process("sgd")
    found = world4.run(train_in_rank_order, "sgd", deterministic=False)[0]
    assert not all(torch.equal(found[name], want[name]) for name in want)


def in_half(dtype, reduce_dtype, micro):
    mesh = lab.make_mesh(dp=dist.get_world_size())["dp"]
    model = build("branches").to(dtype)
    model = lab.DataParallel(model, mesh, bucket_bytes=200, reduce_dtype=reduce_dtype)
    x = global_batch(0)[0].to(dtype).chunk(mesh.size())[mesh.get_local_rank()]
    results = []
    for _ in range(2):  # the second pass meets what the first has left
        model.zero_grad()
        with lab.count_comms() as log:
            for i in range(micro):
                with model.no_sync() if i < micro - 1 else nullcontext():
                    (model(x).square().sum() / micro).backward()
        size = reduce_dtype.itemsize
        want = lab.data_parallel_bytes(model, itemsize=size)
        assert log["dp"].payload_bytes == want
        results.append({k: p.grad for k, p in model.named_parameters()})
    assert all(g is None or g.dtype == dtype for g in results[1].values())
    return results[1]


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "reduce_dtype", "tolerance"),
    [
        (torch.float64, torch.bfloat16, 2**-7),
        (torch.float64, torch.float32, 1e-6),
        (torch.float32, torch.float64, 1e-6),
    ],
)
def test_gradients_travel_in_another_dtype(
    world4, dtype, reduce_dtype, tolerance, micro
):
    model = build("branches")
    for x in global_batch(0)[0].chunk(4):
        (model(x).square().sum() / 4).backward()
    want = {k: p.grad for k, p in model.named_parameters()}
    assert want["never.weight"] is None
    for grads in world4.run(in_half, dtype, reduce_dtype, micro):
        assert deviation(grads, want) <= tolerance
        if reduce_dtype == torch.bfloat16:  # it did travel so
            assert deviation(grads, want) > 1e-5
            for g in grads.values():
                assert g is None or torch.equal(g, g.bfloat16().to(dtype))


def thirds():
    mesh = lab.make_mesh(dp=3)["dp"]
    torch.manual_seed(0)
    model = nn.Linear(20, 20)
    engine = lab.DataParallel(model, mesh, reduce_dtype=torch.float64)
    engine(torch.randn(1, 20)).sum().backward()
    return model.weight.grad


def test_a_wider_dtype_takes_shares_without_rounding():
    torch.manual_seed(0)
    model = nn.Linear(20, 20)
    model(torch.randn(1, 20)).sum().backward()
    with lab.World(3, device="cpu") as world:
        for grad in world.run(thirds):  # three float32 thirds are not always a whole
            assert torch.equal(grad, model.weight.grad)


def test_one_rank_takes_the_same_lines():
    with lab.World(1, device="cpu") as world:
        (grads,) = world.run(in_half, torch.float64, torch.float32, 2)
    model = build("branches")
    model(global_batch(0)[0]).square().sum().backward()
    want = {k: p.grad for k, p in model.named_parameters()}
    assert deviation(grads, want) <= 1e-6


def norm_model():
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 6)).double()


def train_norm(broadcast_buffers):
    mesh = lab.make_mesh(dp=2)["dp"]
    torch.manual_seed(dist.get_rank())
    model = lab.DataParallel(
        norm_model(), mesh, broadcast_buffers=broadcast_buffers, bucket_bytes=2**10
    )
    opt = lab.SGD(model.parameters(), lr=0.1)
    seen, counts = [], []
    for step in range(3):
        x, y = (t.chunk(2)[mesh.get_local_rank()] for t in global_batch(step))
        opt.zero_grad()
        with lab.count_comms() as log:
            with model.no_sync():
                ((model(x[:3]) - y[:3]) ** 2).mean().backward()
            ((model(x[3:]) - y[3:]) ** 2).mean().backward()
        counts.append((log["dp", "broadcast"].calls, log["dp"].payload_bytes))
        seen.append({n: b.clone() for n, b in model.named_buffers()})
        opt.step()
    model.eval()
    with lab.count_comms() as log:
        model(x)
        model.train()
        with torch.no_grad():
            model(x)
    assert log["dp"].calls == 0  # evaluation may run on one rank alone
    formula = lab.data_parallel_bytes(model, buffers=broadcast_buffers)
    assert counts == [(2 if broadcast_buffers else 0, formula)] * 3
    return seen


def test_buffers_follow_rank_0(world2):
    first, second = world2.run(train_norm, True)
    alone, other = world2.run(train_norm, False)
    for step in range(3):
        # Rank 0 is never overwritten, so it sees what it would have seen alone.
        for name, value in first[step].items():
            assert torch.equal(value, alone[step][name])
    # The others forget before each step how they differed: two forwards of a step keep
    # 0.9 ** 2 of it.
    past, now = (other[i]["1.running_mean"] for i in (1, 2))
    forgotten = 0.81 * (past - alone[1]["1.running_mean"])
    assert forgotten.abs().max() > 1e-3
    assert torch.allclose(second[2]["1.running_mean"], now - forgotten)


def two_forwards_before_backward():
    mesh = lab.make_mesh(dp=2)["dp"]
    model = lab.DataParallel(build("conv"), mesh)
    x = global_batch(0)[0].chunk(2)[mesh.get_local_rank()]
    (model(x).sum() + model(2 * x).sum()).backward()  # "scale" is saved for backward
    return {k: p.grad for k, p in model.named_parameters()}


def test_buffers_stay_as_they_are_until_backward(world2):
    model = build("conv")
    x = global_batch(0)[0]
    ((model(x).sum() + model(2 * x).sum()) / 2).backward()
    want = {k: p.grad for k, p in model.named_parameters()}
    for grads in world2.run(two_forwards_before_backward):
        assert deviation(grads, want) <= TOLERANCE


def flip(parameter, place):
    """Flip the lowest bit of one number."""
    with torch.no_grad():
        parameter.view(-1).view(torch.int64)[place] ^= 1


def drift(every):
    mesh = lab.make_mesh(dp=4)["dp"]
    model = lab.DataParallel(build("tied"), mesh, check_every=every)
    opt = OPTIMIZERS["adamw"](model.parameters())
    x = global_batch(0)[0].chunk(4)[mesh.get_local_rank()]
    for step in range(10):
        try:
            loss = model(x).square().sum()
        except RuntimeError as error:
            return step, str(error)
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step == 3 and mesh.get_local_rank() == 2:
            flip(model.module.body.weight, 17)
    return None


@pytest.mark.parametrize(("every", "found"), [(1, 4), (3, 6)])
def test_a_flipped_bit_is_named_at_the_next_check(world4, every, found):
    for step, message in world4.run(drift, every):
        assert step == found
        assert "rank 2 in body.weight first (1 of 3 tensors" in message
        assert "rank 0" not in message


def test_without_a_check_it_goes_unnoticed(world4):
    assert world4.run(drift, 0) == [None] * 4


def statistics_that_differ():
    mesh = lab.make_mesh(dp=2)["dp"]
    model = lab.DataParallel(norm_model(), mesh, check_every=1, broadcast_buffers=False)
    x = global_batch(0)[0].chunk(2)[mesh.get_local_rank()]
    for _ in range(2):
        model(x).sum().backward()
    return model.module[1].running_mean


def test_the_guard_lets_statistics_differ(world2):
    first, second = world2.run(statistics_that_differ)
    assert not torch.equal(first, second)


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.model = inner
        self.head = nn.Linear(6, 2).double()


def nested():
    mesh = lab.make_mesh(dp=2)["dp"]
    plain = Outer(nn.Sequential(build("conv"), nn.BatchNorm1d(6).double()))
    outer = Outer(
        lab.DataParallel(nn.Sequential(build("conv"), nn.BatchNorm1d(6).double()), mesh)
    )
    assert list(outer.state_dict()) == list(plain.state_dict())
    for names in ("named_parameters", "named_buffers"):
        got, want = (
            [name for name, _ in getattr(module, names)()] for module in (outer, plain)
        )
        assert got == want
    with torch.no_grad():
        for tensor in plain.state_dict().values():
            tensor += 1
    outer.load_state_dict(plain.state_dict())
    for name, tensor in outer.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name])
    state = plain.state_dict()
    del state["model.0.scale"]
    state["model.0.other"] = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"Missing.*scale(?s:.*)Unexpected.*other"):
        outer.load_state_dict(state)
    outer.load_state_dict({**plain.state_dict()}, assign=True)
    with pytest.raises(ValueError, match="replaced, cast or moved after"):
        outer.model(torch.ones(2, 6, dtype=torch.float64))
    return True


def test_a_wrapper_inside_a_module_adds_no_prefix(world2):
    assert world2.run(nested) == [True, True]
