"""Pipeline parallelism: ranks hold consecutive stages of a model, micro-batches pass.

One interpreter runs every schedule: each rank walks through its list of actions, takes
what an action needs from the neighbour stage, computes, and passes the result on. The
order of the actions is the schedule's business, and so is that no rank waits for ever.

A batch is cut into M micro-batches. Gradients accumulate over them, each loss divided
by M, so a step has the gradient of the mean over the batch: that of one process.

Chapter: parallelism/pipeline. References: Huang et al. 2019, GPipe, arXiv:1811.06965;
Narayanan et al. 2021, arXiv:2104.04473; Qi et al. 2024, arXiv:2401.10241.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from labpkg.planning.actions import Schedule
from labpkg.planning.simulator import Timeline
from labpkg.processes.clock import Clock
from labpkg.processes.cuts import Place, mark_place
from labpkg.processes.in_place import all_reduce_, broadcast_
from labpkg.processes.mail import Mailbox, OrderedMailbox, spec_of
from labpkg.processes.negotiation import (
    Call,
    StageInfo,
    agree_on_one,
    check_batch,
    inner,
    introduce,
    negotiate,
)
from labpkg.processes.ties import Ties
from labpkg.processes.traffic import axis_of
from labpkg.processes.transport import uses_gloo
from labpkg.processes.walk import Plan, Walk, has_trained, plan_of, reducers_of

LossFunction = Callable[[Tensor, Tensor], Tensor]


class Pipeline(nn.Module):
    """Train the stages of a model on the ranks of an axis, in the order of a schedule.

    Every rank makes the same calls with the same batch: `step` accumulates gradients,
    `evaluate` returns the loss, calling the pipeline returns the output. A parameter
    that several ranks hold, as tied embeddings are, starts equal and gets the sum of
    the gradients of all copies, bitwise the same. Freeze parameters before.

    A stage may be a `DataParallel`, which then reduces once per step. Stages of one
    rank that share a parameter take one around all, `DataParallel(nn.ModuleList(own),
    mesh["dp"])`, which broadcasts no buffers. With a `ZeroOptimizer` call `step` under
    its `no_sync` and then its `reduce_gradients`: one reduction, and ties are whole.

    The names of parameters are those of the model that `split_stages` cut. Stages of
    another origin whose names clash get `stages.<number>.` before them.

    Args:
        modules: The stage of this rank, or its stages in ascending order; each takes
            one tensor and returns one.
        schedule: Who does what, the same on every rank.
        mesh: The pipeline axis, such as `mesh["pp"]`.
        loss_fn: Mean loss of a micro-batch: (output, targets) -> a scalar.
        recompute: Keep only the input of a stage and run it forward again before its
            backward: memory of one micro-batch at a time for a third more work. Running
            statistics, such as those of BatchNorm, then count each micro-batch twice.
        record: Measure when each action runs; see `timeline`.

    Raises:
        ValueError: On every rank, if the schedule is one for another number of ranks or
            stages, if a rank has another number of modules or has them on another
            device, if the ranks cut the model differently, or if the mesh has several
            axes.

    Communication: the activations that pass between ranks, forward, and as many bytes
    of gradients, backward, once per micro-batch; an all_gather of one number, whether
    all ranks make the same call; an all_reduce of the loss; each holder of a tied
    parameter sends its gradient to each other holder.

    Reference:
        Narayanan et al. 2021, Efficient Large-Scale Language Model Training on GPU
        Clusters Using Megatron-LM, arXiv:2104.04473.
    """

    def __init__(
        self,
        modules: nn.Module | Iterable[nn.Module],
        schedule: Schedule,
        mesh: DeviceMesh,
        *,
        loss_fn: LossFunction,
        recompute: bool = False,
        record: bool = False,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(_stages(modules))
        self.mesh, self.schedule, self.loss_fn = mesh, schedule, loss_fn
        self.recompute, self.record = recompute, record
        self._axis = axis_of(mesh)
        infos = introduce(list(self.stages), schedule, mesh)
        own = schedule.stages_of(self._axis.rank)
        self._modules_of = dict(zip(own, self.stages, strict=True))
        self._prefixes, numbers = _names(infos)
        self._trains = [info.trains for info in infos.values()]
        self._reducers = reducers_of(modules, self._modules_of)
        self._ties = Ties(self._modules_of, numbers, schedule.rank_of, mesh)
        mark_place(self, Place(mesh))
        self._plans: dict[tuple, list[Plan]] = {}
        self._timeline: Timeline | None = None
        self._device = torch.device(mesh.device_type)
        if mesh.device_type == "cuda":
            self._device = torch.device("cuda", torch.cuda.current_device())
        # All ranks meet here first: messages between two would not open NCCL's channel.
        all_reduce_(torch.zeros(1, device=self._device), mesh).wait()
        self._ties.share()

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Run every micro-batch forward and backward; accumulate the mean's gradient.

        Args:
            x: The batch (B, ...), B a multiple of M; the same on every rank.
            y: Its targets (B, ...).

        Returns:
            The mean loss, on every rank, without gradient.

        Raises:
            ValueError: On every rank, if M does not divide B, if ranks make different
                calls or have batches of different shapes, if a stage does not take what
                the one before returns, if a tied parameter is cut by ZeRO, if a stage
                was frozen before, if x or y needs a gradient, or if gradients are
                disabled.
        """
        plan, xs, ys = self._prepare(x, y, backward=True)
        self._ties.put_aside()
        clock = Clock(self.mesh) if self.record else None
        losses = self._walk(plan, xs, ys, clock)
        loss, num_users = self._share_loss(plan, losses, self._ties.used)
        self._ties.sum_gradients(num_users)
        if clock is not None:
            self._timeline = clock.timeline()
        return loss

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss over the micro-batches; run F only, without gradients.

        Args:
            x: The batch (B, ...), B a multiple of M; the same on every rank.
            y: Its targets (B, ...).

        Returns:
            The mean loss, on every rank.

        Raises:
            ValueError: As `step`.
        """
        plan, xs, ys = self._prepare(x, y)
        return self._share_loss(plan, self._walk(plan, xs, ys), [])[0]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the model on every rank; run F only, without gradients.

        Args:
            x: The batch (B, ...), B a multiple of M; the same on every rank.

        Returns:
            What the last stage returns, for the whole batch.

        Raises:
            ValueError: As `step`.

        Communication: also a broadcast of the output.
        """
        plan, xs, _ = self._prepare(x, None)
        outputs = self._walk(plan, xs, None)
        result = plan.shapes.result
        shape = (len(xs) * result.shape[0], *result.shape[1:])
        out = torch.empty(shape, dtype=result.dtype, device=self._device)
        if outputs:
            torch.cat(outputs, out=out)
        broadcast_(out, self.mesh, src=self.schedule.rank_of(plan.last)).wait()
        return out

    @property
    def timeline(self) -> Timeline:
        """When each rank did what in the latest step, in seconds.

        Raises:
            ValueError: If there is no step yet, or without `record`.
        """
        if self._timeline is None:
            raise ValueError(
                "no step has been measured; pass record=True and call step first"
            )
        return self._timeline

    def _walk(
        self,
        plan: Plan,
        xs: list[Tensor],
        ys: list[Tensor] | None,
        clock: Clock | None = None,
    ) -> list[Tensor]:
        """Walk through the actions and return the results of the last stage."""
        has_tags = uses_gloo(self._axis.group, self._device)
        kind = Mailbox if has_tags else OrderedMailbox
        mail = kind(plan.route, plan.shapes.inputs, len(xs), self.mesh, self._device)
        finish = lambda out, m: out if ys is None else self.loss_fn(out, ys[m])
        walk = Walk(
            plan,
            self._modules_of,
            mail,
            xs,
            finish,
            reducers=self._reducers if torch.is_grad_enabled() else (),
            recompute=self.recompute,
            clock=clock,
        )
        walk.run()
        return [result for _, result in sorted(walk.results.items())]

    def _prepare(
        self, x: Tensor, y: Tensor | None, *, backward: bool = False
    ) -> tuple[Plan, list[Tensor], list[Tensor] | None]:
        """Check the call on all ranks, cut the batch, and agree on shapes if new."""
        call = agree_on_one(lambda: self._check(x, y, backward), self.mesh)
        M, kind = self.schedule.num_micro_batches, call[:4]
        xs, ys = list(x.chunk(M)), None if y is None else list(y.chunk(M))
        if kind not in self._plans:
            self._plans[kind] = self._plan(xs[0], None if ys is None else ys[0])
        return self._plans[kind][backward], xs, ys

    def _check(self, x: Tensor, y: Tensor | None, backward: bool) -> Call:
        """Return what is called for; refuse what cannot be done."""
        device = self._device.type
        check_batch(x, y, self.schedule.num_micro_batches, device, backward=backward)
        for stage, module in self._modules_of.items():
            if not self._trains[stage] and has_trained(module):
                raise ValueError(
                    f"stage {stage} was frozen when the pipeline was made and is not "
                    "now; make a new Pipeline after unfreezing"
                )
        if backward:
            self._ties.require_whole()
        cast = torch.get_autocast_dtype(device)
        return Call(
            spec_of(x),
            None if y is None else spec_of(y),
            cast if torch.is_autocast_enabled(device) else None,
            self.training,
            backward,
            self.record,
        )

    def _plan(self, x: Tensor, y: Tensor | None) -> list[Plan]:
        """Agree on shapes; return what to do without gradients, and with them."""
        finish = lambda out: out if y is None else self.loss_fn(out, y)
        num_stages = self.schedule.num_stages
        shapes = negotiate(self._modules_of, num_stages, x, finish, self.mesh)
        if (shapes.result.shape == ()) != (y is not None):
            what = "the last stage returns" if y is None else "loss_fn returns"
            raise ValueError(
                f"{what} {shapes.result}; a loss is one number of shape (), and an "
                "output has a row for each sample"
            )
        place = self.schedule, self._axis.rank, shapes, self._trains
        return [plan_of(*place, with_backward=b) for b in (False, True)]

    def _share_loss(
        self, plan: Plan, losses: list[Tensor], used: list[bool]
    ) -> tuple[Tensor, list[float]]:
        """Return the mean loss on all ranks, and how many of them say yes to each."""
        dtype = plan.shapes.result.dtype
        numbers = torch.tensor(
            [0.0, *map(float, used)],
            dtype=torch.promote_types(dtype, torch.float32),
            device=self._device,
        )
        if losses:
            numbers[0] = torch.stack(losses).to(numbers.dtype).mean()
        all_reduce_(numbers, self.mesh).wait()
        return numbers[0].to(dtype), numbers[1:].tolist() if used else []

    def named_modules(
        self,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Generator:
        """Yield the pipeline and its stages, all under the pipeline's name.

        Args:
            memo: Modules that were met before.
            prefix: The pipeline's name.
            remove_duplicate: Yield a module that is used twice once.
        """
        memo = set() if memo is None else memo
        if self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self
            for stage, module in self._modules_of.items():
                name = ".".join(filter(None, (prefix, self._prefixes[stage])))
                yield from module.named_modules(memo, name, remove_duplicate)

    def state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        *,
        destination: Any = None,
        prefix: str = "",
        keep_vars: bool = False,
    ) -> dict[str, Any]:
        """Return the state of this rank's stages under the names of the whole model.

        Args:
            destination: Where to add it.
            prefix: What to put before the names.
            keep_vars: Return parameters themselves.
        """
        if destination is None:
            destination = OrderedDict()
            destination._metadata = OrderedDict()  # versions, for layers that change
        for stage, module in self._modules_of.items():
            name = self._prefixes[stage]
            module.state_dict(
                destination=destination,
                prefix=f"{prefix}{name}." if name else prefix,
                keep_vars=keep_vars,
            )
        return destination

    def load_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False
    ) -> None:
        """Load what `state_dict` returned on this rank.

        Args:
            state_dict: The state of this rank's stages.
            strict: Refuse names that are missing or too many.
            assign: Use the tensors themselves.

        Raises:
            RuntimeError: If names or shapes do not fit.
        """
        unknown = set(state_dict) - set(self.state_dict())
        if strict and unknown:
            raise RuntimeError(
                f"no stage of this rank has {sorted(unknown)}; load what state_dict() "
                "returned on this rank, or pass strict=False"
            )
        versions = getattr(state_dict, "_metadata", None) or {}
        for stage, module in self._modules_of.items():
            name = self._prefixes[stage]
            start = f"{name}." if name else ""
            own = {start + key for key in module.state_dict()}
            part = OrderedDict(
                (k.removeprefix(start), v) for k, v in state_dict.items() if k in own
            )
            vars(part)["_metadata"] = {
                key.removeprefix(start) if key != name else "": version
                for key, version in versions.items()
                if f"{key}.".startswith(start)
            }
            module.load_state_dict(part, strict=strict, assign=assign)


def _stages(modules: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    if not isinstance(modules, nn.Module):
        return list(modules)
    inside = inner(modules)
    return list(inside) if isinstance(inside, nn.ModuleList) else [modules]


def _names(
    infos: dict[int, StageInfo],
) -> tuple[dict[int, str], dict[int, dict[str, int]]]:
    """Return a prefix for each stage, and a number for each parameter by its name."""
    if all(info.part is not None for info in infos.values()):
        numbers = {
            stage: {name: p.number for name, p in info.parameters.items()}
            for stage, info in infos.items()
        }
        return dict.fromkeys(infos, ""), numbers  # pyright: ignore
    counter = iter(range(sum(len(info.parameters) for info in infos.values())))
    numbers = {
        stage: {name: next(counter) for name in info.parameters}
        for stage, info in infos.items()
    }
    names = [name for info in infos.values() for name in info.parameters]
    clash = len(set(names)) < len(names)
    return {s: f"stages.{s}" if clash else "" for s in infos}, numbers
