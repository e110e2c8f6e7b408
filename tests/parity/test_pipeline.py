"""PyTorch as referee: `Pipeline` against the schedules of torch.distributed.pipelining.

Both compute the same stages, micro-batch by micro-batch, and division by four is exact:
the results have to agree bit by bit.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed import pipelining

import labpkg as lab
from labpkg.parallelism.pipeline import Pipeline
from labpkg.planning.schedules import gpipe, interleaved, one_f_one_b, zero_bubble
from labpkg.processes.stages import split_stages

CONFIG = lab.GPTConfig(
    num_layers=2, width=32, num_heads=2, sequence_length=16, tied=False
)  # torch has no tied weights across stages
NUM_MICRO_BATCHES, NUM_STEPS = 4, 5
SCHEDULES = {
    "gpipe": gpipe(2, NUM_MICRO_BATCHES),
    "1f1b": one_f_one_b(2, NUM_MICRO_BATCHES),
    "interleaved": interleaved(2, NUM_MICRO_BATCHES, num_virtual_stages=2),
    "zb-h1": zero_bubble(2, NUM_MICRO_BATCHES),
    "zb-v": zero_bubble(2, NUM_MICRO_BATCHES, variant="v"),
}
THEIRS = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved": pipelining.ScheduleInterleaved1F1B,
    "zb-h1": pipelining.ScheduleInterleavedZeroBubble,
    "zb-v": pipelining.ScheduleZBVZeroBubble,
}


def mean_loss(logits, targets):
    # torch tries a loss on whatever memory holds, which `lab.cross_entropy` refuses.
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def by_torch(name, stages, mesh):
    """Return a function (x, y) -> the mean loss, where it is known."""
    schedule, rank = SCHEDULES[name], mesh.get_local_rank()
    own = [
        pipelining.PipelineStage(
            stages[i],
            i,
            len(stages),
            torch.device("cpu"),
            group=mesh.get_group(),
        )
        for i in schedule.stages_of(rank)
    ]
    is_single = name in ("gpipe", "1f1b")
    engine = THEIRS[name](
        own[0] if is_single else own, NUM_MICRO_BATCHES, loss_fn=mean_loss
    )

    def step(x, y):
        losses = []
        inputs = [x] if any(stage.is_first for stage in own) else []
        is_last = any(stage.is_last for stage in own)
        options = {"target": y, "losses": losses} if is_last else {}
        engine.step(*inputs, **options)
        return torch.stack(losses).mean() if losses else None

    return step


def train(engine, name):
    """Return losses, first gradients and last parameters of this rank."""
    mesh = lab.make_mesh(pp=2)["pp"]
    torch.manual_seed(0)
    stages = split_stages(lab.GPT(CONFIG), SCHEDULES[name].num_stages)
    own = [stages[i] for i in SCHEDULES[name].stages_of(mesh.get_local_rank())]
    named = {name: p for stage in own for name, p in stage.named_parameters()}
    if engine == "torch":
        step = by_torch(name, stages, mesh)
    else:
        pipe = Pipeline(own, SCHEDULES[name], mesh, loss_fn=mean_loss)
        step = pipe.step
    optimizer = torch.optim.AdamW(named.values(), lr=1e-3)
    losses, gradients = [], {}
    for i in range(NUM_STEPS):
        generator = torch.Generator(device="cpu").manual_seed(i)
        tokens = torch.randint(256, (8, 17), generator=generator, device="cpu")
        losses.append(step(tokens[:, :-1], tokens[:, 1:]))
        if i == 0:
            gradients = {name: p.grad.clone() for name, p in named.items()}
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, {name: p.detach() for name, p in named.items()}


def train_all():
    return {
        (engine, name): train(engine, name)
        for name in SCHEDULES
        for engine in ("labpkg", "torch")
    }


@pytest.fixture(scope="module")
def ranks(world2):
    return world2.run(train_all)


@pytest.mark.parametrize("name", SCHEDULES)
def test_gpt_trains_as_with_torch_bit_by_bit(ranks, name):
    for found in ranks:
        losses, *mine = found["labpkg", name]
        want, *others = found["torch", name]
        known = [pair for pair in zip(losses, want, strict=True) if pair[1] is not None]
        assert all(torch.equal(a, b) for a, b in known)
        for tensors, referee in zip(mine, others, strict=True):
            assert tensors.keys() == referee.keys()
            assert all(torch.equal(tensors[name], referee[name]) for name in referee)
    assert any(loss is not None for found in ranks for loss in found["torch", name][0])
