"""The interpreter of a pipeline: one rank walks through its actions.

It knows no schedule by name. For each action it takes what the action needs, from
another rank or from its own neighbour stage, computes, keeps what backward will need,
and passes the result on. Nothing is kept longer than that: the output of a stage goes
as soon as it is sent, and the rest with the backward of its micro-batch.

Chapter: parallelism/pipeline. References: Huang et al. 2019, GPipe, arXiv:1811.06965;
Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174
(recomputation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from labpkg.planning.actions import Action, Message, Schedule
from labpkg.processes.clock import Clock, Mark
from labpkg.processes.halves import DeferWeights, Product, enter, finish_weights
from labpkg.processes.mail import Mailbox, OrderedMailbox, Route, route_of
from labpkg.processes.negotiation import Shapes, inner
from labpkg.processes.trials import RandomState, random_state, without_gradients


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rank does with batches of one shape.

    Attributes:
        shapes: What passes between stages.
        actions: What this rank does, in order.
        route: What it sends and receives.
        needs_gradient: The stages whose input needs a gradient.
        last: Number of the last stage.
    """

    shapes: Shapes
    actions: tuple[Action, ...]
    route: Route
    needs_gradient: frozenset[int]
    last: int


def plan_of(
    schedule: Schedule,
    rank: int,
    shapes: Shapes,
    trains: Sequence[bool],
    *,
    with_backward: bool,
) -> Plan:
    """Return what a rank does, and which messages that takes.

    Nobody sends a gradient to a stage that has nothing to train, if those before it
    have nothing either.

    Args:
        schedule: Who does what.
        rank: The rank.
        shapes: What passes between stages.
        trains: Whether a parameter of each stage needs a gradient.
        with_backward: Whether to do more than F.
    """
    needs: set[int] = set()
    for stage in range(1, schedule.num_stages if with_backward else 1):
        dtype = shapes.inputs[stage].dtype
        can_train = dtype.is_floating_point or dtype.is_complex
        if can_train and (trains[stage - 1] or stage - 1 in needs):
            needs.add(stage)

    def carries(message: Message) -> bool:
        return message.producer.kind == "F" or message.producer.stage in needs

    route = route_of(schedule, rank, carries)
    actions = schedule.ranks[rank]
    if not with_backward:
        actions = tuple(action for action in actions if action.kind == "F")
    return Plan(shapes, actions, route, frozenset(needs), schedule.num_stages - 1)


class _Graph(NamedTuple):
    """What is kept of a micro-batch on a stage between forward and backward.

    Attributes:
        root: Where backward starts; not the output itself, which may go.
        gradient: Where backward puts the gradient of the input.
        products: Where it puts weight gradients off.
        defer: What puts them off, if backward is split.
    """

    root: GradientEdge | None
    gradient: list[Tensor]
    products: list[Product]
    defer: DeferWeights | None


@dataclass(slots=True)
class Reducer:
    """A data-parallel engine around stages, which reduces once in each walk.

    Attributes:
        no_sync: Its context in which backward only accumulates; as a bound method it
            also keeps the engine, whose parameters know it weakly.
        stages: The stages around which it is and which have something to train.
        pause: What keeps it from reducing.
    """

    no_sync: Callable[[], AbstractContextManager[object]]
    stages: tuple[int, ...]
    pause: ExitStack = field(default_factory=ExitStack)


def has_trained(module: nn.Module) -> bool:
    """Whether some parameter of a module needs a gradient."""
    return any(p.requires_grad for p in module.parameters())


def reducers_of(
    modules: nn.Module | Iterable[nn.Module], stages: Mapping[int, nn.Module]
) -> list[Reducer]:
    """Return the data-parallel engines around stages that train something.

    Args:
        modules: What the pipeline was given: stages, or one engine around all.
        stages: The stages of this rank, by number.
    """
    trained = tuple(s for s, module in stages.items() if has_trained(module))
    if isinstance(modules, nn.Module) and isinstance(inner(modules), nn.ModuleList):
        found = [(modules, trained)]
    else:
        found = [(stages[s], (s,)) for s in trained]
    return [
        Reducer(engine.no_sync, own)  # pyright: ignore[reportArgumentType]
        for engine, own in found
        if hasattr(engine, "no_sync")
    ]


class _Input(NamedTuple):
    """What is kept instead if forward will run again."""

    x: Tensor
    random: RandomState


class Walk:
    """One walk of a rank through its actions, and what is alive on the way.

    Args:
        plan: What to do; it has backward actions only if gradients are enabled.
        modules: The stages of this rank.
        mail: Moves tensors between ranks.
        xs: The micro-batches.
        finish: Makes the result, such as the loss, from the output of the last stage
            for a micro-batch.
        reducers: What averages gradients over replicas.
        recompute: Run forward again before backward, unless it has just run.
        clock: Notes when actions run; or None.

    Attributes:
        results: What the last stage made, by micro-batch, if it is on this rank.
    """

    def __init__(
        self,
        plan: Plan,
        modules: Mapping[int, nn.Module],
        mail: Mailbox | OrderedMailbox,
        xs: list[Tensor],
        finish: Callable[[Tensor, int], Tensor],
        *,
        reducers: Sequence[Reducer] = (),
        recompute: bool = False,
        clock: Clock | None = None,
    ) -> None:
        self._reducers = reducers
        self._plan, self._modules, self._mail = plan, modules, mail
        self._xs, self._finish, self._clock = xs, finish, clock
        self._anchor = torch.zeros((), requires_grad=True)
        self._kept: dict[tuple[int, int], _Graph | _Input] = {}
        self._products: dict[tuple[int, int], list[Product]] = {}
        self._local: dict[tuple[int, bool, int], Tensor] = {}
        self._split = {(a.stage, a.micro_batch) for a in plan.actions if a.kind == "I"}
        self._again = _waiting(plan.actions) if recompute else set()
        self._defers: set[int] = set()  # the stages that put weight gradients off
        device, dtype = xs[0].device, plan.shapes.result.dtype
        self._scale = torch.tensor(1 / len(xs), dtype=dtype, device=device)
        # Backward has the dtypes of forward; autocast would cast once more.
        is_cast = torch.is_autocast_enabled(device.type)
        uncast = torch.autocast(device.type, enabled=False)
        self._uncast = uncast if is_cast else nullcontext()
        self.results: dict[int, Tensor] = {}

    def run(self) -> None:
        """Do every action, then wait until all that was sent has arrived."""
        do = {
            "F": self._forward,
            "B": self._backward,
            "I": self._backward,
            "W": self._weights,
        }
        with ExitStack() as pauses:
            for reducer in self._reducers:
                reducer.pause = pauses.enter_context(ExitStack())
                reducer.pause.enter_context(reducer.no_sync())
            for action in self._plan.actions:
                do[action.kind](action)
                self._mail.after(action)
        self._mail.close()

    def _forward(self, action: Action) -> None:
        stage, _, m = action
        x = self._take(action, stage - 1) if stage else self._xs[m]
        start = self._clock and self._clock.now()
        if not torch.is_grad_enabled():
            y = self._compute(stage, m, x)
        elif action in self._again:
            self._kept[stage, m] = _Input(x, random_state(x.device))
            y = self._compute_in_vain(stage, m, x)
        else:
            y, self._kept[stage, m] = self._build(stage, m, x)
        self._note(action, start)
        if stage == self._plan.last:
            self.results[m] = y
        else:
            self._put(action, stage + 1, y)

    def _compute(self, stage: int, m: int, x: Tensor) -> Tensor:
        y = self._modules[stage](x)
        return self._finish(y, m) if stage == self._plan.last else y

    def _compute_in_vain(self, stage: int, m: int, x: Tensor) -> Tensor:
        """Run forward, which will run again, without keeping anything."""
        version = x._version
        with without_gradients():
            y = self._compute(stage, m, x)
        if x._version != version:
            raise RuntimeError(
                f"stage {stage} changes its input in place, so it cannot run forward "
                "again; use recompute=False or an operation that is not in place"
            )
        return y

    def _build(self, stage: int, m: int, x: Tensor) -> tuple[Tensor, _Graph]:
        """Run forward and return the result and what backward needs."""
        gradient: list[Tensor] = []
        products: list[Product] = []
        if stage in self._plan.needs_gradient:
            x = enter(x, gradient, self._anchor)
        defer = DeferWeights(products) if (stage, m) in self._split else None
        with defer or nullcontext():
            y = self._compute(stage, m, x)
        if products:
            raise RuntimeError(
                f"stage {stage} runs backward through a linear layer inside forward, "
                "so its backward cannot be split; use a schedule without I and W"
            )
        if defer is not None and defer.num_layers:
            self._defers.add(stage)
        root = get_gradient_edge(y) if y.requires_grad else None
        return y.detach(), _Graph(root, gradient, products, defer)

    def _backward(self, action: Action) -> None:
        stage, kind, m = action
        if stage == self._plan.last:
            gradient = self._scale
        elif stage + 1 in self._plan.needs_gradient:
            gradient = self._take(action, stage + 1)
        else:
            gradient = None
        start = self._clock and self._clock.now()
        kept = self._kept.pop((stage, m))
        if isinstance(kept, _Input):
            with kept.random.again():
                kept = self._build(stage, m, kept.x)[1]
        self._sync(action)
        if kept.root is not None and gradient is not None:
            with self._uncast, kept.defer or nullcontext():
                torch.autograd.backward(kept.root, gradient)
        if kind == "I":
            self._products[stage, m] = kept.products
        self._note(action, start)
        if stage in self._plan.needs_gradient:
            spec = self._plan.shapes.inputs[stage]
            unused = not kept.gradient
            dx = spec.zeros(self._scale.device) if unused else kept.gradient[0]
            self._put(action, stage - 1, dx)

    def _weights(self, action: Action) -> None:
        stage, _, m = action
        start = self._clock and self._clock.now()
        self._sync(action)
        with self._uncast:
            finish_weights(self._products.pop((stage, m)))
        self._note(action, start)

    def _note(self, action: Action, start: Mark | None) -> None:
        if self._clock is not None and start is not None:
            self._clock.note(action, start)

    def _take(self, action: Action, source: int) -> Tensor:
        """Return what another stage made for an action."""
        if source in self._modules:
            return self._local.pop(
                (action.stage, action.kind == "F", action.micro_batch)
            )
        return self._mail.take(action)

    def _put(self, action: Action, goal: int, x: Tensor) -> None:
        """Pass on what an action has made."""
        spec = self._plan.shapes.inputs[max(action.stage, goal)]
        if x.shape != spec.shape or x.dtype != spec.dtype:
            raise RuntimeError(
                f"{action} made {tuple(x.shape)} {x.dtype}, but {spec} when shapes "
                "were agreed on; a shape may depend on shapes only, not on values"
            )
        if goal in self._modules:
            self._local[goal, action.kind == "F", action.micro_batch] = x
        else:
            self._mail.put(action, x)

    def _sync(self, action: Action) -> None:
        """Let data-parallel stages reduce in their last backward pass."""
        for reducer in self._reducers:
            if action.stage in reducer.stages and action == self._final(reducer):
                reducer.pause.close()

    def _final(self, reducer: Reducer) -> Action:
        """Return the last action that makes gradients, as far as that is known yet."""
        return next(
            action
            for action in reversed(self._plan.actions)
            if action.stage in reducer.stages
            and action.kind in ("BW" if action.stage in self._defers else "BI")
        )


def _waiting(actions: Sequence[Action]) -> set[Action]:
    """Return the forwards that something else follows than their own backward."""
    return {
        action
        for action, after in pairwise(actions)
        if action.kind == "F" and (after.kind not in "BI" or after[::2] != action[::2])
    }
