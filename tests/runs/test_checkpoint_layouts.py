"""A checkpoint of any layout is loaded under any other, bit by bit."""

import pytest
import torch
from torch import nn

import labpkg as lab
from labpkg.parallelism.data_parallel import DataParallel
from labpkg.parallelism.fsdp import fully_shard
from labpkg.parallelism.pipeline import Pipeline
from labpkg.parallelism.tensor_parallel import (
    apply_tensor_parallel,
    gpt_tensor_parallel_plan,
)
from labpkg.parallelism.whole import full_state_dict, param_groups
from labpkg.parallelism.zero import ZeroOptimizer
from labpkg.planning.layout import Layout
from labpkg.processes.stages import split_stages
from labpkg.runs.checkpoint import (
    load_checkpoint,
    save_checkpoint,
)

CONFIG = lab.GPTConfig(
    num_layers=2, width=8, num_heads=4, vocab_size=12, sequence_length=4
)
LAYOUTS = {
    "dp4": Layout(dp=4),
    "tp4": Layout(tp=4),
    "pp4": Layout(pp=4, num_micro_batches=4),
    "dp2-tp2": Layout(dp=2, tp=2),
    "dp2-pp2": Layout(dp=2, pp=2, schedule="1f1b"),
    "tp2-pp2-zb-v": Layout(tp=2, pp=2, schedule="zb-v"),
    "dp4-zero3": Layout(dp=4, zero=3),
    "dp2-tp2-zero2": Layout(dp=2, tp=2, zero=2),
}


def mean_loss(logits, targets):
    return lab.cross_entropy(logits, targets)


def batch(step):
    generator = torch.Generator("cpu").manual_seed(step)
    tokens = torch.randint(12, (4, 5), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def build(layout, seed):
    """Return a model in its engines, and its optimizer, in two groups."""
    mesh = lab.make_mesh(pp=layout.pp, dp=layout.dp, tp=layout.tp)
    torch.manual_seed(seed)
    model: nn.Module = lab.GPT(CONFIG).double()
    if layout.tp > 1:
        apply_tensor_parallel(model, mesh["tp"], gpt_tensor_parallel_plan(CONFIG))
    if layout.is_pipeline:
        schedule = layout.make_schedule()
        stages = split_stages(model, schedule.num_stages)
        own = [stages[i] for i in schedule.stages_of(mesh["pp"].get_local_rank())]
        if layout.dp > 1:
            own = [DataParallel(stage, mesh["dp"]) for stage in own]
        model = Pipeline(own, schedule, mesh["pp"], loss_fn=mean_loss)
    elif layout.zero == 3:
        fully_shard(model, mesh["dp"])
    elif not layout.zero and layout.dp > 1:
        model = DataParallel(model, mesh["dp"])
    groups = param_groups(model, weight_decay=0.1)
    if layout.zero in (1, 2):
        kind = lab.AdamW
        return model, ZeroOptimizer(groups, kind, mesh["dp"], stage=2, lr=0.05)
    return model, lab.AdamW(groups, lr=0.05)


def learn(model, optimizer, step):
    x, y = batch(step)
    if isinstance(model, Pipeline):
        model.step(x, y)
    else:
        mean_loss(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def states(model, optimizer):
    return full_state_dict(model), full_state_dict(optimizer)


def save_all(folder):
    """Train a little under each layout and save; return what was saved."""
    found = {}
    for number, (name, layout) in enumerate(LAYOUTS.items()):
        model, optimizer = build(layout, seed=number)
        learn(model, optimizer, step=number)
        save_checkpoint(folder / name, step=1, model=model, optimizer=optimizer)
        found[name] = states(model, optimizer)
    return found


def load_all(folder):
    """Load each checkpoint under each layout; return what was loaded."""
    found = {}
    for name, layout in LAYOUTS.items():
        model, optimizer = build(layout, seed=99)
        for saved in LAYOUTS:
            path = folder / saved / "step_000001"
            load_checkpoint(path, model=model, optimizer=optimizer)
            found[saved, name] = states(model, optimizer)
        learn(model, optimizer, step=0)  # what was loaded can be trained
    return found


def assert_same(found, expected):
    for state, other in zip(found, expected, strict=True):
        torch.testing.assert_close(dict(state), dict(other), rtol=0, atol=0)


@pytest.fixture(scope="module")
def checkpoints(world4, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    return folder, world4.run(save_all, folder)


def test_all_ordered_pairs_of_eight_layouts(checkpoints, world4):
    folder, saved = checkpoints
    loaded = world4.run(load_all, folder)
    assert len(loaded[0]) == 64
    for rank in range(4):
        for (source, _), found in loaded[rank].items():
            assert_same(found, saved[0][source])
