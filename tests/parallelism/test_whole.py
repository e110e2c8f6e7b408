"""Whole gradients and state: those of one process, saved and loaded by any engine."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import labpkg as lab
from labpkg.bench.memory import LiveBytes
from labpkg.parallelism.fsdp import fully_shard
from labpkg.parallelism.whole import (
    full_gradients,
    full_state_dict,
    load_full_state_dict,
    param_groups,
)
from labpkg.parallelism.zero import ZeroOptimizer
from labpkg.processes.flat import shard_of
from tests.parallelism.shards import cut_in_place, cut_whole


class Odd(nn.Module):
    """Tied, frozen, unused, empty and without dimensions; a buffer; odd sizes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 5, bias=False, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)
        self.head = nn.Linear(3, 5, dtype=torch.float64)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(2, 2, dtype=torch.float64).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        nothing = torch.zeros(0, 3, dtype=torch.float64)
        self.empty = nn.Parameter(nothing, requires_grad=False)

    def forward(self, step):
        loss = torch.zeros((), dtype=torch.float64)
        for name, p in self.named_parameters():
            if name != "unused" and p.requires_grad:
                loss = loss + (p * direction(name, p.shape, step)).sum()
        return loss


def odd(seed=0):
    torch.manual_seed(seed)
    return Odd()


def direction(name, shape, step):
    """Return the gradient that every test uses; `unused` has none."""
    generator = torch.Generator("cpu").manual_seed(100 * step + len(name))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def descend(model, optimizer, steps, is_cut_by_hand=False):
    """Take steps along the same gradients under every engine."""
    for step in steps:
        if is_cut_by_hand:
            for name, p in model.named_parameters():
                shard = shard_of(p)
                assert shard is not None
                # What is empty gets no gradient, hence no state on this rank.
                if name != "unused" and p.requires_grad and p.numel():
                    whole = direction(name, shard.shape, step).reshape(-1)
                    p.grad = whole[shard.start : shard.stop].clone()
        else:
            model(step).backward()
        optimizer.step()
        optimizer.zero_grad()


OPTIMIZERS = {
    "AdamW": (lab.AdamW, {"lr": 0.1}),
    "SGD": (lab.SGD, {"lr": 0.1}),
    "momentum": (lab.SGD, {"lr": 0.1, "momentum": 0.9}),
    "torch AdamW": (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}),
    "torch SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.1}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
}


ENGINES = ("slices", "stage 1", "stage 2", "stage 3")


def build(engine, optimizer, seed=0):
    """Return a model and its optimizer under an engine, in two groups."""
    model = odd(seed)
    cls, options = OPTIMIZERS[optimizer]
    if engine != "one process":
        mesh = lab.make_mesh(dp=dist.get_world_size())["dp"]
        if engine in ("stage 1", "stage 2"):
            groups = param_groups(model, weight_decay=0.3)
            kwargs = {"stage": int(engine[-1]), "bucket_bytes": 64, **options}
            return model, ZeroOptimizer(groups, cls, mesh, **kwargs)
        if engine == "stage 3":
            fully_shard(model, mesh)
        else:
            cut_in_place(model, mesh)
    return model, cls(param_groups(model, weight_decay=0.3), **options)


def train_and_save(engine):
    saved = {}
    for optimizer in OPTIMIZERS:
        model, opt = build(engine, optimizer, seed=dist.get_rank())
        load_full_state_dict(model, odd().state_dict())
        descend(model, opt, range(3), engine == "slices")
        saved[optimizer] = full_state_dict(model), full_state_dict(opt)
    return saved


def load_and_train(engine, saved):
    trained, given = {}, copy.deepcopy(saved)
    for optimizer, (model_state, state) in saved.items():
        model, opt = build(engine, optimizer, seed=7)
        load_full_state_dict(model, model_state)
        load_full_state_dict(opt, state)
        assert opt.param_groups[0]["lr"] == 0.2
        descend(model, opt, range(3, 5), engine == "slices")
        trained[optimizer] = full_state_dict(model), full_state_dict(opt)
    assert_equal_states(saved, given)  # training does not write to what was loaded
    return trained


def assert_equal_states(states, reference):
    assert list(states) == list(reference)
    torch.testing.assert_close(dict(states), dict(reference), rtol=1e-13, atol=1e-15)


def trained_alone():
    """Return the states of one process after three steps, and after two more."""
    saved, final = {}, {}
    for optimizer in OPTIMIZERS:
        model, opt = build("one process", optimizer)
        descend(model, opt, range(3))
        saved[optimizer] = copy.deepcopy((model.state_dict(), opt.state_dict()))
        changed = copy.deepcopy(opt.state_dict())
        changed["param_groups"][0]["lr"] = 0.2
        opt.load_state_dict(changed)  # casts what NAdam counts
        descend(model, opt, range(3, 5))
        final[optimizer] = model.state_dict(), opt.state_dict()
    return saved, final


@pytest.mark.parametrize("engine", ENGINES)
def test_state_goes_to_other_engines_and_numbers_of_ranks(world2, world4, engine):
    saved, final = trained_alone()
    for states in world4.run(train_and_save, engine):
        assert_equal_states(states, saved)
    for _, opt_state in saved.values():
        opt_state["param_groups"][0]["lr"] = 0.2
    for states in world2.run(load_and_train, engine, saved):
        assert_equal_states(states, final)


def test_one_process_reads_and_writes_the_same_format():
    model, opt = build("one process", "torch AdamW")
    descend(model, opt, range(3))
    states = full_state_dict(model), full_state_dict(opt)
    assert_equal_states(states[0], model.state_dict())
    assert_equal_states(states[1], opt.state_dict())
    before = copy.deepcopy(states)
    descend(model, opt, range(3, 5))
    for state, kept in zip(states, before, strict=True):
        assert_equal_states(state, kept)  # copies
    again, opt_again = build("one process", "torch AdamW", seed=1)
    load_full_state_dict(again, states[0])
    load_full_state_dict(opt_again, states[1])
    descend(again, opt_again, range(3, 5))
    assert_equal_states(again.state_dict(), model.state_dict())
    assert_equal_states(opt_again.state_dict(), opt.state_dict())
    for state, kept in zip(states, before, strict=True):
        assert_equal_states(state, kept)  # the loaded state is not written to


def gradients(kind):
    mesh = lab.make_mesh(dp=4)["dp"]
    model = odd()
    for name, p in model.named_parameters():
        if name != "unused" and p.requires_grad:
            p.grad = direction(name, p.shape, 0)
    if kind == "slices":
        cut_in_place(model, mesh)
    elif kind == "whole":
        cut_whole([*model.parameters()], mesh)
    with lab.count_comms() as log:
        whole = full_gradients(model)
    model.zero_grad(set_to_none=False)  # the result is a copy
    return whole, log["dp", "all_gather"].calls


@pytest.mark.parametrize("kind", ["replicated", "slices", "whole"])
def test_gradients_are_whole_and_named(world4, kind):
    for whole, num_calls in world4.run(gradients, kind):
        assert list(whole) == [name for name, _ in odd().named_parameters()]
        for name, p in odd().named_parameters():
            if name == "unused" or not p.requires_grad:
                assert whole[name] is None
            else:
                assert torch.equal(whole[name], direction(name, p.shape, 0))
        assert num_calls == (kind != "replicated")


def state_of_slices():
    model = odd()
    cut_in_place(model, lab.make_mesh(dp=4)["dp"])
    state = full_state_dict(model, device="cpu")
    sizes = [v.untyped_storage().nbytes() == v.nbytes for v in state.values()]
    return state, type(state), "_metadata" in vars(state), all(sizes)


def test_the_state_of_a_sharded_model_is_that_of_the_model(world4):
    for state, kind, has_metadata, is_compact in world4.run(state_of_slices):
        assert_equal_states(state, odd().state_dict())
        assert kind is type(odd().state_dict())
        assert has_metadata  # versions, for models that change
        assert is_compact  # no copy keeps a bucket alive


def peaks_of_consolidating():
    """Return what each rank holds at most, and afterwards, in units of a layer."""
    mesh = lab.make_mesh(dp=2)["dp"]
    model = fully_shard(lab.MLP(*[64] * 9), mesh)  # each layer is a unit
    with LiveBytes() as live:
        state = lab.consolidate(model)
        num_saved = 0 if state is None else len(state) // 2
        unit = 4 * (64 * 64 + 64)
        return live.peak / unit, live.now / unit, num_saved


def test_one_rank_has_the_whole_and_the_others_one_bucket_at_a_time(world2):
    (peak, after, num_saved), other = world2.run(peaks_of_consolidating)
    own = 8 / 2  # of the slices, which are read
    assert (after, num_saved) == (own + 8, 8)
    assert peak <= own + 8 + 1  # the bucket that travels
    assert other[0] <= own + 2
    assert other[1:] == (own, 0)


def test_groups_are_the_same_before_and_after_sharding(world4):
    def groups():
        model = odd()
        names = {id(p): name for name, p in model.named_parameters()}
        before = param_groups(model, weight_decay=0.1)
        named = [[names[id(p)] for p in g["params"]] for g in before]
        cut_in_place(model, lab.make_mesh(dp=4)["dp"])
        names = {id(p): name for name, p in model.named_parameters()}
        after = param_groups(model, weight_decay=0.1)
        return named, [[names[id(p)] for p in g["params"]] for g in after]

    for before, after in world4.run(groups):
        assert before == after
        assert before == [
            ["embed.weight"],
            ["scale", "unused", "norm.weight", "norm.bias", "head.bias"],
        ]


def test_groups_by_name_and_without_empty_ones():
    model = lab.MLP(3, 4, 2)
    groups = param_groups(
        model, weight_decay=0.1, decays=lambda name, _: name[0] == "2"
    )
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert [p.shape for p in groups[0]["params"]] == [(2, 4), (2,)]
    (alone,) = param_groups(model, weight_decay=0, decays=lambda *_: False)
    assert len(alone["params"]) == 4
    with pytest.raises(ValueError, match="weight_decay=-1 must be at least 0"):
        param_groups(model, weight_decay=-1)
    with pytest.raises(ValueError, match="no parameter that needs a gradient"):
        param_groups(model.requires_grad_(False), weight_decay=0.1)


def test_states_of_other_models_are_refused():
    model = odd()
    state = full_state_dict(model)
    kept = copy.deepcopy(state)
    del state["scale"]
    state["more"] = state["unused"] = torch.ones(3)
    wrong = (
        "scale is missing; more is unexpected; unused has shape .3,. instead of .2,."
    )
    with pytest.raises(ValueError, match=wrong):
        load_full_state_dict(model, state)
    assert_equal_states(model.state_dict(), kept)


def bad_states():
    """Load wrong states into slices; return the messages."""
    model, opt = build("slices", "torch AdamW")
    model_state, state = full_state_dict(model), full_state_dict(opt)
    reference, trained = build("one process", "torch AdamW")
    descend(reference, trained, range(1))
    good = trained.state_dict()
    sliced = {**good, "state": {0: {"exp_avg": torch.zeros(4), "step": 1.0}}}
    ninth = {**good, "state": {9: {"exp_avg": torch.zeros(4)}}}
    _, other = build("one process", "momentum")
    one_group = lab.AdamW(odd().parameters(), lr=0.1)
    messages = []
    with lab.count_comms() as log:
        for bad in (
            model_state,
            sliced,
            ninth,
            other.state_dict(),
            one_group.state_dict(),
        ):
            with pytest.raises(ValueError) as error:
                load_full_state_dict(opt, bad)
            messages.append(str(error.value))
        with pytest.raises(ValueError) as error:
            load_full_state_dict(model, state)
        messages.append(str(error.value))
    assert not log.axes
    return messages


def test_states_of_other_optimizers_are_refused_on_every_rank(world2):
    for messages in world2.run(bad_states):
        for message, expected in zip(
            messages,
            [
                "not `state` and `param_groups`",
                "'exp_avg' of parameter 0 has shape (4,) instead of (5, 3)",
                "parameter 9 is unexpected",
                "group 0 of the state lacks amsgrad, betas, ",
                "groups of [9] parameters, the optimizer of [1, 5]",
                "state is unexpected",
            ],
            strict=True,
        ):
            assert expected in message


def state_of_another_dtype():
    _, opt = build("slices", "torch AdamW")
    parameters = [p for group in opt.param_groups for p in group["params"]]
    for i, p in enumerate(parameters):
        opt.state[p]["third"] = torch.full(p.shape, 1 / 3, dtype=torch.float32) * i
    return full_state_dict(opt, device="cpu")["state"]


def test_state_keeps_its_own_dtype(world2):
    _, opt = build("one process", "AdamW")
    parameters = [p for group in opt.param_groups for p in group["params"]]
    for state in world2.run(state_of_another_dtype):
        for i, p in enumerate(parameters):
            third = torch.full(p.shape, 1 / 3, dtype=torch.float32) * i
            assert torch.equal(state[i]["third"], third)
            assert state[i]["third"].dtype == torch.float32


def save_factored_state():
    model = odd()
    cut_in_place(model, lab.make_mesh(dp=2)["dp"])
    optimizer = torch.optim.Adafactor(
        [p for p in model.parameters() if p.requires_grad], lr=0.1
    )
    bias = model.head.bias
    if bias.numel() > 1:
        bias.grad = torch.ones_like(bias)
        optimizer.step()
        optimizer.state[bias]["factor"] = torch.ones(bias.numel() + 1)
    try:
        full_state_dict(optimizer)
    except ValueError as error:
        return str(error)


def test_state_that_is_not_elementwise_is_refused_on_every_rank(world2):
    for message in world2.run(save_factored_state):
        assert message is not None
        assert "'factor' of parameter" in message
        assert "make no whole" in message
