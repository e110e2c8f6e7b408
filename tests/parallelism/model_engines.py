"""The engines that divide the model, as the laws see them; see `engines.py`."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import labpkg as lab
from labpkg.parallelism.pipeline import Pipeline
from labpkg.parallelism.tensor_parallel import apply_tensor_parallel
from labpkg.parallelism.whole import full_gradients, full_state_dict
from labpkg.planning.actions import Schedule
from labpkg.planning.model_parallel import (
    LayerCut,
    pipeline_bytes,
    tensor_parallel_bytes,
)
from labpkg.planning.schedules import gpipe, interleaved, one_f_one_b, zero_bubble
from labpkg.processes.stages import Stage, split_stages
from tests.parallelism.adapter import (
    ANOTHER_MODEL,
    Engine,
    Loss,
    OptimizerChoice,
    Reference,
    Traffic,
)
from tests.parallelism.deep_models import DEEP, DEEP_UNTUNED
from tests.parallelism.models import TUNED, mean_squared, without_parameters
from tests.parallelism.plans import PLANS, SEQUENCE_PLANS, Plan, named_layers


class _WholeBatch:
    """Engines whose ranks share the work on every sample."""

    mesh: DeviceMesh
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    asks: ClassVar = True
    optimizers_of_untuned: ClassVar[tuple[str, ...]] = (
        "AdamW",
    )  # saves time; a mistake shows with it
    options_in_order: ClassVar = {}  # they add up in one order anyway

    def step(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def gradients(self) -> dict[str, Tensor | None]:
        return full_gradients(self.model)

    def state(self) -> dict[str, Tensor]:
        return full_state_dict(self.model)


class TensorParallelEngine(_WholeBatch):
    """`apply_tensor_parallel`: each rank computes its features of the whole batch."""

    meshes: ClassVar = {n: {"tp": n} for n in (2, 3, 4)}
    plans: ClassVar[dict[str, Plan]] = PLANS
    is_sequence: ClassVar = False
    tuned: ClassVar = tuple(case for case in PLANS if case in TUNED)
    untuned: ClassVar = tuple(case for case in PLANS if case not in TUNED)
    exact: ClassVar = tuple(PLANS)

    def __init__(
        self,
        case: str,
        model: nn.Module,
        optimizer: OptimizerChoice,
        mesh: DeviceMesh,
        *,
        deterministic: bool = False,
    ) -> None:
        self.mesh, plan = mesh["tp"], self.plans[case]
        self.model = self._apply(model, plan, self.mesh)
        self.optimizer = optimizer.kind(self.model.parameters(), **optimizer.options)
        self.layers: list[LayerCut] = []  # that a forward pass calls
        self.predicted: Counter[str] = Counter()
        for layer, kind in named_layers(self.model, plan).values():
            layer.register_forward_hook(partial(self._note, kind))

    def _note(self, kind: str, layer: nn.Module, args: Any, output: Tensor) -> None:
        """Remember a layer that was called, as the formula wants it."""
        if kind == "column" and not args[0].requires_grad:
            return  # the first of a model sends nothing back
        trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        entering = trained if kind == "sequence" else getattr(layer, "in_features", 0)
        leaving = getattr(layer, "out_features", output.shape[-1])
        self.layers.append(LayerCut(kind, entering, leaving))

    @classmethod
    def _apply(cls, model: nn.Module, plan: Any, mesh: DeviceMesh) -> nn.Module:
        return apply_tensor_parallel(
            model, mesh, plan, sequence_parallel=cls.is_sequence
        )

    @classmethod
    def reference(cls, world_size: int, *, in_order: bool = False) -> Reference:
        if not in_order:
            return Reference()
        return Reference(num_slices=world_size, is_sequence=cls.is_sequence)

    def backward(self, x: Tensor, y: Tensor, loss: Loss, num_passes: int) -> Tensor:
        outputs = []
        self.predicted.clear()
        parts = (t.chunk(num_passes) for t in (x, y))
        for x_part, y_part in zip(*parts, strict=True):
            self.layers.clear()
            output = self.model(x_part)
            (loss(output, y_part) / num_passes).backward()
            outputs.append(output.detach())
            self.predicted += tensor_parallel_bytes(
                self.layers,
                tokens=output.numel() // output.shape[-1],
                itemsize=output.itemsize,
                sequence_parallel=self.is_sequence,
            )
        return torch.cat(outputs)

    @staticmethod
    def assemble(outputs: list[Tensor]) -> Tensor:
        assert all(torch.equal(output, outputs[0]) for output in outputs)
        return outputs[0]

    def predicted_bytes(self, num_passes: int) -> Traffic:
        return {("tp", op): nbytes for op, nbytes in self.predicted.items()}

    @classmethod
    def bad_inputs(cls, mesh: DeviceMesh) -> dict[str, Callable[[], object]]:
        n, rank = mesh["tp"].size(), mesh["tp"].get_local_rank()

        def apply(plan: Any, model: nn.Module | None = None, axis: Any = None) -> Any:
            model = lab.MLP(4, 4 * n, 4) if model is None else model
            return cls._apply(model, plan, axis or mesh["tp"])

        pair = {"0": "column", "2": "row"}
        other = lab.MLP(4, 4 * n, 4 + rank)
        first = apply(pair)
        return {
            "no parameters": lambda: apply({"0": "column"}, without_parameters()),
            "an empty plan": lambda: apply({}),
            "a layer that does not exist": lambda: apply({"up": "column"}),
            "an unknown value": lambda: apply({"0": "columns"}),
            "a layer of another type": lambda: apply({"1": "column"}),
            "a layer with two values": lambda: apply({"0": "column", "[0]": "row"}),
            "odd features": lambda: apply(pair, lab.MLP(4, 4 * n + 1, 4)),
            "odd heads": lambda: apply({"0": "column:4", "2": "row:3"}),
            "blocks of another sum": lambda: apply({"0": f"column_fused:{n}+{n}"}),
            "a model that is cut already": lambda: apply(pair, first),
            "a mesh of several axes": lambda: apply(pair, axis=mesh),
            ANOTHER_MODEL: lambda: apply(pair, other),
        }


class SequenceParallelEngine(TensorParallelEngine):
    """The same with activations that are cut along the sequence between layers."""

    plans: ClassVar = SEQUENCE_PLANS
    is_sequence: ClassVar = True
    tuned: ClassVar = tuple(case for case in SEQUENCE_PLANS if case in TUNED)
    untuned: ClassVar = tuple(case for case in SEQUENCE_PLANS if case not in TUNED)
    exact: ClassVar = tuple(SEQUENCE_PLANS)

    @classmethod
    def bad_inputs(cls, mesh: DeviceMesh) -> dict[str, Callable[[], object]]:
        n = mesh["tp"].size()
        pair = {"1": "column", "3": "row"}

        def layers() -> nn.Module:
            return nn.Sequential(nn.LayerNorm(4), *lab.MLP(4, 4 * n, 4))

        model = cls._apply(layers(), {"0": "sequence_scatter", **pair}, mesh["tp"])
        return {
            **super().bad_inputs(mesh),
            "a norm without a value": lambda: cls._apply(layers(), pair, mesh["tp"]),
            "odd sequences": lambda: model(torch.ones(2, 4 * n + 1, 4)),
            "no sequences": lambda: model(torch.ones(2, 4)),
        }


NUM_MICRO_BATCHES = 4


class _PipelineEngine(_WholeBatch):
    """`Pipeline`: ranks hold stages, and compute them in the order of a schedule."""

    meshes: ClassVar = {n: {"pp": n} for n in (2, 4)}
    tuned: ClassVar = tuple(DEEP)
    untuned: ClassVar = tuple(DEEP_UNTUNED)
    # One process adds up the gradients of a tied parameter for each micro-batch; a
    # pipeline those of each copy first, over all micro-batches.
    exact: ClassVar = tuple(
        case for case in (*DEEP, *DEEP_UNTUNED) if case not in ("deep_gpt", "deep_tied")
    )
    schedule: Callable[[int], Schedule]

    def __init__(
        self,
        case: str,
        model: nn.Module,
        optimizer: OptimizerChoice,
        mesh: DeviceMesh,
        *,
        deterministic: bool = False,
    ) -> None:
        self.mesh, plan = mesh["pp"], type(self).schedule(mesh["pp"].size())
        stages = split_stages(model, plan.num_stages)
        self.borders = split_stages(copy.deepcopy(model), plan.num_stages)
        own = [stages[i] for i in plan.stages_of(self.mesh.get_local_rank())]
        self.model = self.pipe = Pipeline(own, plan, self.mesh, loss_fn=self._loss)
        parameters = list(self.model.parameters())
        self.optimizer = (  # a stage may have nothing to train
            optimizer.kind(parameters, **optimizer.options) if parameters else None
        )
        self.loss: Loss = mean_squared
        self.num_passes, self.predicted = 1, 0
        self.outputs: list[Tensor] = []

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # it is tried out before
            self.outputs.append(output.detach())
        return self.loss(output, target) / self.num_passes

    @classmethod
    def reference(cls, world_size: int, *, in_order: bool = False) -> Reference:
        plan = cls.schedule(world_size)
        origin = tuple(plan.rank_of(stage) for stage in range(plan.num_stages))
        return Reference(num_shards=NUM_MICRO_BATCHES if in_order else 1, origin=origin)

    def backward(self, x: Tensor, y: Tensor, loss: Loss, num_passes: int) -> Tensor:
        self.loss, self.num_passes = loss, num_passes
        self.outputs.clear()
        parts = (t.chunk(num_passes) for t in (x, y))
        for x_part, y_part in zip(*parts, strict=True):
            self.pipe.step(x_part, y_part)
        self.example = x.chunk(num_passes * NUM_MICRO_BATCHES)[0]
        return torch.cat(self.outputs) if self.outputs else torch.empty(0)

    @staticmethod
    def assemble(outputs: list[Tensor]) -> Tensor:
        (output,) = [output for output in outputs if len(output)]
        return output

    @torch.no_grad()
    def predicted_bytes(self, num_passes: int) -> Traffic:
        plan, rank = self.pipe.schedule, self.mesh.get_local_rank()
        x, sizes = self.example, []
        for stage in self.borders:
            x = stage(x)
            sizes.append(x.nbytes)
        ends = [plan.rank_of(0), plan.rank_of(plan.num_stages - 1)]
        ties = _ties(self.borders, plan)
        between_ends = sum(n for ranks, n in ties if ranks == ends)
        sent = pipeline_bytes(
            plan, rank, activation_bytes=sizes[:-1], tied_bytes=between_ends
        )
        sent += sum(
            (len(ranks) - 1) * n for ranks, n in ties if ranks != ends and rank in ranks
        )
        loss_bytes = max(x.itemsize, 4) * (1 + len(ties))  # and who used which copy
        call_bytes = 8 * plan.num_ranks  # whether all ranks make the same call
        return {
            ("pp", "send"): num_passes * sent,
            ("pp", "all_reduce"): num_passes * loss_bytes,
            ("pp", "all_gather"): num_passes * call_bytes,
        }

    @classmethod
    def bad_inputs(cls, mesh: DeviceMesh) -> dict[str, Callable[[], object]]:
        axis, rank = mesh["pp"], mesh["pp"].get_local_rank()
        plan = cls.schedule(axis.size())

        def pipe(
            model: nn.Module, plan: Schedule = plan, cut: int = plan.num_stages
        ) -> Pipeline:
            stages = split_stages(model, cut)
            own = [stages[i] for i in plan.stages_of(rank) if i < cut]
            return Pipeline(own, plan, axis, loss_fn=mean_squared)

        def linears(num_layers: int) -> nn.Module:
            return nn.Sequential(*(nn.Linear(4, 4) for _ in range(num_layers)))

        def unlike() -> nn.Module:
            return nn.Sequential(*(nn.Linear(4, 5) for _ in range(plan.num_stages)))

        n, good = plan.num_stages, pipe(linears(plan.num_stages))
        x = torch.ones(NUM_MICRO_BATCHES, 4)
        unfit = pipe(unlike())
        return {
            "no units": lambda: pipe(nn.Linear(4, 4)),
            "fewer units than stages": lambda: pipe(linears(n - 1)),
            "a schedule for other ranks": lambda: pipe(linears(n), one_f_one_b(9, 9)),
            "fewer stages than those of the schedule": lambda: pipe(
                linears(n), cut=n - 1
            ),
            "a mesh of several axes": lambda: Pipeline(
                [], plan, mesh, loss_fn=mean_squared
            ),
            "a batch that is no multiple": lambda: good.step(x[1:], x[1:]),
            "targets of another batch": lambda: good.step(x, x.repeat(2, 1)),
            "stages whose shapes do not meet": lambda: unfit.step(x, x),
            ANOTHER_MODEL: lambda: pipe(linears(n + rank)),
        }


def _ties(stages: list[Stage], plan: Schedule) -> list[tuple[list[int], int]]:
    """Return the ranks and bytes of each parameter that several ranks hold."""
    held: dict[int, tuple[list[int], int]] = {}
    for i, stage in enumerate(stages):
        for name, parameter in stage.named_parameters(remove_duplicate=False):
            number = stage.numbers[name]
            ranks, _ = held.setdefault(number, ([], parameter.nbytes))
            if plan.rank_of(i) not in ranks:
                ranks.append(plan.rank_of(i))
    return [tie for tie in held.values() if len(tie[0]) > 1]


def assemble_stages(model: nn.Module, models: list[nn.Module]) -> None:
    """Let each stage of a model be that of the model with its number."""
    stages = split_stages(model, len(models))
    # The first stage comes last: what it shares with later ones starts as it has it.
    for i, other in reversed(list(enumerate(models))):
        stages[i].load_state_dict(split_stages(other, len(models))[i].state_dict())


M = NUM_MICRO_BATCHES
SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "gpipe": lambda n: gpipe(n, M),
    "1f1b": lambda n: one_f_one_b(n, M),
    "interleaved": lambda n: interleaved(n, M, num_virtual_stages=2),
    "zb-h1": lambda n: zero_bubble(n, M),
    "zb-v": lambda n: zero_bubble(n, M, variant="v"),
}

MODEL_ENGINES: dict[str, type[Engine]] = {
    "TensorParallel": TensorParallelEngine,
    "TensorParallel-sequence": SequenceParallelEngine,
    **{
        f"Pipeline-{name}": type(
            f"Pipeline{i}", (_PipelineEngine,), {"schedule": staticmethod(schedule)}
        )
        for i, (name, schedule) in enumerate(SCHEDULES.items())
    },
}
