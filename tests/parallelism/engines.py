"""Every engine, as the laws see it; `adapter.Engine` says what they ask.

An engine joins the laws by one class, here or in `model_engines.py`, and a line in
`ENGINES`; the laws themselves know no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import labpkg as lab
from labpkg.parallelism.fsdp import fully_shard
from labpkg.parallelism.whole import full_gradients, full_state_dict
from labpkg.parallelism.zero import ZeroOptimizer
from labpkg.planning.cost import zero_bytes
from labpkg.processes.replicas import broadcast_state
from tests.parallelism.adapter import (
    ANOTHER_MODEL,
    Engine,
    Loss,
    OptimizerChoice,
    Reference,
    Traffic,
)
from tests.parallelism.model_engines import MODEL_ENGINES
from tests.parallelism.models import TUNED, UNTUNED, without_parameters

BUCKET_BYTES = 200  # several buckets even for these models


class _ShardedBatch:
    """Engines of the axis dp: each rank takes its shard of the batch."""

    meshes: ClassVar = {n: {"dp": n} for n in (2, 3, 4)}
    tuned: ClassVar = tuple(TUNED)
    untuned: ClassVar = tuple(UNTUNED)
    # Kernels round by alignment, and flat buffers move what has odd sizes.
    exact: ClassVar = tuple(case for case in (*TUNED, *UNTUNED) if case != "odd")
    optimizers_of_untuned: ClassVar[tuple[str, ...]] = ("SGD", "AdamW")
    options_in_order: ClassVar = {"deterministic": True}
    asks: ClassVar = False
    model: nn.Module
    optimizer: torch.optim.Optimizer
    no_sync: Callable[[], AbstractContextManager[None]]

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh["dp"]

    @classmethod
    def reference(cls, world_size: int, *, in_order: bool = False) -> Reference:
        return Reference(num_shards=world_size if in_order else 1)

    def backward(self, x: Tensor, y: Tensor, loss: Loss, num_passes: int) -> Tensor:
        n, rank = self.mesh.size(), self.mesh.get_local_rank()
        parts = (t.chunk(n)[rank].chunk(num_passes) for t in (x, y))
        outputs = []
        for i, (x_part, y_part) in enumerate(zip(*parts, strict=True)):
            is_last = i == num_passes - 1
            with nullcontext() if is_last else self.no_sync():
                outputs.append(self.model(x_part))
                (loss(outputs[-1], y_part) / num_passes).backward()
        return torch.cat(outputs).detach()

    @staticmethod
    def assemble(outputs: list[Tensor]) -> Tensor:
        return torch.cat(outputs)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    @classmethod
    def bad_inputs(cls, mesh: DeviceMesh) -> dict[str, Callable[[], object]]:
        def wrap(model: nn.Module, mesh: Any = mesh) -> object:
            sgd = OptimizerChoice(lab.SGD, {"lr": 0.1})
            return cls("", model, sgd, mesh)  # pyright: ignore[reportCallIssue]

        rank = mesh["dp"].get_local_rank()
        two_devices = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
        frozen = nn.Linear(2, 2).requires_grad_(False)
        twice = nn.Linear(2, 2)
        first = wrap(twice)
        return {
            "no parameters": lambda: wrap(without_parameters()),
            "nothing to train": lambda: wrap(frozen),
            "a mesh of several axes": lambda: wrap(nn.Linear(2, 2), {"dp": mesh}),
            ANOTHER_MODEL: lambda: wrap(nn.Linear(2, 2 + rank)),
            "parameters on two devices": lambda: wrap(two_devices),
            "two engines": lambda: (first, wrap(twice)),
        }


class DataParallelEngine(_ShardedBatch):
    """`DataParallel`: replicas, averaged gradients."""

    def __init__(
        self,
        case: str,
        model: nn.Module,
        optimizer: OptimizerChoice,
        mesh: DeviceMesh,
        *,
        deterministic: bool = False,
    ) -> None:
        super().__init__(mesh)
        self.model = engine = lab.DataParallel(
            model, self.mesh, bucket_bytes=BUCKET_BYTES, deterministic=deterministic
        )
        self.no_sync = engine.no_sync
        self.optimizer = optimizer.kind(self.model.parameters(), **optimizer.options)

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: p.grad for name, p in self.model.named_parameters()}

    def state(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def predicted_bytes(self, num_passes: int) -> Traffic:
        gradients = lab.data_parallel_bytes(self.model)
        everything = lab.data_parallel_bytes(self.model, buffers=True)
        return {
            ("dp", "all_reduce"): gradients,
            ("dp", "broadcast"): everything - gradients,
        }


class _ZeroEngine(_ShardedBatch):
    """`ZeroOptimizer`: replicas of the weights, one slice of the optimizer's state."""

    stage: ClassVar[int]

    def __init__(
        self,
        case: str,
        model: nn.Module,
        optimizer: OptimizerChoice,
        mesh: DeviceMesh,
        *,
        deterministic: bool = False,
    ) -> None:
        super().__init__(mesh)
        self.model = model
        self.optimizer = engine = ZeroOptimizer(
            model.parameters(),
            optimizer.kind,
            self.mesh,
            stage=self.stage,
            bucket_bytes=BUCKET_BYTES,
            deterministic=deterministic,
            **optimizer.options,
        )
        self.no_sync = engine.no_sync
        # The optimizer is given no buffers.
        broadcast_state(model.buffers(), self.mesh)

    def gradients(self) -> dict[str, Tensor | None]:
        return full_gradients(self.model)

    def state(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def predicted_bytes(self, num_passes: int) -> Traffic:
        predicted = zero_bytes(self.model, stage=self.stage)
        return {("dp", op): nbytes for op, nbytes in predicted.items()}

    @classmethod
    def bad_inputs(cls, mesh: DeviceMesh) -> dict[str, Callable[[], object]]:
        def make(kind: Any, *, size: int = 9, stage: int = cls.stage) -> object:
            parameters = [nn.Parameter(torch.ones(size))]
            return ZeroOptimizer(parameters, kind, mesh["dp"], stage=stage, lr=0.1)

        return {
            **super().bad_inputs(mesh),
            "more ranks than elements": lambda: make(lab.SGD, size=1),
            "an optimizer that is not elementwise": lambda: make(torch.optim.LBFGS),
            "a stage of another engine": lambda: make(lab.SGD, stage=3),
        }


class ZeroOneEngine(_ZeroEngine):
    """Stage 1 keeps a buffer of all gradients."""

    stage = 1


class ZeroTwoEngine(_ZeroEngine):
    """Stage 2 frees it."""

    stage = 2


class FullyShardEngine(_ShardedBatch):
    """`fully_shard`: slices of weights, gradients and state."""

    def __init__(
        self,
        case: str,
        model: nn.Module,
        optimizer: OptimizerChoice,
        mesh: DeviceMesh,
        *,
        deterministic: bool = False,
    ) -> None:
        super().__init__(mesh)
        self.bytes_per_pass = zero_bytes(model, stage=3)
        self.model = fully_shard(model, self.mesh, deterministic=deterministic)
        self.optimizer = optimizer.kind(self.model.parameters(), **optimizer.options)
        self.no_sync = nullcontext  # nobody could hold whole gradients

    def gradients(self) -> dict[str, Tensor | None]:
        return full_gradients(self.model)

    def state(self) -> dict[str, Tensor]:
        return full_state_dict(self.model)

    def predicted_bytes(self, num_passes: int) -> Traffic:
        return {
            ("dp", op): num_passes * nbytes
            for op, nbytes in self.bytes_per_pass.items()
        }

    @classmethod
    def bad_inputs(cls, mesh: DeviceMesh) -> dict[str, Callable[[], object]]:
        def shard(model: nn.Module, **options: Any) -> object:
            return fully_shard(model, mesh["dp"], **options)

        stranger, sharded = nn.Linear(2, 2), shard(nn.Linear(4, 4))
        assert isinstance(sharded, nn.Module)
        adafactor = torch.optim.Adafactor(sharded.parameters())
        for p in sharded.parameters():
            p.grad = torch.ones_like(p)
        inputs = super().bad_inputs(mesh)
        del inputs["nothing to train"]  # a frozen model may be sharded, to save memory
        return {
            **inputs,
            "more ranks than elements": lambda: shard(nn.Linear(1, 1, bias=False)),
            "an optimizer that is not elementwise": adafactor.step,
            "a foreign unit": lambda: shard(nn.Linear(2, 2), units=[stranger]),
        }


ENGINES: dict[str, type[Engine]] = {
    "DataParallel": DataParallelEngine,
    "ZeroOptimizer-1": ZeroOneEngine,
    "ZeroOptimizer-2": ZeroTwoEngine,
    "fully_shard": FullyShardEngine,
    **MODEL_ENGINES,
}
