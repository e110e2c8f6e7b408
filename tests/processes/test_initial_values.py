"""All layouts start from bitwise the same values, and none from the whole model."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import labpkg as lab
from labpkg.bench.memory import LiveBytes
from labpkg.parallelism.pipeline import Pipeline
from labpkg.parallelism.tensor_parallel import (
    apply_tensor_parallel,
    gpt_tensor_parallel_plan,
)
from labpkg.planning.layout import Layout
from labpkg.processes.initial_values import materialize
from labpkg.processes.parallel_layers import ColumnParallelLinear
from labpkg.processes.stages import split_stages

CONFIG = lab.GPTConfig(
    num_layers=2, width=16, num_heads=4, sequence_length=8, vocab_size=32
)
LAYOUTS = {
    "dp4 zero3": Layout(dp=4, zero=3),
    "tp4": Layout(tp=4),
    "tp4 sequence": Layout(tp=4, sequence_parallel=True),
    "dp2 tp2 zero3": Layout(dp=2, tp=2, zero=3),
    "dp2 tp2 zero2": Layout(dp=2, tp=2, zero=2),
    "pp4": Layout(pp=4),
    "pp2 tp2 sequence": Layout(pp=2, tp=2, sequence_parallel=True),
    "pp2 dp2 zb-v": Layout(pp=2, dp=2, schedule="zb-v"),
}
# With so many blocks, none of which is much, peaks are easy to tell apart.
LARGE = lab.GPTConfig(
    num_layers=16, width=64, num_heads=4, sequence_length=8, vocab_size=64
)


class Rotary(nn.Module):
    """A layer with a buffer that is computed, and one that counts."""

    table: torch.Tensor
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(6), persistent=False)
        self.register_buffer("count", torch.empty((), dtype=torch.int64))
        self.scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.table = torch.arange(6.0)
        self.count = torch.tensor(1)  # another tensor, which is as good
        with torch.no_grad():
            self.scale.fill_(2)

    def forward(self, x):
        return x * self.table * self.scale


def chain():
    """Layers of torch with buffers; the first and the last matrix are one."""
    model = nn.Sequential(
        nn.Linear(6, 6, bias=False),
        nn.BatchNorm1d(6),
        Rotary(),
        nn.Linear(6, 6),
        nn.PReLU(),
        nn.Linear(6, 6),
    )
    model[5].weight = model[0].weight
    model[3].bias.requires_grad_(False)
    return model


def on_meta(build):
    with torch.device("meta"):
        return build()


def cut(layout, config=CONFIG, build=None):
    """Return (mesh, parts of this rank), built on meta and cut, without values."""
    mesh = lab.make_mesh(pp=layout.pp, dp=layout.dp, tp=layout.tp)
    model = on_meta(build or partial(lab.GPT, config))
    if layout.tp > 1:
        options = {"sequence_parallel": layout.sequence_parallel}
        plan = gpt_tensor_parallel_plan(config, **options)
        apply_tensor_parallel(model, mesh["tp"], plan, **options)
    parts = [model]
    if layout.is_pipeline:
        schedule = layout.make_schedule()
        stages = split_stages(model, schedule.num_stages)
        own = schedule.stages_of(mesh["pp"].get_local_rank())
        parts = [stages[i] for i in own]
    if layout.zero == 3:
        parts = [lab.fully_shard(part, mesh["dp"]) for part in parts]
    return mesh, parts


def whole(mesh, parts, layout):
    """Return the model of all ranks, with gradients of one batch for a GPT."""
    tokens = torch.arange(8 * 8).reshape(8, 8) % 32
    if layout.is_pipeline:
        schedule = layout.make_schedule()
        model = Pipeline(parts, schedule, mesh["pp"], loss_fn=lab.cross_entropy)
        model.step(tokens, tokens)
        return model
    (model,) = parts
    lab.cross_entropy(model(tokens), tokens).backward()
    return model


def start(name):
    layout = LAYOUTS[name]
    torch.manual_seed(torch.distributed.get_rank())  # has no say in it
    with lab.count_comms() as log:
        mesh, parts = cut(layout)
        before = torch.get_rng_state()
        for part in parts:
            materialize(part, seed=3)
        assert torch.equal(torch.get_rng_state(), before)
    control = sum(log[axis].payload_bytes for axis in ("pp", "dp", "tp"))
    model = whole(mesh, parts, layout)
    return control, lab.full_state_dict(model), lab.full_gradients(model)


def test_every_layout_starts_and_learns_as_one_process(world4):
    reference = materialize(on_meta(lambda: lab.GPT(CONFIG)), seed=3, device="cpu")
    assert reference.head.output.weight is reference.embedding.tokens.weight
    tokens = torch.arange(8 * 8).reshape(8, 8) % 32
    lab.cross_entropy(reference(tokens), tokens).backward()
    state = reference.state_dict()
    gradients = lab.full_gradients(reference)
    ranks = world4.run(lambda: {name: start(name) for name in LAYOUTS})
    size = 4 * CONFIG.shape.num_parameters
    for name in LAYOUTS:
        for control, found, learnt in (rank[name] for rank in ranks):
            assert control < 0.4 * size, name  # names and random states, no weights
            assert found.keys() == state.keys()
            for key, want in state.items():
                assert torch.equal(found[key], want), (name, key)
            for key, want in gradients.items():
                assert (learnt[key] - want).norm() <= 1e-4 * want.norm(), name


def test_values_are_those_that_the_layers_of_torch_start_from():
    model = materialize(on_meta(chain), seed=1, device="cpu")
    first, norm, rotary, linear, prelu, last = model
    assert last.weight is first.weight
    assert not linear.bias.requires_grad
    state = model.state_dict()
    assert torch.equal(state["1.running_var"], torch.ones(6))
    assert torch.equal(state["1.weight"], torch.ones(6))
    assert norm.num_batches_tracked.dtype == torch.int64
    assert torch.equal(rotary.table, torch.arange(6.0))
    assert rotary.scale == 2
    assert rotary.count == 1
    assert prelu.weight == 0.25
    for name in ("0.weight", "3.weight", "3.bias", "5.bias"):
        assert 0.5 < state[name].abs().max() * 6**0.5 <= 1
    model(torch.randn(4, 6)).sum().backward()
    other = materialize(on_meta(chain), seed=2, device="cpu")
    assert not torch.equal(other[3].weight, linear.weight)
    assert not torch.equal(linear.weight, first.weight)
    longer = materialize(on_meta(lambda: lab.MLP(6, 6, 6, 6, 6)), seed=1, device="cpu")
    shorter = materialize(on_meta(lambda: lab.MLP(6, 6, 6)), seed=1, device="cpu")
    assert torch.equal(longer[2].bias, shorter[2].bias)  # by its name alone


def test_the_values_of_a_gpt_are_spread_as_those_of_its_constructor():
    config = lab.GPTConfig(num_layers=2, width=64, num_heads=4, sequence_length=64)
    model = materialize(on_meta(lambda: lab.GPT(config)), device="cpu")
    for name, built in lab.GPT(config).state_dict().items():
        found = model.state_dict()[name]
        if built.dim() == 1:
            assert torch.equal(found, built)
        else:
            assert found.std() == pytest.approx(built.std().item(), rel=0.05), name


def test_only_what_has_no_value_gets_one():
    model = on_meta(lambda: lab.MLP(4, 4, 4))
    kept = model[0].weight = nn.Parameter(torch.ones(4, 4))
    materialize(model, device="cpu")
    assert model[0].weight is kept
    assert torch.equal(kept, torch.ones(4, 4))
    before = {n: p.clone() for n, p in model.named_parameters()}
    materialize(model, seed=9, device="cpu")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_the_outermost_module_and_the_first_name_of_a_tie_decide():
    outer = Initial(lambda x: x.dim() == 2 and bool(nn.init.zeros_(x).numel()))
    outer.layer = Initial(lambda x: bool(nn.init.ones_(x).numel()))
    outer.layer.layer.other = nn.Parameter(torch.zeros(3))
    inner = materialize(outer.to("meta"), device="cpu").layer.layer
    assert torch.equal(inner.weight, torch.zeros(2, 2))
    assert torch.equal(inner.other, torch.ones(3))
    tied = on_meta(lambda: nn.Sequential(nn.Embedding(64, 9), nn.Linear(9, 64)))
    tied[1].weight = tied[0].weight
    materialize(tied, device="cpu")
    assert tied[1].weight is tied[0].weight
    assert tied[0].get_parameter("weight").std() > 0.8  # a Linear would be narrow


def pieces():
    """Stages of one rank at once; ties and buffers; a layer that was born parallel."""
    mesh = lab.make_mesh(pp=4)
    layout = Layout(pp=4, schedule="gpipe", num_micro_batches=4)
    _, (stage,) = cut(layout, build=chain)
    materialize(stage, seed=1)
    assert stage.origin is None  # or the whole model would stay
    state = lab.full_state_dict(
        Pipeline(stage, layout.make_schedule(), mesh["pp"], loss_fn=nn.MSELoss())
    )
    both = nn.ModuleList(split_stages(on_meta(chain), 4)[::3])
    materialize(both, seed=1)
    tied = both[1].get_parameter("5.weight") is both[0].get_parameter("0.weight")
    tp = lab.make_mesh(tp=4)["tp"]
    layer = on_meta(lambda: ColumnParallelLinear(6, 8, tp))
    materialize(layer, seed=1)
    assert layer.weight.shape == (2, 6)
    return state, tied, lab.full_state_dict(layer)


def test_stages_share_values_whatever_lies_on_a_rank(world4):
    want = materialize(on_meta(chain), seed=1, device="cpu").state_dict()
    linear = materialize(on_meta(lambda: nn.Linear(6, 8)), seed=1, device="cpu")
    for state, tied, layer in world4.run(pieces):
        assert tied
        assert state.keys() == want.keys()
        assert all(torch.equal(state[name], want[name]) for name in want)
        assert torch.equal(layer["weight"], linear.weight)


def peak(name):
    """Return the most bytes of tensors until this rank has its part, and its bytes."""
    layout = LAYOUTS[name]
    cut(layout)  # the first collectives allocate what stays
    with LiveBytes() as live:
        _, parts = cut(layout, LARGE)
        for part in parts:
            materialize(part)
        return live.peak, live.now


def test_no_rank_holds_the_whole_model(world4):
    """At most its part and, twice, the largest tensor, or one unit of a sharded one."""
    names = ["dp4 zero3", "tp4", "pp4", "dp2 tp2 zero3"]
    size = 4 * LARGE.shape.num_parameters
    largest = 4 * 4 * LARGE.width**2
    block = 4 * (12 * LARGE.width**2 + 2 * LARGE.width)
    with LiveBytes() as live:
        model = materialize(on_meta(lambda: lab.GPT(LARGE)), device="cpu")
        assert model.config is LARGE
        assert size <= live.now
    assert live.peak <= size + largest
    for ranks in world4.run(lambda: {name: peak(name) for name in names}):
        for name in names:
            most, left = ranks[name]
            most_of_part = 0.35 * size if name == "pp4" else 0.27 * size
            assert 0.2 * size < left < most_of_part, name
            assert most <= left + (block if "zero" in name else 2 * largest), name
            assert most < 0.4 * size, name


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))


class Around(nn.Module):
    """Has a matrix itself and resets one of its layer's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.weight = nn.Parameter(torch.ones(2))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.ones_(self.inner.weight)


class Forgetful(nn.Module):
    """Counts what its `reset_parameters` does not reset."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("places", torch.arange(2))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


class Unregistered(nn.Linear):
    """Keeps a table that no `state_dict` and no `to` would find."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.table = torch.arange(2)


class Initial(nn.Module):
    """Its layer gets what is given by `fill`."""

    def __init__(self, fill) -> None:
        super().__init__()
        self.layer, self.fill = Bare(), fill

    def init_parameter(self, name: str, tensor: torch.Tensor) -> Any:
        return self.fill(tensor)


class Output(Initial):
    """All but the matrix of inputs is left to the layers, of which one is reset."""

    def __init__(self) -> None:
        super().__init__(None)
        self.layer = nn.MultiheadAttention(2, 1, bias=False)

    def init_parameter(self, name: str, tensor: torch.Tensor) -> bool:
        nn.init.ones_(tensor)
        return name == "layer.in_proj_weight"


def fill_half(x):
    x[0] = 1
    return True


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Bare, r"initial value of weight: Bare has no reset_parameters"),
        (lambda: Initial(lambda x: False), "value of layer.weight: Bare has no"),
        (lambda: Initial(nn.init.ones_), r"init_parameter\('layer.weight', ...\) ret"),
        (lambda: Initial(fill_half), "^layer.weight was not filled"),
        (lambda: nn.Sequential(Forgetful()), "^0.places was not filled"),
        (Unregistered, "Unregistered.table lies on 'meta' and is no buffer"),
        (Output, "MultiheadAttention, around layer.out_proj.weight, may reset it"),
        (Around, "Around, around inner.weight, may reset it"),
        (lambda: nn.MultiheadAttention(4, 2), "MultiheadAttention has no reset"),
    ],
)
def test_values_that_nothing_gives_are_refused(build, message):
    model = on_meta(build)
    with pytest.raises(ValueError, match=message):
        materialize(model, device="cpu")
    assert all(p.is_meta for p in model.parameters())


def test_a_layer_that_resets_what_is_not_its_own_is_refused():
    model = on_meta(Around)
    model.inner = nn.Identity()
    with pytest.raises(ValueError, match=r"reset_parameters\(\) fails alone .*'inner'"):
        materialize(model, device="cpu")
    assert model.weight.is_meta
    assert isinstance(model.inner, nn.Identity)
    with pytest.raises(ValueError, match="no values on 'meta'"):
        materialize(on_meta(lambda: nn.Linear(2, 2)), device="meta")


def test_shapes_and_leftovers_are_told():
    layer = on_meta(lambda: nn.PReLU())

    def reset():
        layer.weight = nn.Parameter(torch.ones(3))

    layer.reset_parameters = reset
    with pytest.raises(ValueError, match=r"weight got a value \(\(3,\)"):
        materialize(layer, device="cpu")
    stage, *_ = split_stages(on_meta(chain), 2)
    beside = nn.ModuleList([stage, nn.Linear(2, 2, device="meta")])
    with pytest.raises(ValueError, match=r"1.weight lies beside the stages"):
        materialize(beside, device="cpu")
    stage, *_ = split_stages(on_meta(chain), 2)
    stage.late = nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match=r"^late.weight came to its stage after"):
        materialize(stage, device="cpu")
    sample = torch.ones(2, 6)
    with pytest.raises(ValueError, match="balance='time' runs the model"):
        split_stages(on_meta(chain), 2, balance="time", sample=sample)


def refused():
    mesh = lab.make_mesh(dp=2)
    rank = mesh["dp"].get_local_rank()
    linear = partial(nn.Linear, 4, 4)
    with pytest.raises(ValueError, match="materialize"):
        lab.DataParallel(on_meta(linear), mesh["dp"])
    with pytest.raises(ValueError, match="materialize"):
        lab.ZeroOptimizer(
            on_meta(linear).parameters(), lab.SGD, mesh["dp"], stage=1, lr=0.1
        )
    with pytest.raises(ValueError, match="holds another model"):
        lab.fully_shard(on_meta(linear) if rank else linear(), mesh["dp"])
    model = lab.fully_shard(on_meta(linear), mesh["dp"])
    with pytest.raises(ValueError, match=r"materialize\(model\) before the first"):
        model(torch.ones(2, 4))
    materialize(model, device="cuda")  # but slices have their place
    return model(torch.ones(2, 4)).isfinite().all().item()


def test_engines_say_when_values_are_missing(world2):
    assert world2.run(refused) == [True, True]
