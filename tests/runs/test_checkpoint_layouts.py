"""A checkpoint of any layout is loaded under any other, bit by bit."""

import itertools

import torch
from torch import nn

import labpkg as lab
from labpkg.bench.memory import LiveBytes
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


WIDE = lab.GPTConfig(
    num_layers=4, width=64, num_heads=4, vocab_size=64, sequence_length=4
)


def build(layout, seed, config=CONFIG):
    """Return a model in its engines, and its optimizer, in two groups."""
    mesh = lab.make_mesh(pp=layout.pp, dp=layout.dp, tp=layout.tp)
    torch.manual_seed(seed)
    model: nn.Module = lab.GPT(config).double()
    if layout.tp > 1:
        apply_tensor_parallel(model, mesh["tp"], gpt_tensor_parallel_plan(config))
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


def load_all(folder, saved):
    """Load all checkpoints under each layout; return the pairs that were the same."""
    same = []
    for name, layout in LAYOUTS.items():
        model, optimizer = build(layout, seed=99)
        for source, expected in saved.items():
            path = folder / source / "step_000001"
            load_checkpoint(path, model=model, optimizer=optimizer)
            if is_same(states(model, optimizer), expected):
                same.append((source, name))
        learn(model, optimizer, step=0)  # what was loaded can be trained
    return same


def is_same(found, expected):
    """Whether all numbers in nested dicts are the same, bit by bit."""
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            is_same(found[key], value) for key, value in expected.items()
        )
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(is_same, found, expected))
    return found == expected


def test_all_ordered_pairs_of_eight_layouts(world4, tmp_path):
    saved = world4.run(save_all, tmp_path, timeout_s=300)[0]
    weights = [state[0]["embedding.tokens.weight"] for state in saved.values()]
    for one, other in itertools.combinations(weights, 2):
        assert not torch.equal(one, other)
    for same in world4.run(load_all, tmp_path, saved, timeout_s=300):
        assert {*same} == {*itertools.product(LAYOUTS, repeat=2)}


class _OwnBytes(LiveBytes):
    """Does not count what is mapped from files: the system reads what is touched."""

    def _see(self, storage):
        if storage.filename is None:
            super()._see(storage)


def memory(path, folder):
    """Return the bytes that loading and saving add at most, and those of the whole."""
    found = {}
    for name in ("tp4", "pp4", "dp4-zero3"):
        model, optimizer = build(LAYOUTS[name], seed=1, config=WIDE)
        with _OwnBytes() as live:
            load_checkpoint(path, model=model, optimizer=optimizer)
            loading, before = live.peak, live.now
            live.peak = before
            pending = save_checkpoint(
                folder / name,
                step=1,
                model=model,
                optimizer=optimizer,
                asynchronous=True,
            )
            pending.wait()
            found[name] = loading, live.peak - before
    return found


def test_no_rank_holds_the_whole_to_load_or_to_save(world4, tmp_path):
    """One process has saved it, so each piece in the files is a whole tensor."""
    torch.manual_seed(0)
    model = lab.GPT(WIDE).double()
    optimizer = lab.AdamW(param_groups(model, weight_decay=0.1), lr=0.05)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    path = save_checkpoint(tmp_path, step=1, model=model, optimizer=optimizer)
    whole = 3 * sum(p.nbytes for p in model.parameters())
    for found in world4.run(memory, path, tmp_path):
        for name, (loading, saving) in found.items():
            assert loading < 0.5 * whole, name
            assert saving < 0.5 * whole, name
            assert saving > 0.1 * whole, name  # copies of what this rank writes
