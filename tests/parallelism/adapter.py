"""What the laws ask of an engine; `engines.py` answers it for each.

Objects of these classes live inside `World.run`, one on each rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

Loss = Callable[[Tensor, Tensor], Tensor]
Traffic = dict[tuple[str, str], int]  # payload bytes by axis and collective
ANOTHER_MODEL = "another model on each rank"  # which no rank can see alone


class OptimizerChoice(NamedTuple):
    """A class of optimizers and its options."""

    kind: Callable[..., torch.optim.Optimizer]
    options: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """How one process trains what an engine is compared with.

    Attributes:
        num_shards: In how many parts it adds up a batch, one after the other.
        origin: For each stage of a pipeline the rank that made its weights; empty if
            rank 0 made all.
        num_slices: In how many parts it adds up the features of each layer of a plan.
        is_sequence: Whether it is the plan that cuts the sequence.
    """

    num_shards: int = 1
    origin: tuple[int, ...] = ()
    num_slices: int = 1
    is_sequence: bool = False


class Engine(Protocol):
    """One model under an engine, on one rank.

    Attributes:
        meshes: Sizes of the axes for each number of ranks on which the laws hold.
        tuned: Names of the models of the book that the engine takes.
        untuned: Names of the others.
        optimizers_of_untuned: Names of the optimizers that train these.
        exact: Those of both that one process can repeat bit by bit.
        options_in_order: What makes the engine add up in an order, if it is an option.
        asks: Whether ranks tell each other what they hold before they refuse it, so
            that all of them do if one does; parameters have not moved then.
    """

    meshes: ClassVar[dict[int, dict[str, int]]]
    tuned: ClassVar[tuple[str, ...]]
    untuned: ClassVar[tuple[str, ...]]
    optimizers_of_untuned: ClassVar[tuple[str, ...]]
    exact: ClassVar[tuple[str, ...]]
    options_in_order: ClassVar[dict[str, bool]]
    asks: ClassVar[bool]

    def __init__(
        self,
        case: str,
        model: nn.Module,
        optimizer: OptimizerChoice,
        mesh: DeviceMesh,
        *,
        deterministic: bool = False,
    ) -> None: ...

    @classmethod
    def reference(cls, world_size: int, *, in_order: bool = False) -> Reference:
        """Return how one process trains the same, or adds up in the same order."""
        ...

    def backward(self, x: Tensor, y: Tensor, loss: Loss, num_passes: int) -> Tensor:
        """Accumulate the gradient over the global batch; return this rank's output."""
        ...

    @staticmethod
    def assemble(outputs: list[Tensor]) -> Tensor:
        """Return the output of the global batch from those of all ranks."""
        ...

    def step(self) -> None:
        """Update the parameters and drop the gradients."""
        ...

    def gradients(self) -> dict[str, Tensor | None]:
        """Return every whole gradient by the name of its parameter."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return every whole parameter and buffer by name."""
        ...

    def predicted_bytes(self, num_passes: int) -> Traffic:
        """Return the payload bytes of one step by the formula."""
        ...

    @classmethod
    def bad_inputs(cls, mesh: DeviceMesh) -> dict[str, Callable[[], object]]:
        """Return calls that must raise a ValueError, by what is wrong with them."""
        ...
