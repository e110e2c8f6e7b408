"""PyTorch as referee: `fully_shard` against FSDP2, rank by rank."""

import pytest
import torch
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor

import labpkg as lab
from labpkg.bench.memory import peak_bytes
from labpkg.bench.steps import mesh_of_messages, training_step, with_adamw
from labpkg.parallelism.fsdp import fully_shard
from labpkg.parallelism.whole import full_state_dict

CONFIG = {"num_layers": 2, "width": 32, "num_heads": 2, "sequence_length": 16}


def by_torch(model, mesh, reshard, param_dtype, reduce_dtype):
    policy = fsdp.MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=reduce_dtype
    )
    options = {"mesh": mesh, "reshard_after_forward": reshard, "mp_policy": policy}
    for p in model.parameters():  # FSDP2 takes the parameters as they are
        p.data = lab.broadcast(p.detach(), mesh)
    for block in model.blocks:
        fsdp.fully_shard(block, **options)
    return fsdp.fully_shard(model, **options)


def train(engine, dtype, reshard=True, param_dtype=None, reduce_dtype=None):
    """Train a small GPT with one of the engines; return losses and whole parameters."""
    mesh = lab.make_mesh(dp=torch.distributed.get_world_size())["dp"]
    torch.manual_seed(mesh.get_local_rank())  # the engine must make the starts equal
    model = lab.GPT(lab.GPTConfig(**CONFIG)).to(dtype)
    if engine == "fsdp2":
        model = by_torch(model, mesh, reshard, param_dtype, reduce_dtype)
    else:
        model = fully_shard(
            model,
            mesh,
            reshard_after_forward=reshard,
            param_dtype=param_dtype,
            reduce_dtype=reduce_dtype,
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(5):
        g = torch.Generator(device="cpu").manual_seed(
            100 * step + mesh.get_local_rank()
        )
        tokens = torch.randint(256, (4, 17), generator=g, device="cpu")
        loss = lab.cross_entropy(model(tokens[:, :-1]).float(), tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if engine == "fsdp2":
        state = {
            name: value.full_tensor() if isinstance(value, DTensor) else value
            for name, value in model.state_dict().items()
        }
    else:
        state = full_state_dict(model)
    return losses, state


TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-4}
REDUCED = (None, torch.float32)
ENGINES = ("labpkg", "fsdp2")


def train_all():
    """Train everything in one job; return the runs of both engines."""
    whole = {
        (dtype, reshard): [train(engine, dtype, reshard) for engine in ENGINES]
        for dtype in TOLERANCES
        for reshard in (True, False)
    }
    for reduce_dtype in REDUCED:
        options = {"param_dtype": torch.bfloat16, "reduce_dtype": reduce_dtype}
        whole["mixed", reduce_dtype] = [
            train(engine, torch.float32, **options) for engine in ENGINES
        ]
    return whole


@pytest.fixture(scope="module")
def trained(world2):
    """Return, by case, what both ranks have seen of labpkg, and of FSDP2."""
    ranks = world2.run(train_all)
    return {
        case: list(zip(*(found[case] for found in ranks), strict=True))
        for case in ranks[0]
    }


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES.items())
def test_parameters_equal_those_of_fsdp2(trained, dtype, tolerance, reshard):
    ours, theirs = trained[dtype, reshard]
    for (losses, mine), (want, others) in zip(ours, theirs, strict=True):
        assert losses == pytest.approx(want, rel=tolerance)
        assert mine.keys() == others.keys()
        for name, other in others.items():
            assert (mine[name] - other).norm() <= tolerance * other.norm(), name


@pytest.mark.parametrize("reduce_dtype", REDUCED)
def test_mixed_precision_follows_fsdp2(trained, reduce_dtype):
    """Two terms have one order, halves are exact: even bf16 must agree bit by bit."""
    ours, theirs = trained["mixed", reduce_dtype]
    for (losses, mine), (want, others) in zip(ours, theirs, strict=True):
        assert losses == want
        for name, other in others.items():
            assert torch.equal(mine[name], other), name


def peaks():
    return {reshard: peaks_with(reshard) for reshard in (True, False)}


def peaks_with(reshard):
    config = lab.GPTConfig(
        num_layers=4, width=128, num_heads=2, sequence_length=16, tied=False
    )
    dp = lab.make_mesh(dp=2)["dp"]
    found, losses = {}, {}
    engines = {
        "fsdp2": lambda model: with_adamw(by_torch(model, dp, reshard, None, None)),
    }
    for name, mesh in (("shared memory", dp), ("messages", mesh_of_messages())):
        engines[name] = lambda model, mesh=mesh: with_adamw(
            fully_shard(model, mesh, reshard_after_forward=reshard)
        )
    for name, engine in engines.items():
        step = lambda name=name, engine=engine: training_step(
            engine, config, 1, losses, name
        )
        found[name] = peak_bytes(step)
    return found


def test_peak_is_not_above_that_of_fsdp2(world2):
    for ranks in world2.run(peaks):
        for found in ranks.values():
            assert found["shared memory"] < found["messages"] <= found["fsdp2"]
