"""A world of 1024 ranks in one process: its collectives return at once, unmeaningly.

Bytes are exact all the same, so they are held against the formula, and against what
torch's FSDP2 sends. A pipeline cannot be played: its ranks tell each other the shapes
that they will send.
"""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import labpkg as lab
from labpkg.bench.steps import LARGE
from labpkg.parallelism.fsdp import fully_shard
from labpkg.parallelism.zero import ZeroOptimizer
from labpkg.planning.cost import zero_bytes
from labpkg.planning.model_parallel import gpt_layer_cuts, tensor_parallel_bytes
from labpkg.processes import collectives

N = 1024
HEADS = lab.GPTConfig(num_layers=2, width=64, num_heads=32, sequence_length=32)
FSDP2 = {"all_gather": "_allgather_base_", "reduce_scatter": "_reduce_scatter_base_"}


class TorchBytes(TorchDispatchMode):
    """Count the payload of torch's own collectives, the longest of their tensors."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = torch.utils._pytree.tree_iter(args)
            nbytes = max(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
            name = func._opname
            self.found[name] = self.found.get(name, 0) + nbytes
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_rank_0(fake_world):
    """Return a function that plays on the last of the axes with a GPT."""
    return lambda *args: fake_world(0, N, played, *args)


def played(play, axes, config, *args):
    return play(lab.make_mesh(**axes)[list(axes)[-1]], lab.GPT(config), *args)


def take_step(model, optimizer):
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    lab.cross_entropy(model(tokens), tokens).backward()
    optimizer.step()
    optimizer.zero_grad()


def own_engine(mesh, model, stage):
    formula = zero_bytes(model, stage=stage)
    with collectives.off():  # of objects there is only garbage
        if stage == 3:
            fully_shard(model, mesh)
            optimizer = torch.optim.AdamW(model.parameters())
        else:
            adamw = torch.optim.AdamW
            optimizer = ZeroOptimizer(model.parameters(), adamw, mesh, stage=stage)
    take_step(model, optimizer)
    with lab.count_comms() as log:
        take_step(model, optimizer)
    found = {op: log["dp", op].payload_bytes for op in formula}
    assert sum(found.values()) == log["dp"].payload_bytes  # nothing else
    return found, formula


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_moves_the_bytes_of_the_formula(as_rank_0, stage):
    found, formula = as_rank_0(own_engine, {"dp": N}, LARGE, stage)
    assert found == formula


def tensor_parallel(mesh, model, sequence_parallel):
    options = {"sequence_parallel": sequence_parallel}
    with collectives.off():  # of objects there is only garbage
        plan = lab.gpt_tensor_parallel_plan(model.config, **options)
        lab.apply_tensor_parallel(model, mesh, plan, **options)
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    with lab.count_comms() as log:
        model(tokens).sum().backward()
    cuts = gpt_layer_cuts(model.config.shape, **options)
    formula = tensor_parallel_bytes(cuts, tokens=tokens.numel(), **options)
    found = {op: log["tp", op].payload_bytes for op in formula}
    assert sum(found.values()) == log["tp"].payload_bytes  # nothing else
    return found, formula


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_32_ranks_that_cut_layers_move_the_bytes_of_the_formula(
    as_rank_0, sequence_parallel
):
    axes = {"dp": N // 32, "tp": 32}
    found, formula = as_rank_0(tensor_parallel, axes, HEADS, sequence_parallel)
    assert found == formula


def fsdp2(mesh, model):
    from torch.distributed.fsdp import fully_shard

    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    take_step(model, optimizer)
    with TorchBytes() as counted:
        take_step(model, optimizer)
    return counted.found


def padded_rows(parameter: nn.Parameter) -> int:
    rows = math.ceil(parameter.shape[0] / N) * N
    return rows * parameter[0].numel() * parameter.element_size()


def test_fsdp2_moves_twice_as_many(as_rank_0):
    """It gives each rank whole rows of each weight, so 384 rows are sent as 1024."""
    found = as_rank_0(fsdp2, {"dp": N}, LARGE)
    model = lab.GPT(LARGE)
    padded = sum(map(padded_rows, model.parameters()))
    assert found == {FSDP2["all_gather"]: 2 * padded, FSDP2["reduce_scatter"]: padded}
    needed = sum(zero_bytes(model, stage=3).values())
    assert sum(found.values()) / needed == pytest.approx(2.06, abs=0.01)
