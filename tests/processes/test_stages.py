"""Stages: where a model is cut, and the names that it keeps."""

import itertools
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import labpkg as lab
from labpkg.processes.stages import split_stages


def gpt(**options) -> lab.GPT:
    sizes = {"width": 8, "num_heads": 2, "vocab_size": 11, "sequence_length": 5}
    return lab.GPT(lab.GPTConfig(num_layers=4, **(sizes | options)))


def run(stages, x):
    for stage in stages:
        x = stage(x)
    return x


@pytest.mark.parametrize("num_stages", [1, 2, 3, 6])
def test_stages_are_the_model_under_its_names(num_stages):
    model = gpt()
    stages = split_stages(model, num_stages)
    tokens = torch.randint(11, (2, 5))
    assert torch.equal(run(stages, tokens), model(tokens))
    state = {}
    for stage in stages:
        state |= stage.state_dict(keep_vars=True)
    wanted = model.state_dict(keep_vars=True)
    assert state.keys() == wanted.keys()
    assert all(state[name] is wanted[name] for name in wanted)
    order = {id(p): i for i, p in enumerate(model.parameters())}
    for stage in stages:
        named = stage.named_parameters(remove_duplicate=False)
        assert stage.numbers == {name: order[id(p)] for name, p in named}


def test_a_tied_parameter_has_one_number():
    first, *_, last = split_stages(gpt(), 3)
    number = first.numbers["embedding.tokens.weight"]
    assert last.numbers["head.output.weight"] == number
    assert "head.output.weight" not in first.numbers


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=8).flatmap(
        lambda sizes: st.tuples(st.just(sizes), st.integers(1, len(sizes)))
    )
)
def test_the_largest_part_is_as_small_as_can_be(case):
    sizes, num_stages = case
    model = nn.Sequential(*(nn.Linear(size, 1, bias=False) for size in sizes))
    parts = [
        [layer.in_features for layer in stage.modules() if isinstance(layer, nn.Linear)]
        for stage in split_stages(model, num_stages)
    ]
    assert list(itertools.chain(*parts)) == sizes
    assert all(parts)

    def cost(parts):
        sums = [sum(part) for part in parts]
        return max(sums), sum(total**2 for total in sums)

    every = []
    for cuts in itertools.combinations(range(1, len(sizes)), num_stages - 1):
        ends = [0, *cuts, len(sizes)]
        every.append([sizes[a:b] for a, b in itertools.pairwise(ends)])
    assert cost(parts) == min(map(cost, every))


class Slow(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x


def test_balance_by_time():
    """The first layer has all parameters, the last one takes all the time."""
    model = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), Slow(0), Slow(0.05)
    )
    sample = torch.randn(3, 4)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    by_time = split_stages(model, 2, balance="time", sample=sample)
    assert torch.equal(torch.rand(1), expected)
    assert [stage.part for stage in by_time] == [(0, 4, 5), (4, 5, 5)]
    assert split_stages(model, 2)[0].part == (0, 1, 5)
    assert int(model[1].num_batches_tracked) == 0
    assert all(p.grad is None for p in model.parameters())


def test_units_that_change_their_input_are_measured():
    model, sample = nn.Sequential(nn.ELU(inplace=True), Slow(0.01)), -torch.ones(2)
    stages = split_stages(model, 2, balance="time", sample=sample)
    assert [stage.part for stage in stages] == [(0, 1, 2), (1, 2, 2)]
    assert sample.tolist() == [-1, -1]


def measured_cut() -> list:
    rank = torch.distributed.get_rank()
    model = nn.Sequential(Slow(0.02 * (1 - rank)), Slow(0), Slow(0.01 * rank))
    stages = split_stages(model, 2, balance="time", sample=torch.ones(1))
    return [stage.part for stage in stages]


def test_ranks_that_measure_other_times_cut_alike(world2):
    cuts = world2.run(measured_cut)
    assert cuts[0] == cuts[1]
    assert cuts[0][0] == (0, 1, 3)  # the means are 0.01, 0 and 0.005


class Repeats(nn.Module):
    """One unit twice, under two names, and an inner unit."""

    def __init__(self):
        super().__init__()
        self.block = nn.Linear(3, 3)
        self.alias = self.block
        self.body = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def pipeline_units(self):
        return [self.block, self.body[0], self.body[1], self.block]

    def forward(self, x):
        for unit in self.pipeline_units():
            x = unit(x)
        return x


def test_a_unit_may_come_twice_and_lie_deep():
    model, x = Repeats(), torch.randn(2, 3)
    stages = split_stages(model, 4)
    assert torch.equal(run(stages, x), model(x))
    state = {}
    for stage in stages:
        state |= stage.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert stages[0].numbers == stages[3].numbers


def test_a_layer_that_is_replaced_in_place_is_replaced_in_its_stage():
    stage = split_stages(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), 1)[0]
    setattr(stage, "0", nn.Linear(3, 5))
    assert stage(torch.randn(2, 3)).shape == (2, 5)


class Loose(nn.Module):
    def __init__(self, units, *, scale=False):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        if scale:
            self.scale = nn.Parameter(torch.ones(3))
        self.units = units

    def pipeline_units(self):
        return [self.layer, *self.units()]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: split_stages(lab.MLP(4, 4, 4), 4), "num_stages=4 of a model with 3"),
        (lambda: split_stages(lab.MLP(4, 4), 0), "choose 1 to 1"),
        (lambda: split_stages(nn.Linear(3, 3), 1), "has no units"),
        (lambda: split_stages(Loose(lambda: [nn.Linear(3, 3)]), 1), "unit 1, Linear"),
        (lambda: split_stages(Loose(list, scale=True), 1), "scale is in no pipeline"),
        (lambda: split_stages(lab.MLP(4, 4), 1, balance="size"), "balance='size'"),
        (lambda: split_stages(lab.MLP(4, 4), 1, balance="time"), "give both or none"),
        (
            lambda: split_stages(lab.MLP(4, 4), 1, sample=torch.ones(1, 4)),
            "give both or none",
        ),
    ],
)
def test_bad_input(call, text):
    with pytest.raises(ValueError, match=text):
        call()
