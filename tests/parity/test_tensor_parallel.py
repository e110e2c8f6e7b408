"""PyTorch as referee: `apply_tensor_parallel` against `parallelize_module`."""

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

import labpkg as lab
from labpkg.parallelism.tensor_parallel import (
    apply_tensor_parallel,
    gpt_tensor_parallel_plan,
)
from labpkg.parallelism.vocabulary_loss import vocab_parallel_cross_entropy

CONFIG = lab.GPTConfig(
    num_layers=2, width=32, num_heads=4, sequence_length=16, tied=False
)  # DTensor would untie the weights


def by_torch(model, mesh, sequence_parallel, parallel_loss):
    outside = Shard(1) if sequence_parallel else Replicate()
    gather = lambda *others: PrepareModuleInput(
        input_layouts=(outside, *others), desired_input_layouts=(Replicate(), *others)
    )
    logits = Shard(-1) if parallel_loss else Replicate()
    plan = {
        "embedding.tokens": RowwiseParallel(input_layouts=Replicate()),
        "head.output": ColwiseParallel(
            input_layouts=outside,
            output_layouts=logits,
            use_local_output=not parallel_loss,
        ),
    }
    for i in range(CONFIG.num_layers):
        plan |= {
            f"blocks.{i}.attention": gather(None),
            f"blocks.{i}.attention.qkv": ColwiseParallel(),  # rows lie head by head
            f"blocks.{i}.attention.out": RowwiseParallel(output_layouts=outside),
            f"blocks.{i}.mlp": gather(),
            f"blocks.{i}.mlp.up": ColwiseParallel(),
            f"blocks.{i}.mlp.down": RowwiseParallel(output_layouts=outside),
        }
        if sequence_parallel:
            plan[f"blocks.{i}.attention_norm"] = SequenceParallel()
            plan[f"blocks.{i}.mlp_norm"] = SequenceParallel()
    if sequence_parallel:
        plan["head.norm"] = SequenceParallel()
        plan["embedding"] = PrepareModuleOutput(
            output_layouts=Replicate(), desired_output_layouts=Shard(1)
        )
    return parallelize_module(model, mesh, plan)


def train(engine, sequence_parallel=False, parallel_loss=False):
    """Train a small GPT; return losses, whole first gradients, whole parameters."""
    mesh = lab.make_mesh(tp=torch.distributed.get_world_size())["tp"]
    torch.manual_seed(0)  # DTensor takes the weights as they are
    model = lab.GPT(CONFIG).double()
    if engine == "dtensor":
        model = by_torch(model, mesh, sequence_parallel, parallel_loss)
    else:
        options = {"sequence_parallel": sequence_parallel}
        plan = gpt_tensor_parallel_plan(CONFIG, parallel_loss=parallel_loss, **options)
        model = apply_tensor_parallel(model, mesh, plan, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    losses = []
    for step in range(5):
        generator = torch.Generator(device="cpu").manual_seed(step)
        tokens = torch.randint(256, (4, 17), generator=generator, device="cpu")
        x, y = tokens[:, :-1], tokens[:, 1:]
        if not parallel_loss:
            loss = lab.cross_entropy(model(x), y)
            loss.backward()
        elif engine == "dtensor":
            with loss_parallel():
                loss = torch.nn.functional.cross_entropy(
                    model(x).flatten(0, 1), y.flatten()
                )
                loss.backward()
            loss = loss.full_tensor()
        else:
            loss = vocab_parallel_cross_entropy(model(x), y, mesh)
            loss.backward()
        if step == 0:
            gradients = whole(engine, model, lambda p: p.grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, gradients, whole(engine, model, lambda p: p)


def whole(engine, model, value):
    """Return a tensor of each parameter whole, by name."""
    if engine != "dtensor":
        if value(next(model.parameters())).requires_grad:
            return lab.full_state_dict(model)
        return lab.full_gradients(model)
    named = {name: value(p).detach() for name, p in model.named_parameters()}
    return {
        name: t.full_tensor() if isinstance(t, DTensor) else t
        for name, t in named.items()
    }


CASES = [(False, False), (True, False), (False, True), (True, True)]


def train_all():
    return {
        (engine, *case): train(engine, *case)
        for engine in ("labpkg", "dtensor")
        for case in CASES
    }


@pytest.fixture(scope="module")
def ranks(world2):
    return world2.run(train_all)


@pytest.mark.parametrize(("sequence_parallel", "parallel_loss"), CASES)
def test_gpt_trains_as_with_dtensor(ranks, sequence_parallel, parallel_loss):
    for found in ranks:
        losses, *mine = found["labpkg", sequence_parallel, parallel_loss]
        want, *others = found["dtensor", sequence_parallel, parallel_loss]
        assert losses == pytest.approx(want, rel=1e-12)
        for tensors, referee in zip(mine, others, strict=True):
            assert tensors.keys() == referee.keys()
            for name, other in referee.items():
                assert (tensors[name] - other).norm() <= 1e-12 * other.norm(), name
