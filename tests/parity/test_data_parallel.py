"""PyTorch as referee: `DataParallel` against DistributedDataParallel, rank by rank."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import labpkg as lab

CONFIG = {"num_layers": 2, "width": 32, "num_heads": 2, "sequence_length": 16}


def train(engine: str, dtype: torch.dtype, steps: int = 5) -> list[torch.Tensor]:
    """Train a small GPT with one of the engines and return its parameters."""
    mesh = lab.make_mesh(dp=torch.distributed.get_world_size())["dp"]
    torch.manual_seed(mesh.get_local_rank())  # the engine must make the starts equal
    model: nn.Module = lab.GPT(lab.GPTConfig(**CONFIG)).to(dtype)
    if engine == "ddp":
        model = DistributedDataParallel(model, process_group=mesh.get_group())
    else:
        model = lab.DataParallel(model, mesh, bucket_bytes=2**14)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        generator = torch.Generator(device="cpu").manual_seed(
            100 * step + mesh.get_local_rank()
        )
        tokens = torch.randint(256, (4, 17), generator=generator, device="cpu")
        loss = lab.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)]
)
def test_parameters_equal_those_of_ddp(world2, dtype, tolerance):
    ours = world2.run(train, "labpkg", dtype)
    theirs = world2.run(train, "ddp", dtype)
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert (a - b).norm() <= tolerance * b.norm()


def test_two_ranks_agree_bit_by_bit_with_ddp(world2):
    """Two terms have one order, and halves are exact."""
    ours, theirs = (world2.run(train, e, torch.float32)[0] for e in ("labpkg", "ddp"))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
