"""Units alone: which modules they are, what each holds, and where its memory is."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import labpkg as lab
from labpkg.processes.flat import shard_of
from labpkg.processes.units import (
    Unit,
    checked_units,
    default_units,
    members_of_units,
    require_plain_autograd,
    require_shardable,
    tensors_in,
)

# ---- which modules, which parameters -----------------------------------------------


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        pair = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.blocks = nn.ModuleList([pair, nn.Linear(4, 4)])
        self.rows = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4)])])
        self.named = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), nn.Tanh())})
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def names_of(model, modules):
    names = {module: name for name, module in model.named_modules()}
    return [names[module] for module in modules]


def test_default_units_are_called_and_have_parameters():
    model = Nested()
    assert names_of(model, default_units(model)) == [
        "blocks.0",
        "blocks.1",
        "rows.0.0",
        "named.a.0",
    ]
    assert list(default_units(nn.Linear(2, 2))) == []


def test_units_that_would_never_be_gathered_are_refused():
    model = Nested()
    kept = [model.blocks[1], model.embed]
    assert checked_units(model, iter(kept)) == kept
    for unit, match in (
        (model, r"units\[1\], a Nested, is no submodule"),
        (nn.Linear(2, 2), "a Linear, is no submodule"),
        (model.blocks[1], "is blocks.1 again"),
        (model.blocks, "is blocks, a container that is never called"),
        (model.named, "is named, a container that is never called"),
        (model.blocks[0][1], "is blocks.0.1, which has no parameters"),
    ):
        with pytest.raises(ValueError, match=match):
            checked_units(model, [model.blocks[1], unit])


def test_a_parameter_belongs_to_the_innermost_unit_around_all_its_places():
    model = Nested()
    pair, single = model.blocks
    pair[2].bias = pair[0].bias  # tied inside a unit, in two inner ones
    single.weight = pair[0].weight  # tied between two units
    units = [pair, pair[0], pair[2], single, model.embed]
    members = members_of_units(model, units)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {
        name: [names[id(p)] for p in members[module]]
        for module, name in zip(members, names_of(model, members), strict=True)
    } == {
        "": [
            "embed.weight",  # tied to the head, which is no unit
            "blocks.0.0.weight",
            "rows.0.0.weight",
            "rows.0.0.bias",
            "named.a.0.weight",
            "named.a.0.bias",
        ],
        "embed": [],
        "blocks.0": ["blocks.0.0.bias"],
        "blocks.0.0": [],
        "blocks.0.2": ["blocks.0.2.weight"],
        "blocks.1": ["blocks.1.bias"],
    }
    places = members[pair][pair[0].bias]
    assert places == [(pair[0], "bias"), (pair[2], "bias")]
    shared = nn.Linear(2, 2)
    twice = nn.ModuleList([shared, shared])  # one place, met twice
    assert members_of_units(twice, [])[twice][shared.weight] == [(shared, "weight")]


def test_tensors_are_found_in_any_output():
    @dataclass(slots=True)
    class Slotted:
        x: torch.Tensor
        rest: object = None

    a, b, c, d = (torch.zeros(i) for i in range(4))
    loop = SimpleNamespace(d=d)
    loop.self = loop
    output = {"a": (a, 3), "b": [Slotted(b, Slotted(c))], "loop": loop}
    found = list(tensors_in([output, nn.Linear(2, 2), nn.Linear, None]))
    assert [id(x) for x in found] == [id(x) for x in (a, b, c, d)]


def test_transforms_are_refused_where_autograd_records():
    def inside(x):
        require_plain_autograd()
        return x

    require_plain_autograd()
    with torch.no_grad():
        torch.func.vmap(inside)(torch.ones(2))
    with pytest.raises(RuntimeError, match="units="):
        torch.func.vmap(inside)(torch.ones(2))


# ---- memory --------------------------------------------------------------------------


def make_unit(**options):
    mesh = lab.make_mesh(dp=dist.get_world_size())["dp"]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.LSTM(5, 2), nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    model[2].double()
    model[0].weight.tag = "kept"
    old = dict(model.named_parameters())
    want = {name: p.detach().clone() for name, p in old.items()}
    options = {"param_dtype": None, "reduce_dtype": None} | options
    unit = Unit(members_of_units(model, [])[model], mesh, **options)
    return model, unit, want, old


def life():
    model, unit, want, old = make_unit()
    n, rank = dist.get_world_size(), dist.get_rank()
    assert len(unit.groups) == 3  # trained and frozen float32, float64
    for group in unit.groups:
        parts = torch.arange(group.bucket.num_elements).tensor_split(n)
        assert group.own.numel() == parts[rank].numel()
    sliced = dict(model.named_parameters())
    assert list(sliced) == list(want)
    assert sliced["0.weight"].tag == "kept"
    for name, p in sliced.items():
        shard = shard_of(p)
        assert torch.equal(p, want[name].view(-1)[shard.start : shard.stop])
        assert p.requires_grad == (name != "0.bias")
        with pytest.raises(RuntimeError, match="make the optimizer after fully_shard"):
            _ = old[name] + 1
    for _ in range(2):
        assert not unit.is_gathered()
        unit.start()
        unit.enter()
        assert unit.is_gathered()
        for name, p in model.named_parameters():
            assert torch.equal(p, want[name])
        flat = [id(weight) for weight in model[1]._flat_weights]
        assert flat == [id(p) for p in model[1].parameters()]
        unit.hide()
        for name, p in model.named_parameters():
            assert (p.shape, p.dtype) == (want[name].shape, want[name].dtype)
            assert (p.dim(), p.numel()) == (want[name].dim(), want[name].numel())
            with pytest.raises(RuntimeError, match=rf"{name[2:]} is read outside"):
                _ = p + 1
        unit.leave()
        assert dict(model.named_parameters()) == sliced
        unit.free()
        assert all(g.flat.untyped_storage().nbytes() == 0 for g in unit.groups)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.mul_(2)
                want[name] *= 2
    return True


@pytest.mark.parametrize("n", [2, 4])
def test_slices_become_whole_and_slices_again(request, n):
    assert request.getfixturevalue(f"world{n}").run(life) == n * [True]


def reduced(param_dtype, reduce_dtype):
    _, unit, _, _ = make_unit(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    rank, found = dist.get_rank(), []
    for turn in range(2):
        for group in unit.groups:
            if not group.is_trained:
                continue
            for i, full in enumerate(group.full):
                if i % 2 or rank == 0:  # the first is missing on the others
                    full.grad = torch.full_like(full, 4.0 * (rank + 1))
            assert group.has_gradients()
            reduction = group.reduce(deterministic=True)
            assert not group.has_gradients()
            assert reduction.own.dtype == (reduce_dtype or group.flat.dtype)
            reduction.wait()
            # Of the whole, nothing is kept.
            assert reduction.own.untyped_storage().nbytes() == group.own.nbytes
            assert reduction.own.dtype == group.own.dtype
            reduction.deliver(set(group.sliced[:-1]))
            assert group.sliced[-1].grad is None
            for i, p in enumerate(group.sliced[:-1]):
                want = 6.0 if i % 2 else 2.0  # (4 + 8) / 2, (4 + 0) / 2
                assert (p.grad == (turn + 1) * want).all()
                found.append(p.grad.numel())
    return sum(found)


@pytest.mark.parametrize("reduce_dtype", [None, torch.float64])
@pytest.mark.parametrize("param_dtype", [None, torch.bfloat16])
def test_gradients_are_averaged_into_slices(world2, param_dtype, reduce_dtype):
    assert all(world2.run(reduced, param_dtype, reduce_dtype))


def given_or_changed():
    model, unit, _, _ = make_unit()
    unit.start()
    unit.enter()
    weight = model.get_parameter("0.weight")
    unit.require_none_of([weight + 1, weight.clone(), torch.ones(2)])
    for x in (weight, weight.t(), weight[0]):
        with pytest.raises(RuntimeError, match="returned a parameter"):
            unit.require_none_of([torch.ones(2), x])
    unit.leave()
    unit.require_intact()
    model[2].weight.requires_grad_(False)
    unit.require_intact()  # to freeze is allowed
    model[0].bias.requires_grad_(True)
    with pytest.raises(ValueError, match="unfrozen after fully_shard"):
        unit.require_intact()
    model[0].bias.requires_grad_(False)
    version = unit.version()
    with torch.no_grad():
        model.get_parameter("0.weight").add_(1)
    assert unit.version() > version
    model[2].float()
    with pytest.raises(ValueError, match="moved or converted"):
        unit.require_intact()
    model[0].weight = nn.Parameter(torch.ones(5, 3))
    with pytest.raises(ValueError, match="weight was replaced"):
        unit.require_intact()
    return True


def test_what_leaves_a_unit_and_what_changes_it_is_noticed(world2):
    assert world2.run(given_or_changed) == [True, True]


def unshardable():
    mesh = lab.make_mesh(dp=2)
    partly = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with lab.count_comms() as log:
        for match, model, axis in (
            ("takes one, such as", nn.Linear(2, 2), mesh),
            ("0 elements in 0 parameters, fewer", nn.ReLU(), mesh["dp"]),
            ("lies on meta", partly, mesh["dp"]),
            ("sparse=False", nn.Embedding(4, 2, sparse=True), mesh["dp"]),
        ):
            with pytest.raises(ValueError, match=match):
                require_shardable(model, axis)
        require_shardable(nn.Linear(1, 1), mesh["dp"])
    return log["dp"].calls


def test_what_cannot_be_sharded_is_refused(world2):
    assert world2.run(unshardable) == [0, 0]
