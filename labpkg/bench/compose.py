"""`compose` against torch's own compositions, in the same ranks.

A GPT of 10.9M parameters takes whole training steps on four ranks: forward, backward,
clipping by the global norm, AdamW. On dp2 x tp2 the base is DTensor inside of
DistributedDataParallel, on dp2 x pp2 the 1F1B schedule of torch.distributed.pipelining
over stages inside of it, both at their fastest documented settings: buckets as views,
and losses divided beforehand. torch has no norm over both kinds of ranks; its side
adds up squares by one all_reduce.

`peak_bytes` are the most live bytes of tensors on rank 0 during a step, counted after
the times were taken; what they should be for this library says `predicted_bytes`.

Chapter: planning/device_mesh. Reference: Narayanan et al. 2021, arXiv:2104.04473.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW

from labpkg.bench.measure import Sample, alternate, compare
from labpkg.bench.memory import peak_bytes
from labpkg.bench.steps import LARGE, LEARNING_RATE, SMALL, check_losses
from labpkg.foundations.models import GPT, Block, GPTConfig
from labpkg.planning.cost import activation_bytes, model_state_bytes
from labpkg.planning.layout import Layout
from labpkg.processes.collectives import all_reduce
from labpkg.processes.mesh import make_mesh
from labpkg.processes.stages import split_stages
from labpkg.processes.world import World
from labpkg.runs.composing import compose

BASE_TENSOR = "torch DTensor + DDP"
BASE_PIPELINE = "torch pipelining (1F1B) + DDP"
NUM_SEQUENCES, MAX_NORM = 4, 1.0  # on each rank of dp

TENSOR = Layout(dp=2, tp=2)
PIPELINE = Layout(dp=2, pp=2, num_micro_batches=NUM_SEQUENCES)
_LAYOUTS = {BASE_TENSOR: TENSOR, BASE_PIPELINE: PIPELINE}
Step = Callable[[], float]


def rows(*, quick: bool = False) -> list[dict[str, Any]]:
    """Measure training steps of both compositions.

    Args:
        quick: A small model and few rounds: the form of the answer, not its numbers.

    Returns:
        Rows as in `labpkg.bench.run`, milliseconds per step, with `peak_bytes` and
        `predicted_bytes`.

    Raises:
        RuntimeError: If a variant ends with another loss than the base.
    """
    config = replace(SMALL, tied=False) if quick else LARGE  # torch would untie
    size = f"{config.shape.num_parameters / 1e6:.1f}M GPT"
    found = []
    with World(4, timeout_s=None) as world:
        for base, layout in _LAYOUTS.items():
            samples, peaks = world.run(_measure, config, base, quick)[0]
            where = f"{size}, {layout} on {world.device}"
            where += f", {NUM_SEQUENCES} sequences on each rank of dp"
            for row in compare(samples, base=base, config=where):
                ours = row["variant"] == "labpkg"
                row["peak_bytes"] = peaks[row["variant"]]
                row["predicted_bytes"] = (
                    predicted_bytes(config, layout) if ours else None
                )
                found.append(row)
    return found


def predicted_bytes(config: GPTConfig, layout: Layout) -> int:
    """Return the bytes of rank 0 when backward begins, the most in a step.

    Weights, gradients and the state of AdamW take 16 bytes for each parameter that lies
    here. Of the activations tensor parallelism divides all but the inputs of norms and
    of column layers; a stage keeps those of its blocks for each micro-batch in flight.

    Args:
        config: Of the model.
        layout: One without ZeRO, with pp or tp above 1.
    """
    shape = config.shape
    with torch.device("meta"):
        model = GPT(config)
    if layout.is_pipeline:
        schedule = layout.make_schedule()
        stage = split_stages(model, schedule.num_stages)[0]
        num_elements = sum(p.numel() for p in stage.parameters())
        num_layers = sum(isinstance(module, Block) for module in stage.modules())
        rows = NUM_SEQUENCES // schedule.num_micro_batches * schedule.peak_in_flight[0]
        blocks, none = (
            activation_bytes(replace(shape, num_layers=n), batch_size=rows)
            for n in (2 * num_layers, num_layers)
        )
        activations = blocks - none  # a head lies elsewhere
    else:
        cut = sum(p.numel() for name, p in model.named_parameters() if _is_cut(name))
        num_elements = shape.num_parameters - cut + cut // layout.tp
        whole = activation_bytes(shape, batch_size=NUM_SEQUENCES)
        numbers = (2 * shape.num_layers + 1) * (2 * shape.width + 2)
        replicated = 4 * NUM_SEQUENCES * shape.sequence_length * numbers
        activations = replicated + (whole - replicated) // layout.tp
    return int(model_state_bytes(num_elements, stage=0, n=layout.dp)) + activations


def _is_cut(name: str) -> bool:
    return "norm" not in name and "positions" not in name


def _measure(
    config: GPTConfig, base: str, quick: bool
) -> tuple[dict[str, list[Sample]], dict[str, int]]:
    """Return the samples and the peaks of bytes, by variant."""
    layout = _LAYOUTS[base]
    mesh = make_mesh(pp=layout.pp, dp=layout.dp, tp=layout.tp)
    theirs = _tensor_and_ddp if base == BASE_TENSOR else _pipelining_and_ddp
    engines = {
        base: partial(theirs, config, mesh),
        "labpkg": partial(_ours, config, layout, mesh),
    }
    losses: dict[str, float] = {}
    steps = {
        name: _noting(make(*_batch(config, mesh)), losses, name)
        for name, make in engines.items()
    }
    rounds, most = (2, 2) if quick else (12, 24)
    samples = alternate(
        steps, num_rounds=rounds, max_rounds=most, sample_s=0.01 if quick else 0.5
    )
    check_losses(losses, base=base)
    steps.clear()
    peaks = {
        name: peak_bytes(partial(make, *_batch(config, mesh)))
        for name, make in engines.items()
    }
    return samples, peaks


def _noting(step: Step, losses: dict[str, float], name: str) -> Callable[[], None]:
    def run() -> None:
        losses[name] = step()

    return run


def _batch(config: GPTConfig, mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(torch.get_default_device())
    generator.manual_seed(mesh["dp"].get_local_rank())
    shape = (NUM_SEQUENCES, config.sequence_length + 1)
    text = torch.randint(config.vocab_size, shape, generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def _ours(
    config: GPTConfig, layout: Layout, mesh: DeviceMesh, x: Tensor, y: Tensor
) -> Step:
    trained = compose(
        lambda: GPT(config),
        layout,
        mesh=mesh,
        optimizer=AdamW,
        lr=LEARNING_RATE,
        max_grad_norm=MAX_NORM,
        fused=True,
    )
    return lambda: trained.train_step(x, y).loss


def _tensor_and_ddp(config: GPTConfig, mesh: DeviceMesh, x: Tensor, y: Tensor) -> Step:
    torch.manual_seed(0)
    model = GPT(config)
    plan: dict[str, ParallelStyle] = {
        "embedding.tokens": RowwiseParallel(input_layouts=Replicate()),
        "blocks.*.attention.qkv": ColwiseParallel(),
        "blocks.*.attention.out": RowwiseParallel(),
        "blocks.*.mlp.up": ColwiseParallel(),
        "blocks.*.mlp.down": RowwiseParallel(),
        "head.output": ColwiseParallel(output_layouts=Replicate()),
    }
    for module, others in (("attention", (None,)), ("mlp", ())):
        plan[f"blocks.*.{module}"] = PrepareModuleInput(
            input_layouts=(Replicate(), *others),
            desired_input_layouts=(Replicate(), *others),
        )
    parallelize_module(model, mesh["tp"], plan)
    replica = DistributedDataParallel(
        model, device_mesh=mesh["dp"], gradient_as_bucket_view=True
    )
    parameters = list(replica.parameters())
    cut = [p for p in parameters if hasattr(p, "_st_info")]  # DDP's mark of DTensors
    whole = [p for p in parameters if not hasattr(p, "_st_info")]
    optimizer = AdamW(parameters, lr=LEARNING_RATE, fused=True)

    def step() -> float:
        loss = _mean_loss(replica(x), y)
        loss.backward()
        squares = all_reduce(_norm(cut) ** 2, mesh["tp"]) + _norm(whole) ** 2
        clip_grads_with_norm_(parameters, MAX_NORM, squares.sqrt())
        optimizer.step()
        optimizer.zero_grad()
        return all_reduce(loss.detach(), mesh["dp"], op="mean").item()

    return step


def _pipelining_and_ddp(
    config: GPTConfig, mesh: DeviceMesh, x: Tensor, y: Tensor
) -> Step:
    torch.manual_seed(0)
    pp, rank = mesh["pp"], mesh["pp"].get_local_rank()
    own: nn.Module = split_stages(GPT(config), pp.size())[rank]
    replica = DistributedDataParallel(
        own, process_group=mesh["dp"].get_group(), gradient_as_bucket_view=True
    )
    device, group = torch.get_default_device(), pp.get_group()
    stage = pipelining.PipelineStage(replica, rank, pp.size(), device, group=group)
    share = 1 / NUM_SEQUENCES
    schedule = pipelining.Schedule1F1B(
        stage,
        NUM_SEQUENCES,
        loss_fn=lambda *pair: share * _mean_loss(*pair),
        scale_grads=False,
    )
    parameters = list(replica.parameters())
    optimizer = AdamW(parameters, lr=LEARNING_RATE, fused=True)

    def step() -> float:
        losses: list[Tensor] = []
        if stage.is_last:
            schedule.step(target=y, losses=losses)
        else:
            schedule.step(x)
        squares = all_reduce(_norm(parameters) ** 2, pp)
        clip_grads_with_norm_(parameters, MAX_NORM, squares.sqrt())
        optimizer.step()
        optimizer.zero_grad()
        loss = torch.stack(losses).sum() if losses else torch.zeros(())
        return all_reduce(all_reduce(loss, pp), mesh["dp"], op="mean").item()

    return step


def _mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    return get_total_norm([p.grad for p in parameters if p.grad is not None])
