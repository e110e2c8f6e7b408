"""Training goes on under other engines and on other numbers of ranks, bit by bit."""

import pytest
import torch
from torch import nn

import labpkg as lab
from labpkg.parallelism.clipping import clip_grad_norm
from labpkg.parallelism.data_parallel import DataParallel
from labpkg.parallelism.fsdp import fully_shard
from labpkg.parallelism.pipeline import Pipeline
from labpkg.parallelism.tensor_parallel import (
    apply_tensor_parallel,
    gpt_tensor_parallel_plan,
)
from labpkg.parallelism.whole import (
    consolidate,
    full_gradients,
    full_state_dict,
    load_full_state_dict,
    param_groups,
)
from labpkg.parallelism.zero import ZeroOptimizer
from labpkg.planning.schedules import interleaved, one_f_one_b, zero_bubble
from labpkg.processes.stages import split_stages

CONFIG = lab.GPTConfig(
    num_layers=2, width=8, num_heads=4, vocab_size=12, sequence_length=4
)
SEQUENCE = {"sequence_parallel": True}
# How the model is trained on 2 ranks, then on 1, then on 4: with which engines, beside
# the tensor-parallel and pipeline axes.
TWO = {"tp": {"tp": 2}, "pp": {"pp": 2}}
ONE = {"tp": {"tp": 1}, "pp": {"pp": 1}}
FOUR = {
    "tp": {
        "tp": {"tp": 4},
        "sequence": {"tp": 4},
        "tp, stage 2": {"dp": 2, "tp": 2},
        "tp, stage 3": {"dp": 2, "tp": 2},
    },
    "pp": {
        "pp": {"pp": 4},
        "interleaved, data parallel": {"pp": 2, "dp": 2},
        "zero bubble, stage 2": {"pp": 2, "dp": 2},
        "pp and tp": {"pp": 2, "tp": 2},
    },
}
NUM_STEPS = 2  # in each world


def gpt(seed):
    torch.manual_seed(seed)
    return lab.GPT(CONFIG).double()


def batch(step):
    generator = torch.Generator("cpu").manual_seed(step)
    tokens = torch.randint(12, (4, 5), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def mean_loss(logits, targets):
    return lab.cross_entropy(logits, targets)


def schedule_for(layout, num_ranks):
    if "interleaved" in layout:
        return interleaved(num_ranks, 2, num_virtual_stages=2)
    if "zero bubble" in layout:
        return zero_bubble(num_ranks, 2, variant="v")
    return one_f_one_b(num_ranks, 2)


def build(layout, sizes):
    """Return a model, which each rank draws by itself, and its optimizer."""
    mesh, model = lab.make_mesh(**sizes), gpt(torch.distributed.get_rank())
    options = SEQUENCE if layout == "sequence" else {}
    if "tp" in sizes:
        plan = gpt_tensor_parallel_plan(CONFIG, **options)
        apply_tensor_parallel(model, mesh["tp"], plan, **options)
    if "stage 3" in layout:
        fully_shard(model, mesh["dp"])
    if "pp" in sizes:
        schedule = schedule_for(layout, sizes["pp"])
        stages = split_stages(model, schedule.num_stages)
        own = [stages[i] for i in schedule.stages_of(mesh["pp"].get_local_rank())]
        if "data parallel" in layout:
            own = [DataParallel(stage, mesh["dp"]) for stage in own]
        model = Pipeline(own, schedule, mesh["pp"], loss_fn=mean_loss)
    groups = param_groups(model, weight_decay=0.1)
    if "stage 2" in layout:
        return model, ZeroOptimizer(groups, lab.AdamW, mesh["dp"], stage=2, lr=0.05)
    return model, lab.AdamW(groups, lr=0.05)


def learn(model, optimizer, steps):
    """Return the norms; clipping changes every step."""
    norms = []
    for step in steps:
        x, y = batch(step)
        if isinstance(model, Pipeline):
            model.step(x, y)
        else:
            mean_loss(model(x), y).backward()
        norms.append(clip_grad_norm(model, 0.05).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def learn_alone(num_steps):
    """Return norms and states of one process, and the last gradients."""
    model = gpt(0)
    optimizer = lab.AdamW(param_groups(model, weight_decay=0.1), lr=0.05)
    norms = learn(model, optimizer, range(num_steps))
    states = model.state_dict(), optimizer.state_dict()
    mean_loss(model(batch(num_steps)[0]), batch(num_steps)[1]).backward()
    return norms, states, {name: p.grad for name, p in model.named_parameters()}


def go_on(layouts, states, first):
    """Load, save again, learn, and save; return what there was and what is now."""
    found = {}
    for layout, sizes in layouts.items():
        model, optimizer = build(layout, sizes)
        load_full_state_dict(model, states[0])
        load_full_state_dict(optimizer, states[1])
        before = consolidate(model), consolidate(optimizer)
        norms = learn(model, optimizer, range(first, first + NUM_STEPS))
        after = full_state_dict(model), full_state_dict(optimizer)
        x, y = batch(first + NUM_STEPS)
        if isinstance(model, Pipeline):
            model.step(x, y)
        else:
            mean_loss(model(x), y).backward()
        found[layout] = before, norms, after, full_gradients(model)
    return found


def assert_same(states, reference, **tolerance):
    for state, expected in zip(states, reference, strict=True):
        assert state.keys() == expected.keys()
        torch.testing.assert_close(dict(state), dict(expected), **tolerance)


def check(results, given, first):
    """Compare with one process; return the state of each layout."""
    norms, states, gradients = learn_alone(first + NUM_STEPS)
    tolerance = {"rtol": 1e-10, "atol": 1e-12}
    for rank, found in enumerate(results):
        for layout, (before, found_norms, after, found_gradients) in found.items():
            if rank == 0:
                assert_same(before, given, rtol=0, atol=0)
            else:
                assert before == (None, None)
            assert min(norms) > 0.05  # all steps are clipped
            for norm, expected in zip(found_norms, norms[first:], strict=True):
                assert norm == pytest.approx(expected, rel=1e-10), layout
            assert_same(after, states, **tolerance)
            assert_same([found_gradients], [gradients], **tolerance)
    return {layout: after for layout, (_, _, after, _) in results[0].items()}


@pytest.mark.parametrize("engine", ["tp", "pp"])
def test_two_ranks_then_one_then_four(world2, world4, engine):
    states = learn_alone(NUM_STEPS)[1]
    pair = {engine: TWO[engine]}
    states = check(world2.run(go_on, pair, states, 2), states, 2)[engine]
    with lab.World(1, device="cpu") as world1:
        alone = {engine: ONE[engine]}
        states = check(world1.run(go_on, alone, states, 4), states, 4)[engine]
    check(world4.run(go_on, FOUR[engine], states, 6), states, 6)


def layers():
    """Four stages on four ranks; two have no parameters."""
    torch.manual_seed(0)
    layers = nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2, bias=False), nn.Tanh()
    return nn.Sequential(*layers).double()


def square(outputs, targets):
    return (outputs - targets).square().mean()


def clip_and_learn(is_alone):
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    y, model = x[:, :2].sin(), layers()
    if not is_alone:
        mesh = lab.make_mesh(pp=4)["pp"]
        stage = split_stages(model, 4)[mesh.get_local_rank()]
        model = Pipeline(stage, one_f_one_b(4, 2), mesh, loss_fn=square)
    optimizer = lab.AdamW(param_groups(model, weight_decay=0.1), lr=0.1)
    norms = []
    for _ in range(3):
        if isinstance(model, Pipeline):
            model.step(x, y)
        else:
            square(model(x), y).backward()
        norms.append(clip_grad_norm(model, 0.1).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, full_state_dict(model), full_state_dict(optimizer)


def test_stages_without_parameters_take_part(world4):
    norms, *states = clip_and_learn(is_alone=True)
    for found, *others in world4.run(clip_and_learn, is_alone=False):
        assert found == pytest.approx(norms, rel=1e-12)
        assert_same(others, states, rtol=1e-12, atol=1e-14)
