"""Compose engines on one mesh: pipeline, then tensor, then data parallelism or ZeRO.

The order is given by what each engine needs to see. The plan of tensor parallelism
names layers of the whole model, and a stage takes its layers as it finds them; the
engines over `dp` come last, because they move whatever parameters are left here.

Chapter: planning/device_mesh. References: Narayanan et al. 2021, arXiv:2104.04473;
Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from labpkg.foundations.models import GPT
from labpkg.foundations.optimizers import AdamW
from labpkg.parallelism.data_parallel import DataParallel
from labpkg.parallelism.fsdp import fully_shard
from labpkg.parallelism.pipeline import Pipeline
from labpkg.parallelism.tensor_parallel import (
    apply_tensor_parallel,
    gpt_tensor_parallel_plan,
)
from labpkg.parallelism.whole import param_groups
from labpkg.parallelism.zero import ZeroOptimizer
from labpkg.planning.layout import Layout
from labpkg.processes.initial_values import materialize
from labpkg.processes.mesh import make_mesh
from labpkg.processes.messages import all_gather_object
from labpkg.processes.stages import Stage, split_stages
from labpkg.runs.composition import PRECISIONS, Composition, Parts
from labpkg.runs.objective import LossFunction, Objective
from labpkg.runs.samples import device_of

T = TypeVar("T")
Initialize = Callable[[nn.Module], nn.Module]
Groups = Callable[[nn.Module], list[dict[str, Any]]]


def compose(
    build: Callable[[], nn.Module],
    layout: Layout,
    *,
    mesh: DeviceMesh | None = None,
    optimizer: type[Optimizer] = AdamW,
    lr: float = 1e-3,
    weight_decay: float | None = None,
    groups: Groups | None = None,
    plan: Mapping[str, str] | None = None,
    loss_fn: LossFunction | None = None,
    precision: str = "fp32",
    seed: int = 0,
    on_meta: bool = False,
    max_grad_norm: float = 1.0,
    **options: Any,
) -> Composition:
    """Build a model, divide it as a layout says, and return what trains it.

    Every rank makes the same call. The model that `build` returns knows of no engine;
    for a pipeline it is an `nn.Sequential` or has `pipeline_units()`, for tensor
    parallelism it has a plan. A layer that looks at several samples at once, such as
    BatchNorm, sees those of one rank, pass and micro-batch only.

    Args:
        build: Returns the whole model, on torch's default device.
        layout: How the job is divided.
        mesh: The mesh, as `make_mesh(pp=, dp=, tp=)` makes it; None makes it.
        optimizer: Class of the optimizer; elementwise if `zero` is above 0.
        lr: Its learning rate.
        weight_decay: Of parameters with two or more dims, others have none; None leaves
            it to the optimizer's own default, for all.
        groups: Makes parameter groups from the divided model instead.
        plan: Of `apply_tensor_parallel`; None for a `GPT`, whose plan is known.
        loss_fn: (output, targets) -> the mean loss over targets, of those int64 ones
            that are not -100, or over rows; None is the cross-entropy.
        precision: fp32, bf16, fp16 or fp64.
        seed: Of the initial values; and, with the rank, of what is drawn later.
        on_meta: Build without memory and divide first; only then is what lies here
            drawn (`materialize`), the same values under every layout. So no rank ever
            holds the whole. What `build` itself draws or loads is lost.
        max_grad_norm: To which gradients are clipped; `math.inf` does not.
        options: Further options of the optimizer.

    Returns:
        The composition.

    Raises:
        ValueError: On every rank, if the layout fits neither the ranks, nor the mesh,
            nor the model, or if an option is out of range.

    Communication: what the engines send when they are made.

    Reference: Narayanan et al. 2021, arXiv:2104.04473.
    """
    _check_options(precision, max_grad_norm)
    mesh = _mesh_of(layout) if mesh is None else _checked(mesh, layout)
    model, initialize = _built(build, precision, device_of(mesh), seed, on_meta)
    num_parameters = sum(p.numel() for p in model.parameters())
    objective = _cut_layers(model, layout, mesh, plan, loss_fn)
    divided, reducers = _divide(model, layout, mesh, objective, initialize)
    made = _groups(divided, weight_decay) if groups is None else groups(divided)
    trains = _optimizer(made, layout, mesh, optimizer, lr=lr, **options)
    _seed_rank(seed, mesh)
    takes_windows = layout.is_pipeline or layout.sequence_parallel
    parts = Parts(
        model=divided,
        optimizer=trains,
        objective=objective,
        reducers=[trains] if isinstance(trains, ZeroOptimizer) else reducers,
        module=None if takes_windows else model,
        windows=model.config if takes_windows and isinstance(model, GPT) else None,
        num_parameters=num_parameters,
    )
    how = {"precision": precision, "max_grad_norm": max_grad_norm, "seed": seed}
    return Composition(layout, mesh, parts, **how)


def _check_options(precision: str, max_grad_norm: float) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}; choose one of {PRECISIONS}")
    if not max_grad_norm > 0:  # also refuses nan
        raise ValueError(f"max_grad_norm={max_grad_norm} must be above 0; choose 1.0")


def _mesh_of(layout: Layout) -> DeviceMesh:
    return make_mesh(pp=layout.pp, dp=layout.dp, tp=layout.tp)


def _checked(mesh: DeviceMesh, layout: Layout) -> DeviceMesh:
    """Refuse a mesh with other axes than the layout."""
    names = mesh.mesh_dim_names or ()
    sizes = {name: mesh[name].size() for name in names}
    wanted = {"pp": layout.pp, "dp": layout.dp, "tp": layout.tp}
    if {**dict.fromkeys(names, 1), **wanted} != sizes:
        raise ValueError(
            f"the mesh has the axes {sizes}, but the layout wants {wanted}; pass "
            f"make_mesh(pp={layout.pp}, dp={layout.dp}, tp={layout.tp}), or no mesh"
        )
    return mesh


def _built(
    build: Callable[[], nn.Module],
    precision: str,
    device: torch.device,
    seed: int,
    on_meta: bool,
) -> tuple[nn.Module, Initialize]:
    """Return the whole model, and what gives values to the parts that are kept."""
    torch.manual_seed(seed)
    with torch.device("meta" if on_meta else device):
        model = build()
    model = model if on_meta else model.to(device)
    model = model.double() if precision == "fp64" else model
    return model, partial(materialize, seed=seed, device=device) if on_meta else _keep


def _keep(model: nn.Module) -> nn.Module:
    return model


def _cut_layers(
    model: nn.Module,
    layout: Layout,
    mesh: DeviceMesh,
    plan: Mapping[str, str] | None,
    loss_fn: LossFunction | None,
) -> Objective:
    """Apply tensor parallelism; return a loss that knows whether classes are cut."""
    if layout.tp == 1:
        return Objective(loss_fn)
    parallel_loss = plan is None and loss_fn is None
    plan = plan or _known_plan(model, layout, parallel_loss)
    apply_tensor_parallel(
        model, mesh["tp"], plan, sequence_parallel=layout.sequence_parallel
    )
    return Objective(loss_fn, mesh["tp"] if parallel_loss else None)


def _seed_rank(seed: int, mesh: DeviceMesh) -> None:
    """Let dropout differ by rank, but not where ranks hold parts of one layer."""
    place = mesh["pp"].get_local_rank() * mesh["dp"].size()
    torch.manual_seed(seed + 1 + place + mesh["dp"].get_local_rank())


def _known_plan(
    model: nn.Module, layout: Layout, parallel_loss: bool
) -> dict[str, str]:
    if not isinstance(model, GPT):
        raise ValueError(
            f"tp={layout.tp} cuts layers of {type(model).__name__}, but no plan says "
            "which; pass plan={'up': 'column', 'down': 'row'} or the like, or tp=1"
        )
    return gpt_tensor_parallel_plan(
        model.config,
        sequence_parallel=layout.sequence_parallel,
        parallel_loss=parallel_loss,
    )


def _divide(
    model: nn.Module,
    layout: Layout,
    mesh: DeviceMesh,
    objective: Objective,
    initialize: Initialize,
) -> tuple[nn.Module, list[Any]]:
    """Cut into stages and replicate or shard; return also what reduces gradients."""
    prepare = lambda parts: _replicated(parts, layout, mesh["dp"], initialize)
    if not layout.is_pipeline:
        if layout.recompute:
            _recompute_units(model)
        (whole,), reducers = _agreed(lambda: prepare([model]))
        return whole, reducers
    schedule = layout.make_schedule()
    stages = split_stages(model, schedule.num_stages)
    _check_ties(stages, layout)
    own = [stages[i] for i in schedule.stages_of(mesh["pp"].get_local_rank())]
    modules, reducers = _agreed(lambda: prepare(own))
    pipe = Pipeline(
        modules,
        schedule,
        mesh["pp"],
        loss_fn=objective,
        recompute=layout.recompute,
    )
    return pipe, reducers


def _check_ties(stages: list[Stage], layout: Layout) -> None:
    """Refuse to slice what several stages hold, of which they need the whole."""
    numbers = [number for stage in stages for number in set(stage.numbers.values())]
    if layout.zero == 3 and len(set(numbers)) < len(numbers):
        raise ValueError(
            f"zero=3 slices parameters, but stages of the pipeline (pp={layout.pp}) "
            "share one, whose gradient they sum whole; choose zero=1 or 2, or do not "
            "tie weights (tied=False)"
        )


def _replicated(
    parts: Sequence[nn.Module],
    layout: Layout,
    mesh: DeviceMesh,
    initialize: Initialize,
) -> tuple[Any, list[Any]]:
    """Put the model, or the stages of this rank, into their engines over `dp`."""
    if layout.zero == 3:
        parts = [fully_shard(part, mesh) if _holds(part) else part for part in parts]
    together = parts[0] if len(parts) == 1 else nn.ModuleList(parts)
    initialize(together)
    if layout.zero:
        return parts, []
    parameters = [p for part in parts for p in part.parameters()]
    if len(set(parameters)) < len(parameters):  # stages of this rank share some
        replica = DataParallel(together, mesh)
        return replica, [replica]
    modules = [DataParallel(p, mesh) if _trains(p) else p for p in parts]
    return modules, [m for m in modules if isinstance(m, DataParallel)]


def _holds(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _optimizer(
    groups: list[dict[str, Any]],
    layout: Layout,
    mesh: DeviceMesh,
    cls: type[Optimizer],
    **options: Any,
) -> Optimizer:
    if layout.zero not in (1, 2):
        return _agreed(lambda: cls(groups, **options))
    return _agreed(
        lambda: ZeroOptimizer(groups, cls, mesh["dp"], stage=layout.zero, **options)
    )


def _groups(model: nn.Module, weight_decay: float | None) -> list[dict[str, Any]]:
    if weight_decay is not None:
        return param_groups(model, weight_decay=weight_decay)
    groups = param_groups(model, weight_decay=0.0, decays=lambda name, shape: True)
    return [{"params": group["params"]} for group in groups]


def _recompute_units(model: nn.Module) -> None:
    """Let each block keep its input only, and run forward again in backward."""
    if isinstance(model, nn.Sequential):
        units = list(model)
    elif (make_units := getattr(model, "pipeline_units", None)) is not None:
        units = make_units()[1:-1]
    else:
        raise ValueError(
            f"recompute=True, but {type(model).__name__} has no blocks; write it as "
            "nn.Sequential or give it a method pipeline_units()"
        )
    for unit in units:
        _Recomputed(unit)


class _Recomputed:
    """The forward of a block, run again in backward instead of being kept."""

    def __init__(self, block: nn.Module) -> None:
        self._forward = block.forward
        block.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        return checkpoint(self._forward, *args, use_reentrant=False, **kwargs)


def _agreed(make: Callable[[], T]) -> T:
    """Return what this rank makes; raise on all ranks what is refused on one.

    Stages differ, so what one rank refuses another may accept.
    """
    made, problem = None, None
    try:
        made = make()
    except ValueError as error:
        problem = str(error)
    problems = all_gather_object(problem)
    for rank, text in enumerate(problems):
        if text is not None:
            raise ValueError(f"rank {rank}: {text}")
    return made  # pyright: ignore[reportReturnType]
