"""What only a GPU can show: NCCL, and gloo between ranks that share one GPU."""

import pytest
import torch
from torch import nn

import labpkg as lab

NUM_GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS == 0, reason="torch sees no GPU"),
]
several = pytest.mark.skipif(
    NUM_GPUS == 1, reason="one GPU: NCCL between GPUs needs two"
)


def step():
    """Return loss, gradient and traffic of one data-parallel step on the own device."""
    mesh = lab.make_mesh(dp=torch.distributed.get_world_size())["dp"]
    with torch.device("cpu"):  # the generators of CPU and GPU differ
        model = lab.MLP(6, 5, 4)
    model = lab.DataParallel(model.to(torch.get_default_device()), mesh)
    x = torch.arange(24.0).view(4, 6).chunk(mesh.size())[mesh.get_local_rank()]
    with lab.count_comms() as log:
        loss = model(x).square().mean()
        loss.backward()
    grads = [p.grad for p in model.parameters()]
    return {
        "device": str(x.device.type),
        "backend": torch.distributed.get_backend(),
        "grads": [g.cpu() for g in grads if g is not None],
        "bytes": log["dp"].payload_bytes == lab.data_parallel_bytes(model),
    }


def everything():
    """Call each collective on the own device; return what one process can predict."""
    mesh = lab.make_mesh(dp=torch.distributed.get_world_size())["dp"]
    n, rank = mesh.size(), mesh.get_local_rank()
    x = torch.arange(float(n)) + rank
    out = {
        "all_reduce": lab.all_reduce(x, mesh),
        "mean": lab.all_reduce(x, mesh, op="mean"),
        "reduce": lab.reduce(x, mesh, dst=n - 1),
        "broadcast": lab.broadcast(x, mesh, src=n - 1),
        "all_gather": lab.all_gather(x, mesh),
        "reduce_scatter": lab.reduce_scatter(x, mesh),
        "all_to_all": lab.all_to_all(x, mesh),
    }
    if n > 1 and rank < 2:
        other = 1 - rank
        if rank == 0:
            lab.send(x, other, mesh)
        else:
            out["recv"] = lab.recv(x, other, mesh)
    lab.barrier(mesh)
    return lab.all_gather_object(rank, mesh), {k: v.cpu() for k, v in out.items()}


def check_everything(ranks):
    n = len(ranks)
    xs = [torch.arange(float(n)) + r for r in range(n)]
    total = torch.stack(xs).sum(0)
    for rank, (names, got) in enumerate(ranks):
        assert names == list(range(n))
        assert torch.equal(got["all_reduce"], total)
        assert torch.equal(got["mean"], total / n)
        assert torch.equal(got["reduce"], total if rank == n - 1 else 0 * total)
        assert torch.equal(got["broadcast"], xs[-1])
        assert torch.equal(got["all_gather"], torch.cat(xs))
        assert torch.equal(got["reduce_scatter"], total[rank : rank + 1])
        assert torch.equal(got["all_to_all"], torch.stack(xs)[:, rank])
        if "recv" in got:
            assert torch.equal(got["recv"], xs[0])


@pytest.mark.parametrize(
    ("world_size", "backend"),
    [
        (1, "nccl"),
        (1, "gloo"),
        (4, "gloo"),
        pytest.param(2, "nccl", marks=several),
    ],
)
def test_gpu_ranks_equal_one_cpu_process(world_size, backend):
    with lab.World(1, device="cpu") as world:
        want = world.run(step)[0]["grads"]
    with lab.World(world_size, device="cuda", backend=backend) as world:
        check_everything(world.run(everything))
        for got in world.run(step):
            assert (got["device"], got["backend"]) == ("cuda", backend)
            assert got["bytes"]
            for g, w in zip(got["grads"], want, strict=True):
                torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_one_gpu_takes_a_user_model_on_its_default_device():
    def place():
        return next(nn.Linear(2, 2).parameters()).device.type

    with lab.World(1, device="cuda") as world:
        assert world.run(place) == ["cuda"]
