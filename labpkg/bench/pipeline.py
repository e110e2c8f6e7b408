"""`Pipeline` against the schedules of torch.distributed.pipelining, in the same ranks.

An eight-layer GPT takes training steps with AdamW on two ranks of one thread each, then
on four: eight micro-batches of one sequence. The base is torch's 1F1B at its fastest
documented setting: the loss divided by the number of micro-batches beforehand, which
saves a pass over all gradients afterwards; its default is the second row. The others
of torch get that setting, too. Each schedule of this library is then compared with the
same one of torch. Where torch interleaves, a rank has two stages.

More ranks than cores hide bubbles: while one rank waits another has its core, and what
counts is the work of all of them.

Chapter: parallelism/pipeline. References: Huang et al. 2019, GPipe, arXiv:1811.06965;
Narayanan et al. 2021, arXiv:2104.04473; Qi et al. 2024, arXiv:2401.10241.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.device_mesh import DeviceMesh

from labpkg.bench.measure import Sample, alternate, compare
from labpkg.bench.steps import Trained, check_losses, with_adamw
from labpkg.foundations.models import GPT, GPTConfig
from labpkg.parallelism.pipeline import Pipeline
from labpkg.planning.actions import Schedule
from labpkg.planning.schedules import gpipe, interleaved, one_f_one_b, zero_bubble
from labpkg.processes.mesh import make_mesh
from labpkg.processes.stages import split_stages
from labpkg.processes.world import World

LARGE = GPTConfig(num_layers=8, width=384, num_heads=6, sequence_length=128, tied=False)
SMALL = GPTConfig(num_layers=2, width=64, num_heads=2, sequence_length=32, tied=False)
NUM_MICRO_BATCHES = 8
BASE = "torch Schedule1F1B (scale_grads=False)"
DEFAULT = "torch Schedule1F1B (default)"

_TORCH = {
    "gpipe": pipelining.ScheduleGPipe,
    "one_f_one_b": pipelining.Schedule1F1B,
    "interleaved": pipelining.ScheduleInterleaved1F1B,
    "zero_bubble h1": pipelining.ScheduleInterleavedZeroBubble,
    "zero_bubble v": pipelining.ScheduleZBVZeroBubble,
}
Step = Callable[[Tensor, Tensor], Tensor | None]


def rows(*, quick: bool = False) -> list[dict[str, Any]]:
    """Measure training steps with all schedules.

    Args:
        quick: A small model on two ranks and few rounds: the form of the answer, not
            its numbers.

    Returns:
        Rows as in `labpkg.bench.run`, milliseconds per step of all micro-batches.

    Raises:
        RuntimeError: If a variant ends with another loss than the base.
    """
    config = SMALL if quick else LARGE
    size = f"{config.shape.num_parameters / 1e6:.1f}M GPT, {config.num_layers} layers"
    found = []
    for num_ranks in (2,) if quick else (2, 4):
        with World(num_ranks, timeout_s=None) as world:
            ranks = world.run(_measure, config, quick)
        where = f"{size}, {num_ranks} ranks on {world.device}"
        where += f", {NUM_MICRO_BATCHES} micro-batches of 1"
        samples = ranks[0][0]
        losses = {name: loss for _, known in ranks for name, loss in known.items()}
        check_losses(losses, base=BASE)
        found += compare(samples, base=BASE, config=f"{where}, all schedules")
        for schedule in _TORCH:
            names = _by_torch(schedule), f"labpkg:{schedule}"
            table = {name: samples[name] for name in names}
            found += compare(table, base=names[0], config=f"{where}, {schedule}")
    return found


def _measure(
    config: GPTConfig, quick: bool
) -> tuple[dict[str, list[Sample]], dict[str, float]]:
    """Return the samples, and the last losses that this rank knows."""
    pp = make_mesh(pp=torch.distributed.get_world_size())["pp"]
    losses: dict[str, Tensor] = {}
    engines = {BASE: partial(_theirs, "one_f_one_b", divides=True)}
    engines[DEFAULT] = partial(_theirs, "one_f_one_b", divides=False)
    for name in _TORCH:
        engines[_by_torch(name)] = partial(_theirs, name, divides=True)
        engines[f"labpkg:{name}"] = partial(_ours, name)
    steps = {
        name: _training_step(engine, config, pp, losses, name)
        for name, engine in engines.items()
    }
    rounds, most = (2, 2) if quick else (12, 24)
    samples = alternate(
        steps, num_rounds=rounds, max_rounds=most, sample_s=0.01 if quick else 0.5
    )
    return samples, {name: loss.item() for name, loss in losses.items()}


def _by_torch(schedule: str) -> str:
    if schedule == "one_f_one_b":
        return BASE
    return f"torch {_TORCH[schedule].__name__}"


def _schedule(name: str, num_ranks: int) -> Schedule:
    """Return a schedule of this library; torch's has the same stages on each rank."""
    make = {
        "gpipe": gpipe,
        "one_f_one_b": one_f_one_b,
        "interleaved": partial(interleaved, num_virtual_stages=2),
        "zero_bubble h1": zero_bubble,
        "zero_bubble v": partial(zero_bubble, variant="v"),
    }
    return make[name](num_ranks, NUM_MICRO_BATCHES)


def _training_step(
    engine: Callable[[GPT, DeviceMesh], tuple[Trained, Step]],
    config: GPTConfig,
    pp: DeviceMesh,
    losses: dict[str, Tensor],
    name: str,
) -> Callable[[], None]:
    """Return a function that takes a step; where the loss is known it is noted."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    shape = (NUM_MICRO_BATCHES, config.sequence_length + 1)
    text = torch.randint(config.vocab_size, shape, generator=generator)
    x, y = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    torch.manual_seed(0)
    trained, run = engine(GPT(config), pp)

    def step() -> None:
        loss = run(x, y)
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        if loss is not None:
            losses[name] = loss

    return step


def _mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    # torch tries the loss on whatever memory holds, which `cross_entropy` refuses.
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _ours(name: str, model: GPT, pp: DeviceMesh) -> tuple[Trained, Step]:
    schedule = _schedule(name, pp.size())
    stages = split_stages(model, schedule.num_stages)
    own = [stages[i] for i in schedule.stages_of(pp.get_local_rank())]
    pipe = Pipeline(own, schedule, pp, loss_fn=_mean_loss)
    return with_adamw(pipe), pipe.step


def _theirs(
    name: str, model: GPT, pp: DeviceMesh, *, divides: bool
) -> tuple[Trained, Step]:
    schedule = _schedule(name, pp.size())
    modules = split_stages(model, schedule.num_stages)
    group, device = pp.get_group(), torch.get_default_device()
    own = [
        pipelining.PipelineStage(modules[i], i, len(modules), device, group=group)
        for i in schedule.stages_of(pp.get_local_rank())
    ]
    factor = 1 / NUM_MICRO_BATCHES if divides else 1.0
    is_single = schedule.num_stages == pp.size() and name != "zero_bubble h1"
    engine = _TORCH[name](
        own[0] if is_single else own,  # pyright: ignore[reportArgumentType]
        NUM_MICRO_BATCHES,
        loss_fn=lambda *pair: factor * _mean_loss(*pair),
        scale_grads=not divides,
    )

    def step(x: Tensor, y: Tensor) -> Tensor | None:
        losses: list[Tensor] = []
        inputs = [x] if any(stage.is_first for stage in own) else []
        is_last = any(stage.is_last for stage in own)
        engine.step(*inputs, **({"target": y, "losses": losses} if is_last else {}))
        return (
            torch.stack(losses).sum() / (factor * NUM_MICRO_BATCHES) if losses else None
        )

    held = nn.ModuleList(stage.submod for stage in own)
    return with_adamw(held), step
