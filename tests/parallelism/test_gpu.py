"""The engines on GPUs: NCCL, and gloo between ranks that share one. The CPU goes first.

The same function runs in each place, so the cases on the CPU keep it right where there
is no GPU.
"""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

import labpkg as lab
from tests.gpus import PLACES

CONFIG = {"num_layers": 2, "width": 32, "num_heads": 4, "sequence_length": 16}
ENGINES = ["data_parallel", "zero 1", "zero 2", "fully_shard"]
ENGINES += ["tensor", "tensor sequence", "pipeline 1f1b", "pipeline h1"]


def gpt(seed: int) -> lab.GPT:
    with torch.device("cpu"):  # the generators of CPU and GPU differ
        torch.manual_seed(seed)
        model = lab.GPT(lab.GPTConfig(**CONFIG)).to(torch.float64)
    return model.to(torch.get_default_device())


def by_data(engine: str | None) -> tuple[nn.Module, Optimizer, Callable]:
    """Return the model, its optimizer, and what a step does with a batch."""
    mesh = lab.make_mesh(dp=dist.get_world_size())["dp"]
    n, rank = mesh.size(), mesh.get_local_rank()
    loss_model = model = gpt(0 if engine is None else rank)
    make = lambda cls, *more, **options: cls(
        lab.param_groups(model, weight_decay=0.1), *more, lr=1e-3, **options
    )
    if engine == "data_parallel":
        loss_model = lab.DataParallel(model, mesh, check_every=1)
    if engine == "fully_shard":
        lab.fully_shard(model, mesh)
    if engine in ("zero 1", "zero 2"):
        stage = int(engine[-1])
        optimizer = make(lab.ZeroOptimizer, lab.AdamW, mesh, stage=stage)
    else:
        optimizer = make(lab.AdamW)

    def accumulate(x: Tensor, y: Tensor) -> None:
        x, y = (t.chunk(n)[rank] for t in (x, y))
        lab.cross_entropy(loss_model(x), y).backward()

    return model, optimizer, accumulate


def by_layers(engine: str) -> tuple[nn.Module, Optimizer, Callable]:
    """Do the same where ranks divide the model and see the whole batch."""
    n, (kind, _, variant) = dist.get_world_size(), engine.partition(" ")
    if kind == "tensor":
        mesh = lab.make_mesh(tp=n)["tp"]
        model = gpt(mesh.get_local_rank())
        options = {"sequence_parallel": variant == "sequence"}
        plan = lab.gpt_tensor_parallel_plan(model.config, **options)
        lab.apply_tensor_parallel(model, mesh, plan, **options)
        accumulate = lambda x, y: lab.cross_entropy(model(x), y).backward()
    else:
        mesh = lab.make_mesh(pp=n)["pp"]
        make = {"1f1b": lab.one_f_one_b, "h1": lab.zero_bubble}[variant]
        stage = lab.split_stages(gpt(0), n)[mesh.get_local_rank()]
        model = lab.Pipeline(stage, make(n, 4), mesh, loss_fn=lab.cross_entropy)
        accumulate = model.step
    groups = lab.param_groups(model, weight_decay=0.1)
    return model, lab.AdamW(groups, lr=1e-3), accumulate


def train(engine: str | None) -> dict:
    """Train for three steps on the own device; return the whole state on the CPU."""
    divides = engine is not None and engine.startswith(("tensor", "pipeline"))
    model, optimizer, accumulate = (by_layers if divides else by_data)(engine)
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(256, (3, 4, 17), generator=generator)
    norms = []
    for batch in tokens.to(torch.get_default_device()):
        accumulate(batch[:, :-1], batch[:, 1:])
        norms.append(lab.clip_grad_norm(model, 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    return {
        "device": next(model.parameters()).device.type,
        "backend": dist.get_backend(),
        "norms": norms,
        "model": lab.full_state_dict(model, device="cpu"),
        "moments": lab.full_state_dict(optimizer, device="cpu")["state"][0],
    }


@pytest.fixture(scope="module")
def reference():
    with lab.World(1, device="cpu") as world:
        return world.run(train, None)[0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("device", "world_size", "backend"), PLACES)
def test_engines_equal_one_cpu_process(reference, device, world_size, backend, engine):
    with lab.World(world_size, device=device, backend=backend) as world:
        ranks = world.run(train, engine)
    for found in ranks:
        assert (found["device"], found["backend"]) == (device, backend)
        assert found["norms"] == pytest.approx(reference["norms"], rel=1e-9)
        for name, want in reference["model"].items():
            got = found["model"][name]
            assert (got - want).norm() <= 1e-9 * want.norm(), name
        for name, want in reference["moments"].items():
            torch.testing.assert_close(
                found["moments"][name], want, rtol=1e-7, atol=1e-12
            )


def bfloat16() -> bool:
    """Compute and reduce in bfloat16 from slices in float32."""
    mesh = lab.make_mesh(dp=dist.get_world_size())["dp"]
    torch.manual_seed(0)
    model = lab.GPT(lab.GPTConfig(**CONFIG))
    lab.fully_shard(model, mesh, param_dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(256, (4, 17))
    losses = []
    for _ in range(10):
        loss = lab.cross_entropy(model(tokens[:, :-1]).float(), tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    kept = {p.dtype for p in model.parameters()} == {torch.float32}
    return kept and losses[-1] < losses[0]


@pytest.mark.parametrize(("device", "world_size", "backend"), PLACES)
def test_bfloat16_trains_float32_slices(device, world_size, backend):
    with lab.World(world_size, device=device, backend=backend) as world:
        assert all(world.run(bfloat16))


def starts() -> bool:
    """Draw a model whole, and in slices; nothing else that is drawn may change."""
    mesh = lab.make_mesh(dp=dist.get_world_size())["dp"]
    with torch.device("meta"):
        whole, cut = (lab.GPT(lab.GPTConfig(**CONFIG)) for _ in range(2))
    lab.fully_shard(cut, mesh)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    want = lab.materialize(whole, seed=1).state_dict()
    found = lab.full_state_dict(lab.materialize(cut, seed=1))
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert {value.device.type for value in want.values()} == {mesh.device_type}
    return torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("device", "world_size", "backend"), PLACES)
def test_initial_values_do_not_depend_on_slices(device, world_size, backend):
    with lab.World(world_size, device=device, backend=backend) as world:
        assert all(world.run(starts))
