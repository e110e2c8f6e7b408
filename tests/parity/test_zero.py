"""PyTorch as referee: `ZeroOptimizer` against ZeroRedundancyOptimizer with DDP."""

import pytest
import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import labpkg as lab
from labpkg.parallelism.zero import ZeroOptimizer

CONFIG = {"num_layers": 2, "width": 32, "num_heads": 2, "sequence_length": 16}
OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
}


def engines(model: nn.Module, name: str, stage: int):
    """Return the model under an engine, or under torch's at stage 0."""
    mesh = lab.make_mesh(dp=torch.distributed.get_world_size())["dp"]
    cls, options = OPTIMIZERS[name]
    if stage:
        adapted = ZeroOptimizer(
            model.parameters(), cls, mesh, stage=stage, bucket_bytes=2**14, **options
        )
        return model, adapted
    group = mesh.get_group()
    replica = DistributedDataParallel(model, process_group=group)
    theirs = ZeroRedundancyOptimizer(
        replica.parameters(), cls, process_group=group, **options
    )
    return replica, theirs


def train(name: str, stage: int, dtype: torch.dtype, steps: int = 5):
    """Train a small GPT and return its parameters."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)  # the engine must make the starts equal
    model, optimizer = engines(lab.GPT(lab.GPTConfig(**CONFIG)).to(dtype), name, stage)
    for step in range(steps):
        generator = torch.Generator(device="cpu").manual_seed(100 * step + rank)
        tokens = torch.randint(256, (4, 17), generator=generator, device="cpu")
        loss = lab.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def train_all(dtype: torch.dtype):
    """Train at all stages; torch's is slow to import, so one job does it."""
    return {
        (name, stage): train(name, stage, dtype)
        for name in OPTIMIZERS
        for stage in (0, 1, 2)
    }


@pytest.fixture(scope="module")
def on_four(world4):
    return world4.run(train_all, torch.float64)


@pytest.fixture(scope="module")
def on_two(world2):
    return world2.run(train_all, torch.float32)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stage", [1, 2])
def test_parameters_equal_those_of_zero_redundancy(on_four, stage, name):
    for of_rank in on_four:
        for a, b in zip(of_rank[name, stage], of_rank[name, 0], strict=True):
            assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_agree_bit_by_bit_with_zero_redundancy(on_two, stage, name):
    """Two terms have one order, and halves are exact."""
    for of_rank in on_two:
        pairs = zip(of_rank[name, stage], of_rank[name, 0], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def state_bytes(stage: int) -> int:
    """Return the bytes of the moments of Adam on this rank after a step."""
    model, optimizer = engines(lab.MLP(784, 128, 10), "adamw", stage)
    model(torch.zeros(2, 784)).sum().backward()
    optimizer.step()
    inner = optimizer.inner if stage else optimizer.optim
    return sum(
        value.nbytes
        for state in inner.state.values()
        for key, value in state.items()
        if key != "step"
    )


@pytest.mark.parametrize(
    ("stage", "expected"),
    [(0, [802_816, 11_344]), (1, [407_080, 407_080]), (2, [407_080, 407_080])],
)
def test_the_state_is_cut_evenly_where_torch_hands_out_whole_tensors(
    world2, stage, expected
):
    assert world2.run(state_bytes, stage) == expected
