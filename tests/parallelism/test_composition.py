"""Two engines at a time on four ranks train what one process trains.

Each step accumulates two batches, clips the norm of all gradients, and takes a step of
AdamW. Where the engines allow it the weights are tied, so that stages share them.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import labpkg as lab
from labpkg.parallelism.pipeline import Pipeline
from labpkg.parallelism.tensor_parallel import (
    apply_tensor_parallel,
    gpt_tensor_parallel_plan,
)
from labpkg.planning.schedules import interleaved, one_f_one_b, zero_bubble
from labpkg.processes.stages import split_stages

CONFIG = lab.GPTConfig(
    num_layers=2, width=16, num_heads=4, sequence_length=8, vocab_size=32
)
NUM_STEPS, NUM_PASSES, MAX_NORM = 5, 2, 0.3
SCHEDULES = {
    "1f1b": one_f_one_b(2, 4),
    "interleaved": interleaved(2, 4, num_virtual_stages=2),
    "zb-h1": zero_bubble(2, 4),
    "zb-v": zero_bubble(2, 4, variant="v"),
}


def gpt(*, seed=0, tied=True):
    torch.manual_seed(seed)
    return lab.GPT(replace(CONFIG, tied=tied)).double()


def batches():
    """Return (step, pass, x or y, sample, position)."""
    generator = torch.Generator(device="cpu").manual_seed(1)
    shape = (NUM_STEPS, NUM_PASSES, 2, 16, CONFIG.sequence_length)
    return torch.randint(CONFIG.vocab_size, shape, generator=generator, device="cpu")


def groups(model):
    return lab.param_groups(model, weight_decay=0.1)


def train(model, optimizer, accumulate):
    """Take all steps; `accumulate(x, y, is_last)` returns the loss of a pass."""
    losses, norms, first = [], [], None
    for passes in batches():
        loss = 0.0
        for i, (x, y) in enumerate(passes):
            loss += accumulate(x, y, i == NUM_PASSES - 1).item() / NUM_PASSES
        losses.append(loss)
        norms.append(lab.clip_grad_norm(model, MAX_NORM).item())
        first = lab.full_gradients(model) if first is None else first
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, first, lab.full_state_dict(model)


def alone(tied):
    model = gpt(tied=tied)

    def accumulate(x, y, _):
        loss = lab.cross_entropy(model(x), y)
        (loss / NUM_PASSES).backward()
        return loss.detach()

    return train(model, lab.AdamW(groups(model), lr=1e-2), accumulate)


def data_and_tensor(engine, sequence_parallel):
    """Cut the layers over two ranks, and the batch over two such pairs."""
    mesh = lab.make_mesh(dp=2, tp=2)
    model = gpt(seed=mesh["tp"].get_local_rank())
    options = {"sequence_parallel": sequence_parallel}
    plan = gpt_tensor_parallel_plan(CONFIG, **options)
    inner = apply_tensor_parallel(model, mesh["tp"], plan, **options)
    no_sync = nullcontext
    if engine == "ZeroOptimizer":
        optimizer = lab.ZeroOptimizer(
            groups(inner), lab.AdamW, mesh["dp"], stage=2, lr=1e-2
        )
        model, no_sync = inner, optimizer.no_sync
    elif engine == "fully_shard":
        model = lab.fully_shard(inner, mesh["dp"])
        optimizer = lab.AdamW(groups(model), lr=1e-2)
    else:
        model = lab.DataParallel(inner, mesh["dp"])
        optimizer, no_sync = lab.AdamW(groups(model), lr=1e-2), model.no_sync

    def accumulate(x, y, is_last):
        x, y = (t.chunk(2)[mesh["dp"].get_local_rank()] for t in (x, y))
        with nullcontext() if is_last else no_sync():
            loss = lab.cross_entropy(model(x), y)
            (loss / NUM_PASSES).backward()
        return lab.all_reduce(loss.detach(), mesh["dp"], op="mean")

    return train(model, optimizer, accumulate)


def with_pipeline(engine, schedule, tied):
    """Cut the layers into stages, and each stage or its batch over two ranks."""
    stage = 1 if schedule == "1f1b" else 2
    schedule, model = SCHEDULES[schedule], gpt(tied=tied)
    other = "tp" if engine.startswith("tensor") else "dp"
    mesh = lab.make_mesh(pp=2, **{other: 2})
    axis, rank = mesh[other], mesh["pp"].get_local_rank()
    options = {"sequence_parallel": "sequence" in engine}
    plan = gpt_tensor_parallel_plan(CONFIG, **options)
    is_after = engine.endswith("after")
    if other == "tp" and not is_after:
        model = apply_tensor_parallel(model, axis, plan, **options)
    stages = split_stages(model, schedule.num_stages)
    own = [stages[i] for i in schedule.stages_of(rank)]
    if is_after:
        own = [apply_tensor_parallel(part, axis, plan, **options) for part in own]
    if engine == "DataParallel":
        own = [lab.DataParallel(part, axis, bucket_bytes=2**10) for part in own]
    if engine == "fully_shard":
        own = [lab.fully_shard(part, axis) for part in own]
    loss_fn = lambda output, y: lab.cross_entropy(output, y) / NUM_PASSES
    pipe = Pipeline(own, schedule, mesh["pp"], loss_fn=loss_fn)
    no_sync, finish = nullcontext, lambda: None
    if engine.startswith("ZeroOptimizer"):
        optimizer = lab.ZeroOptimizer(
            groups(pipe), lab.AdamW, axis, stage=stage, lr=1e-2
        )
        if engine == "ZeroOptimizer once":
            no_sync, finish = optimizer.no_sync, optimizer.reduce_gradients
    else:
        optimizer = lab.AdamW(groups(pipe), lr=1e-2)

    def accumulate(x, y, is_last):
        if other == "dp":
            x, y = (t.chunk(2)[axis.get_local_rank()] for t in (x, y))
        with no_sync():
            loss = NUM_PASSES * pipe.step(x, y)
        if is_last:
            finish()
        return lab.all_reduce(loss, axis, op="mean")

    with lab.count_comms() as log:
        trained = train(pipe, optimizer, accumulate)
    if engine == "ZeroOptimizer once":  # however many micro-batches and passes
        own = sum(p.nbytes for p in pipe.parameters())
        assert log["dp", "reduce_scatter"].payload_bytes == NUM_STEPS * own
    return trained


@pytest.fixture(scope="module")
def references():
    with lab.World(1, device="cpu") as world:  # as many threads as a rank
        return {tied: world.run(alone, tied)[0] for tied in (True, False)}


def check(ranks, reference):
    losses, norms, gradients, state = reference
    assert min(norms) > MAX_NORM
    for found in ranks:
        assert found[0] == pytest.approx(losses, rel=1e-12)
        assert found[1] == pytest.approx(norms, rel=1e-12)
        for got, want in ((found[2], gradients), (found[3], state)):
            assert got.keys() == want.keys()
            for name, other in want.items():
                assert (got[name] - other).norm() <= 1e-12 * other.norm(), name


@pytest.mark.parametrize(
    ("engine", "sequence_parallel"),
    [
        ("DataParallel", False),
        ("DataParallel", True),
        ("ZeroOptimizer", False),
        ("fully_shard", True),
    ],
)
def test_data_and_tensor_parallel(world4, references, engine, sequence_parallel):
    check(world4.run(data_and_tensor, engine, sequence_parallel), references[True])


@pytest.mark.parametrize(
    ("engine", "schedule", "tied"),
    [
        ("DataParallel", "1f1b", True),
        ("DataParallel", "interleaved", True),
        ("DataParallel", "zb-h1", True),
        # Both ends lie on one rank, each in a wrapper: these must not share a weight.
        ("DataParallel", "zb-v", False),
        # They cut gradients, of which tied copies need the whole.
        ("ZeroOptimizer", "zb-h1", False),
        ("ZeroOptimizer once", "zb-v", True),
        ("ZeroOptimizer once", "1f1b", True),
        ("fully_shard", "1f1b", False),
        ("tensor", "1f1b", True),
        ("tensor", "zb-v", True),
        ("tensor sequence", "interleaved", True),
        ("tensor sequence", "zb-h1", True),
        ("tensor sequence after", "zb-v", True),  # two stages share a weight to cut
    ],
)
def test_pipeline_and_another(world4, references, engine, schedule, tied):
    check(world4.run(with_pipeline, engine, schedule, tied), references[tied])
