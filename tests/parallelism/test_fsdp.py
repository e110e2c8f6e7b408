"""What `fully_shard` adds to the laws of every engine: when a parameter is whole."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import labpkg as lab
from labpkg.parallelism.fsdp import fully_shard
from labpkg.parallelism.whole import full_gradients, full_state_dict
from labpkg.processes.flat import shard_of
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


def some_inputs_and_some_outputs(keep):
    model = sharded(reshard_after_forward=not keep)
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


@pytest.mark.parametrize("keep", [False, True])
def test_other_ways_into_the_graph(world2, keep):
    model = build()
    x = batch()[0][:2].requires_grad_()
    wants = (
        *torch.autograd.grad(model(x).sum(), x),
        *torch.autograd.grad(model.blocks[0](model.embed(x)).sum(), x),
    )
    for slopes, touched, penalty, state in world2.run(
        some_inputs_and_some_outputs, keep
    ):
        for slope, want in zip(slopes, wants, strict=True):
            assert torch.allclose(slope, want, rtol=TOLERANCE, atol=0)
        assert touched == {n for n in penalty if n.startswith("blocks.0.")}
        for name, gradient in penalty.items():
            assert torch.equal(gradient, 2 * state[name])


# ---- numbers -----------------------------------------------------------------------


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
