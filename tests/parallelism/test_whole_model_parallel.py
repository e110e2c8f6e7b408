"""State of cut and dealt out models is that of one process, on any number of ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import labpkg as lab
from labpkg.parallelism.whole import (
    consolidate,
    full_gradients,
    full_state_dict,
    load_full_state_dict,
    param_groups,
)
from labpkg.processes.collectives import off
from labpkg.processes.cuts import Place, mark_place
from tests.parallelism.layouts import (
    ALONE,
    CUTS,
    LAYOUTS,
    PAIRS,
    direction,
    laid_out,
    optimizer_for,
    whole_chain,
)

OPTIMIZERS = {
    "AdamW": (lab.AdamW, {"lr": 0.1}),
    "momentum": (lab.SGD, {"lr": 0.1, "momentum": 0.9}),
    "torch AdamW": (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}),
}


def descend(model, optimizer, steps):
    for step in steps:
        loss = model(step)
        if loss.requires_grad:  # a stage may have nothing to train
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_alone():
    """Return the states of one process after three steps, and after two more."""
    states = {}
    for name, (kind, options) in OPTIMIZERS.items():
        model = whole_chain()
        model.norm.running_mean += 3
        optimizer = kind(param_groups(model, weight_decay=0.3), **options)
        descend(model, optimizer, range(3))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        descend(model, optimizer, range(3, 5))
        states[name] = saved, (model.state_dict(), optimizer.state_dict())
    return states


def assert_same(states, reference, **tolerance):
    """Compare by name: a pipeline lists names in the order of its ranks."""
    (model, optimizer), (whole, state) = states, reference
    assert model.keys() == whole.keys()
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(dict(model), dict(whole), **tolerance)
    torch.testing.assert_close(optimizer, state, **tolerance)


def save_and_load(layouts, references):
    for layout, sizes in layouts.items():
        for name, (saved, final) in references.items():
            kind, options = OPTIMIZERS[name]
            model, mesh = laid_out(layout, sizes, seed=7)
            optimizer = optimizer_for(layout, model, mesh, kind, **options)
            given = copy.deepcopy(saved)
            load_full_state_dict(model, given[0])
            load_full_state_dict(optimizer, given[1])
            assert_same((full_state_dict(model), full_state_dict(optimizer)), saved)
            descend(model, optimizer, range(3, 5))
            after = full_state_dict(model), full_state_dict(optimizer)
            assert_same(after, final, rtol=1e-13, atol=1e-15)
            assert_same(given, saved)  # training does not write to what was loaded
            on_one = consolidate(model), consolidate(optimizer)
            if dist.get_rank() == 0:
                assert_same(on_one, after)
            else:
                assert on_one == (None, None)
    return len(layouts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_goes_to_four_ranks_and_back(world4, layout):
    layouts = {layout: LAYOUTS[layout]}
    assert world4.run(save_and_load, layouts, trained_alone()) == [1] * 4


def test_state_goes_to_two_ranks_and_back(world2):
    assert world2.run(save_and_load, PAIRS, trained_alone()) == [2] * 2


def test_state_goes_to_one_rank_and_back():
    with lab.World(1, device="cpu") as world:
        assert world.run(save_and_load, ALONE, trained_alone()) == [2]


def gradients_of(layouts):
    """Return, for each layout, whole gradients and what ranks sent for them."""
    found = {}
    for layout, sizes in layouts.items():
        model, mesh = laid_out(layout, sizes, seed=7)
        engine = optimizer_for(layout, model, mesh, lab.SGD, lr=0.1)  # it may reduce
        loss = model(0)
        if loss.requires_grad:
            loss.backward()
        with lab.count_comms() as log:
            gradients = full_gradients(model)
        model.zero_grad(set_to_none=False)  # the result is a copy
        found[layout] = gradients, log["tp"].payload_bytes
        engine.zero_grad()
    return found


def test_gradients_are_whole_and_named(world4):
    named = dict(whole_chain().named_parameters())
    for found in world4.run(gradients_of, LAYOUTS):
        for gradients, _ in found.values():
            assert gradients.keys() == named.keys()
            for name, p in named.items():
                expected = direction(name, 0) if p.requires_grad else None
                assert (gradients[name] is None) == (expected is None)
                assert expected is None or torch.equal(gradients[name], expected)
        cut = [p.nbytes for name, p in named.items() if name in CUTS]
        assert found["tp"][1] == sum(cut)
        assert found["pp"][1] == 0


def groups_of_stages():
    """Return the names in the groups of each stage, and of the stand-ins none."""
    model, _ = laid_out("pp", {"pp": 4}, seed=0)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups(model, weight_decay=0.1)
    decayed_by_name = param_groups(
        model, weight_decay=0.1, decays=lambda name, _: name == "embed.weight"
    )
    decays = {
        names[id(p)]: group["weight_decay"]
        for group in decayed_by_name
        for p in group["params"]
        if id(p) in names
    }
    assert all(
        p.numel() == 0 for g in groups for p in g["params"] if id(p) not in names
    )
    optimizer = lab.AdamW(groups, lr=0.1)
    optimizer.step()
    whole = full_state_dict(optimizer)["param_groups"]
    return (
        [[names.get(id(p)) for p in g["params"]] for g in groups],
        [(g["params"], g["weight_decay"]) for g in whole],
        decays,
    )


def test_all_stages_have_the_same_groups(world4):
    here, whole, decays = zip(*world4.run(groups_of_stages), strict=True)
    assert list(here) == [
        [["down.weight"], ["norm.weight", "norm.bias", "down.bias"]],
        [["embed.weight"], [None]],
        [[None], [None]],
        [["up.weight", "head.weight"], ["up.bias"]],
    ]
    assert list(whole) == [[([0, 1, 2], 0.1), ([3, 4, 5, 6], 0.0)]] * 4
    # A copy of a tied parameter decays as the name does that the model knows it by.
    assert decays[1] == {"embed.weight": 0.1}
    assert decays[3] == {"up.weight": 0.0, "up.bias": 0.0, "head.weight": 0.1}


def bad_states(state):
    """Load what does not fit one stage; return messages and what is loaded then."""
    model, _ = laid_out("pp tp", {"pp": 2, "tp": 2}, seed=0)
    before = full_state_dict(model)
    optimizer = lab.AdamW(param_groups(model, weight_decay=0.1), lr=0.1)
    model_state, optimizer_state = state
    narrow = {**model_state, "up.weight": torch.zeros(4, 4)}
    extra = {**model_state, "more": torch.zeros(1)}
    del extra["norm.weight"]
    cut = copy.deepcopy(optimizer_state)
    cut["state"][1]["exp_avg"] = torch.zeros(4, 4)
    group = copy.deepcopy(optimizer_state)
    group["param_groups"][0]["params"].append(9)
    messages = []
    for target, bad in [
        (model, narrow),
        (model, extra),
        (optimizer, cut),
        (optimizer, group),
    ]:
        with pytest.raises(ValueError) as error:
            load_full_state_dict(target, bad)
        messages.append(str(error.value))
    return messages, before, full_state_dict(model), len(optimizer.state)


def test_states_that_do_not_fit_are_refused_on_every_rank(world4):
    saved, _ = trained_alone()["AdamW"]
    for messages, before, after, num_states in world4.run(bad_states, saved):
        for message, expected in zip(
            messages,
            [
                "up.weight has shape (4, 4) instead of (16, 4)",
                "norm.weight is missing; more is unexpected",
                "'exp_avg' of parameter 1 has shape (4, 4) instead of (16, 4)",
                "groups of [4, 4] parameters, the optimizer of [3, 4]",
            ],
            strict=True,
        ):
            assert expected in message
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert num_states == 0


def stages_that_make_no_model():
    """Return what is said of two stages with the same names, and other groups."""
    mesh = lab.make_mesh(pp=2)["pp"]
    stage = nn.Linear(2, 2)
    mark_place(stage, Place(mesh))
    for i, p in enumerate(stage.parameters(), 2 * mesh.get_local_rank()):
        mark_place(p, Place(mesh, number=i))
    groups = [{"params": [p]} for p in stage.parameters()]
    optimizer = lab.SGD(groups if mesh.get_local_rank() else stage.parameters(), lr=1)
    messages = []
    for call in (
        lambda: full_state_dict(stage),
        lambda: full_gradients(stage),
        lambda: load_full_state_dict(stage, stage.state_dict()),
        lambda: full_state_dict(optimizer),
    ):
        with pytest.raises(ValueError) as error:
            call()
        messages.append(str(error.value))
    return messages


def test_stages_that_make_no_model_are_refused_on_every_rank(world2):
    for *names, groups in world2.run(stages_that_make_no_model):
        assert all("weight is the name of different parameters" in m for m in names)
        assert "have [1, 2] groups" in groups


def save_factored_state():
    model, _ = laid_out("pp tp", {"pp": 2, "tp": 2}, seed=0)
    parameters = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    optimizer = torch.optim.Adafactor(parameters, lr=0.1)
    model(0).backward()
    optimizer.step()
    with pytest.raises(ValueError) as error:
        full_state_dict(optimizer)
    return str(error.value)


def test_state_that_is_not_elementwise_is_refused_on_every_rank(world4):
    for message in world4.run(save_factored_state):
        assert "'row_var' of parameter 0 is of shape (6, 1), the slice of" in message
        assert "norm" not in message


def last_of_tied_names():
    model, _ = laid_out("pp", {"pp": 4}, seed=0)
    state = whole_chain().state_dict()
    state["head.weight"] = state["embed.weight"] + 1
    load_full_state_dict(model, state)
    alone = whole_chain(3)
    alone.load_state_dict(state)
    return full_state_dict(model), dict(alone.state_dict())


def test_of_tied_names_the_last_is_loaded_as_in_one_process(world4):
    for state, expected in world4.run(last_of_tied_names):
        torch.testing.assert_close(dict(state), expected, rtol=0, atol=0)


def without_communication():
    found = {}
    for layout in ("tp", "pp"):
        model, _ = laid_out(layout, LAYOUTS[layout], seed=dist.get_rank())
        with off():
            found[layout] = full_state_dict(model)
    return found


def test_it_does_not_work_without_communication(world4):
    first = world4.run(without_communication)[0]
    for state in first.values():
        whole = whole_chain().state_dict()  # seed 0, that of the first rank
        assert state.keys() == whole.keys()
        assert all(state[name].shape == whole[name].shape for name in whole)
        differing = (state["up.weight"] - whole["up.weight"]).abs().max()
        assert differing > 1e-2


def test_one_process_consolidates_on_the_cpu():
    model = whole_chain()
    state = consolidate(model)
    assert state is not None
    torch.testing.assert_close(dict(state), dict(model.state_dict()))
    assert "_metadata" in vars(state)
    model.embed.weight.data += 1
    assert (state["embed.weight"] - model.embed.weight).abs().min() > 0.5  # a copy
