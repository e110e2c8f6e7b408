"""Fully sharded data parallelism (ZeRO stage 3): no rank keeps a whole parameter.

A model is cut into units. Of every unit each rank owns one flat slice in `n`. The life
of a parameter: its unit is gathered just before it computes and freed right after, in
forward and again in backward; its gradient is reduced into slices once the unit's
backward has ended. So a rank holds 1/n of parameters, gradients and optimizer state,
the root while the model computes, and at most two more units: one that computes, and
the next, whose all_gather runs meanwhile.

Every rank must call the same units in the same order and join them alike; inside a unit
each may use other parameters. What a unit computes must leave it by its output, where
backward enters it.

Chapter: parallelism/zero. References: Rajbhandari et al. 2020, SC20, arXiv:1910.02054;
Zhao et al. 2023, PyTorch FSDP, PVLDB 16(12):3848-3860, arXiv:2304.11277.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves, tree_map_only

from labpkg.processes.flat import is_empty, shard_of
from labpkg.processes.in_place import all_reduce_
from labpkg.processes.replicas import (
    GradientHook,
    broadcast_state,
    require_same_model,
)
from labpkg.processes.step_guard import guard_steps
from labpkg.processes.units import (
    Reduction,
    Unit,
    changed,
    checked_units,
    default_units,
    members_of_units,
    require_plain_autograd,
    require_shardable,
    tensors_in,
)

_Model = TypeVar("_Model", bound=nn.Module)


def fully_shard(
    model: _Model,
    mesh: DeviceMesh,
    *,
    units: Iterable[nn.Module] | None = None,
    reshard_after_forward: bool = True,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> _Model:
    """Shard parameters, gradients and optimizer state over a mesh axis (ZeRO stage 3).

    The model is changed in place. Names stay; `model.parameters()` yields this rank's
    flat slices (possibly empty), see `shard_of`. After `backward()` their `.grad` is
    the slice of the mean gradient over the ranks, None where no rank used the
    parameter. So any elementwise optimizer, made afterwards, trains its part alone. One
    that looks at whole parameters, such as Adafactor, LARS or LBFGS, raises a
    ValueError at its first step.

    Call the model itself: only that gathers its parameters, each for its unit alone. So
    what reads the weight of another module must lie in one unit with it. Make changes
    to the model (dtype, device, more layers) before; copies and pickles of a sharded
    model are refused. One on "meta" gets memory for its slices, and no values:
    `materialize` gives them, so that no rank ever holds the whole.

    Args:
        model: The model; each rank may start from another seed, rank 0 wins.
        mesh: The data-parallel axis, such as `mesh["dp"]`.
        units: Submodules whose parameters are gathered together; they may be nested.
            By default the elements of every outermost nn.ModuleList and nn.Sequential.
            What is left, and what several units share, belongs to the model itself.
        reshard_after_forward: Free a unit after its forward pass. False keeps it until
            its backward pass has ended: more memory, a third less communication.
        param_dtype: Gather and compute in this dtype, such as `torch.bfloat16`; the
            slices keep theirs. Inputs of units are cast to it.
        reduce_dtype: Dtype in which gradients travel; by default that of the compute.
        deterministic: Add gradients in rank order; see `all_reduce`.

    Returns:
        The same model.

    Raises:
        ValueError: If the model has no parameters or fewer elements than the axis has
            ranks, if it is on another device than the mesh, if a parameter has an
            engine already, if a unit is no submodule, if the mesh has several axes, or
            if the ranks' models differ.

    Communication: with P bytes, 2 P gathered and P reduced-scattered per forward and
    backward, 3 (n - 1) / n P per rank; without `reshard_after_forward` P less; and one
    byte per trained parameter.

    Reference: Rajbhandari et al. 2020, ZeRO, SC20, arXiv:1910.02054.
    """
    require_shardable(model, mesh)
    modules = default_units(model) if units is None else checked_units(model, units)
    require_same_model(model, mesh)
    broadcast_state((*model.parameters(), *model.buffers()), mesh)
    engine = _FullyShard(mesh, reshard_after_forward, param_dtype, deterministic)
    for module, members in members_of_units(model, modules).items():
        engine.add(module, Unit(members, mesh, param_dtype, reduce_dtype))
    guard_steps()
    return model


class _FullyShard:
    """The engine: hooks on the units call it, and it moves parameters and gradients.

    # Note [when backward enters and leaves a unit]
    The engine of autograd runs nodes in the reverse order of their creation. So the
    node that made an output of a unit runs before all of the unit's own nodes that need
    parameters, and the node that made an input runs after them. A hook before the first
    gathers the unit, a hook on the input reduces and frees it, on every rank at the
    same place between the other collectives, whichever parameters it used. The hook on
    a tensor runs before those of its node: unit k is freed before k - 1 is entered.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        reshard: bool,
        param_dtype: torch.dtype | None,
        deterministic: bool,
    ) -> None:
        self._mesh, self._reshard = mesh, reshard
        self._param_dtype, self._deterministic = param_dtype, deterministic
        self._units: list[Unit] = []
        self._ahead: Unit | None = None  # gathered for the next computation
        self._stack: list[int] = []  # in forward: root, unit, unit inside it
        self._order: list[Unit] = []  # units in the last forward
        self._calls: list[Unit] = []  # and in this one
        self._tape: list[tuple[int, ...]] = []  # stacks that backward will enter
        self._task: int | None = None  # of autograd, in backward
        self._used: set[nn.Parameter] = set()
        self._flying: list[Reduction] = []  # of one unit
        self._landed: list[Reduction] = []  # their slices

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a fully sharded model cannot be copied or pickled, since each rank holds "
            "slices only; save its full state_dict, build a new model and load it"
        )

    def add(self, module: nn.Module, unit: Unit) -> None:
        """Take charge of a unit; the first is the root."""
        number = len(self._units)
        self._units.append(unit)
        for group in unit.groups:
            for i in range(len(group.full) if group.is_trained else 0):
                hook = self._hook(_FullyShard._take, group.sliced[i])
                group.full[i].register_post_accumulate_grad_hook(hook)
                # So that no other engine takes the slice for a parameter.
                owned = self._hook(_FullyShard._own)
                group.sliced[i].register_post_accumulate_grad_hook(owned)
        before = partial(self._before, number)
        module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        module.register_forward_hook(partial(self._after, number), always_call=True)

    def _hook(self, step: Callable[..., None], *place: Any) -> GradientHook:
        hook = GradientHook(self, step, *place)
        hook.name = "fully_shard"
        return hook

    def accumulated(self, step: Callable[..., None], *place: Any) -> None:
        """Do what a hook of autograd asks for; see `GradientHook`."""
        step(self, *place)

    def _own(self) -> None:
        """Leave alone what a penalty on the slices themselves gave them."""

    def _before(self, number: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        require_plain_autograd()
        unit, following = self._units[number], None
        recomputes = self._in_backward()
        if number == 0 and not recomputes and self._stack:
            self._leave_all()  # a forward pass that an interrupt broke off
            self._stack.clear()
        self._stack.append(number)
        if not recomputes:
            if len(self._stack) == 1:
                self._begin(module if number == 0 else None)
            following = self._expected(unit)
        self._gather(unit, following)
        unit.enter()
        if self._param_dtype is not None:
            args, kwargs = tree_map_only(Tensor, self._cast, (args, kwargs))
        if torch.is_grad_enabled():
            hook = self._hook(_FullyShard._leave, number)
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, Tensor) and x.grad_fn is not None:
                    x.register_hook(hook)
        return args, kwargs

    def _after(self, number: int, _: nn.Module, __: Any, output: Any) -> None:
        unit = self._units[number]
        if number not in self._stack:
            return
        while self._stack.pop() != number:
            pass
        tensors = list(tensors_in(output))
        nodes = [x.grad_fn for x in tensors if x.grad_fn is not None]
        nodes = nodes if torch.is_grad_enabled() else []
        is_inner = bool(self._stack) and not self._in_backward()
        if not unit.in_backward and number not in self._stack:
            unit.hide() if is_inner else unit.leave()
            if self._reshard or not nodes:
                unit.free()
        if nodes:
            self._tape.append((*self._stack, number))
            place = (self._tape, len(self._tape) - 1, unit.version())
            hook = self._hook(_FullyShard._enter, *place)
            for node in nodes:
                node.register_prehook(hook)
        if not self._stack and not self._in_backward():
            self._order = self._calls if number == 0 else self._order
            self._drop_ahead()
            self._leave_all()
        unit.require_none_of(tensors)

    def _leave_all(self) -> None:
        for unit in self._units:
            unit.leave()

    def _in_backward(self) -> bool:
        return self._task is not None and self._task == _autograd_task()

    def _begin(self, root: nn.Module | None) -> None:
        """Start a forward pass from a clean state."""
        if self._task is not None:
            raise RuntimeError(
                "the last backward pass did not end, so ranks may disagree about what "
                "was reduced; restart from a checkpoint"
            )
        self._check(root)
        for unit in self._units:
            unit.hide()
            unit.free()
        self._ahead, self._calls, self._tape = None, [], []

    def _check(self, root: nn.Module | None) -> None:
        for unit in self._units:
            unit.require_intact()
        if root is not None:
            for name, parameter in root.named_parameters():
                if shard_of(parameter) is None:
                    raise changed(name, "added")
                if is_empty(parameter):
                    raise ValueError(
                        f"{name} was built on 'meta' and has no values; call "
                        "materialize(model) before the first forward"
                    )

    def _expected(self, unit: Unit) -> Unit | None:
        """Return the unit that came next in the last forward pass."""
        i = len(self._calls)
        self._calls.append(unit)
        here, following = self._order[i : i + 1], self._order[i + 1 : i + 2]
        return following[0] if following and here[0] is unit else None

    def _gather(self, unit: Unit, following: Unit | None) -> None:
        """Start a unit, start the following one, and wait for the first."""
        if self._ahead is not unit:
            self._drop_ahead()
        self._ahead = None
        unit.start()
        if following is not None and not following.is_gathered():
            following.start()
            self._ahead = following

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.free()
            self._ahead = None

    def _join_backward(self) -> None:
        if self._task is None:
            self._task = _autograd_task()
            # Runs when the whole backward pass has ended.
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        elif not self._in_backward():
            raise RuntimeError(
                "a backward pass inside another, as reentrant checkpointing makes, or "
                "after one that broke off; use checkpoint(..., use_reentrant=False), "
                "or restart from a checkpoint"
            )

    def _enter(self, tape: list[tuple[int, ...]], i: int, version: int) -> None:
        """Gather a unit for its backward pass, and then the one before it."""
        self._join_backward()
        *around, unit = (self._units[number] for number in tape[i])
        if unit.in_backward:  # by another of its outputs
            return
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a backward pass with create_graph=True would keep whole parameters "
                "that are freed; use DataParallel for gradients of gradients"
            )
        if unit.version() != version:
            raise RuntimeError(
                "parameters were changed between a forward pass and its backward "
                "pass, so gradients would be those of another model; step afterwards"
            )
        for outer in around:  # not yet, if the loss leaves out its output
            self._open(outer, None)
        self._open(unit, self._units[tape[i - 1][-1]] if i else None)

    def _open(self, unit: Unit, following: Unit | None) -> None:
        if not unit.in_backward:
            unit.in_backward = True
            self._gather(unit, following)
            unit.enter()

    def _take(self, sliced: nn.Parameter) -> None:
        """Remember that this rank has a gradient."""
        self._join_backward()
        self._used.add(sliced)

    def _leave(self, number: int) -> None:
        if self._units[number].in_backward:
            self._close(self._units[number])

    def _close(self, unit: Unit) -> None:
        """End the backward pass of a unit: free parameters, reduce gradients."""
        unit.in_backward = False
        unit.leave()
        unit.free()
        self._land()  # what flew while this unit computed
        self._flying = [
            group.reduce(deterministic=self._deterministic)
            for group in unit.groups
            if group.is_trained
        ]

    def _land(self) -> None:
        for reduction in self._flying:
            reduction.wait()
        self._landed += self._flying
        self._flying = []

    @torch.no_grad()
    def _finish(self) -> None:
        """End the backward pass: reduce what is left and deliver all gradients."""
        for unit in self._units:
            if unit.in_backward or any(g.has_gradients() for g in unit.groups):
                self._close(unit)
        trained = [
            p for u in self._units for g in u.groups if g.is_trained for p in g.sliced
        ]
        if trained:
            used = self._agree(trained)
            self._land()
            for reduction in self._landed:
                reduction.deliver(used)
        self._landed.clear()
        self._used.clear()
        self._drop_ahead()
        self._task = None

    def _agree(self, trained: list[nn.Parameter]) -> set[nn.Parameter]:
        """Return the parameters that any rank used; see `Note [used flags]`."""
        mine = [p in self._used for p in trained]
        flags = torch.tensor(mine, dtype=torch.uint8, device=trained[0].device)
        all_reduce_(flags, self._mesh, op="max").wait()
        if all(mine):  # nothing to read, which a GPU would have to wait for
            return self._used
        return {p for p, flag in zip(trained, flags.tolist(), strict=True) if flag}

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self._param_dtype) if x.is_floating_point() else x


def _autograd_task() -> int:
    """Return the number of the backward pass that runs here, or -1."""
    return torch._C._current_graph_task_id()
