"""Compositions and checkpoints on GPUs; the same function goes first on the CPU.

One process on the CPU takes all steps. The ranks take some under one layout, save, and
go on from the checkpoint under another.
"""

import math

import pytest
import torch
import torch.distributed as dist

import labpkg as lab
from tests import gpus

LAYOUTS = {
    1: [lab.Layout(), lab.Layout(dp=1, zero=3), lab.Layout(pp=1, schedule="1f1b")],
    2: [lab.Layout(tp=2), lab.Layout(pp=2), lab.Layout(dp=2, zero=2)],
    4: [lab.Layout(dp=2, tp=2, zero=1), lab.Layout(pp=2, tp=2, schedule="zb-h1")],
}


PLACES = [*gpus.PLACES, gpus.on_gpus(4, "nccl", 4)]


def build():
    with torch.device("cpu"):  # the generators of CPU and GPU differ
        torch.manual_seed(0)
        return lab.GPT(
            lab.GPTConfig(num_layers=2, width=32, num_heads=4, sequence_length=16)
        )


def batch(step, dp):
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(256, (8, 17), generator=generator)
    own = tokens.chunk(dp.size())[dp.get_local_rank()].to(dp.device_type)
    return own[:, :-1], own[:, 1:]


def train(layouts, folder):
    """Take two steps under each layout, from the checkpoint of the one before."""
    norms, step, composition, draws = [], 0, None, []
    for layout in layouts:
        composition = lab.compose(build, layout, precision="fp64", seed=1)
        what = {"model": composition.model, "optimizer": composition.optimizer}
        if step:
            lab.load_checkpoint(folder / f"step_{step:06d}", **what)
            draws.append(torch.rand(3).cpu())
        for _ in range(2):
            step += 1
            report = composition.train_step(*batch(step, composition.mesh["dp"]))
            norms.append(report.grad_norm)
        pending = lab.save_checkpoint(folder, step=step, asynchronous=True, **what)
        draws.append(torch.rand(3).cpu())
        assert pending.wait().exists()
    assert composition is not None
    state = lab.full_state_dict(composition.model, device="cpu")
    return dist.get_backend(), norms, state, draws[:-1]


@pytest.mark.parametrize(("device", "world_size", "backend"), PLACES)
def test_layouts_and_checkpoints_equal_one_cpu_process(
    tmp_path, device, world_size, backend
):
    layouts = LAYOUTS[world_size]
    with lab.World(1, device="cpu") as world:
        alone = [lab.Layout()] * len(layouts)
        _, norms, state, _ = world.run(train, alone, tmp_path / "alone")[0]
    with lab.World(world_size, device=device, backend=backend) as world:
        ranks = world.run(train, layouts, tmp_path / "ranks")
    assert math.isfinite(sum(norms))
    for found_backend, found_norms, found, draws in ranks:
        assert found_backend == backend
        assert found_norms == pytest.approx(norms, rel=1e-9)
        assert found.keys() == state.keys()
        for name, want in state.items():
            assert (found[name] - want).norm() <= 1e-9 * want.norm(), name
        # What is drawn after a save is drawn again after loading.
        pairs = zip(draws[::2], draws[1::2], strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
