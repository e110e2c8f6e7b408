"""ZeRO stages 1 and 2: every rank updates its slice of the parameters, and only that.

Replicated training stores the optimizer's state n times and computes the same update n
times. Here gradients are reduce-scattered instead of all-reduced, so each rank gets the
mean of its own slice; it updates this slice with its share of the state and gathers the
rest of the weights from its peers. Reduce-scatter and all-gather together send what one
all-reduce sends. Stage 1 keeps the buffer of all gradients, stage 2 frees each bucket
once it is reduced. (Stage 3, which cuts the weights as well, is `fsdp`.)

The result is exact for optimizers that update each element by itself, such as SGD and
Adam: it does not matter to them how parameters are cut.

Chapter: parallelism/zero. Reference: Rajbhandari et al. 2020, ZeRO: Memory
Optimizations Toward Training Trillion Parameter Models, SC20, arXiv:1910.02054.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from labpkg.foundations.optimizers import elementwise_defaults
from labpkg.processes.in_place import all_reduce_
from labpkg.processes.replicas import GradientHook, broadcast_state
from labpkg.processes.zero_bucket import (
    ZeroBucket,
    buckets_in_order,
    require_trainable,
    trainable_in,
)

_BUCKET_BYTES = {1: 25 * 2**20, 2: 8 * 2**20}  # stage 2 frees one at a time
_MOST_IN_FLIGHT = 1  # buckets of gradients that stage 2 keeps while they are reduced
_NO_OPTIONS = ("params", "param_names")


class ZeroOptimizer(Optimizer):
    """Any elementwise torch optimizer with its state cut over a mesh axis.

    Backward averages the gradients over the ranks itself: no `DataParallel` around the
    model. Afterwards every `p.grad` is None; the mean gradient lies in slices,
    `shard_of(p).local.grad`, which `clip_grad_norm` and `full_gradients` know.
    `zero_grad` of this optimizer clears it, `model.zero_grad()` does not reach it.

    State per rank: S / n instead of S. Stage 1 keeps a buffer for all gradients, stage
    2 only this rank's slice between backward passes. A parameter that no rank used is
    not updated; every rank must reach at least one in every backward pass (add
    `0 * p.sum()` to a loss that may reach none). The parameters are overwritten with
    those of rank 0; buffers, and parameters that are not given, must be equal already.

    Args:
        params: Parameters, named parameters or groups, as for `cls`. Frozen ones stay.
        cls: The optimizer's class, such as `torch.optim.AdamW`.
        mesh: The data-parallel axis.
        stage: 1 or 2.
        bucket_bytes: Size at which a bucket of gradients is closed and sent; by default
            25 MiB at stage 1, and 8 MiB at stage 2, where less is kept at once.
        deterministic: Add gradients in rank order on every backend.
        kwargs: Options of `cls`.

    Raises:
        ValueError: If `stage` is neither 1 nor 2, if `cls` is not elementwise, if the
            mesh has several axes or more ranks than there are elements, if a parameter
            is given twice, has an engine already or lies elsewhere, or if the ranks'
            parameters differ.

    Communication: per step a reduce_scatter of the gradients and an all_gather of the
    weights, 2 (n - 1) / n of the parameters' bytes per rank, as data parallelism; and
    one byte per parameter that tells whether any rank used it. `zero_bytes` counts.

    Reference: Rajbhandari et al. 2020, SC20, arXiv:1910.02054.
    """

    def __init__(
        self,
        params: Any,
        cls: type[Optimizer],
        mesh: DeviceMesh,
        *,
        stage: int,
        bucket_bytes: int | None = None,
        deterministic: bool = False,
        **kwargs: Any,
    ) -> None:
        if bucket_bytes is None:
            bucket_bytes = _BUCKET_BYTES.get(stage, 1)
        if stage not in _BUCKET_BYTES or bucket_bytes < 1:
            raise ValueError(
                f"stage={stage}, bucket_bytes={bucket_bytes}: ZeroOptimizer has stages "
                "1 and 2 and buckets of at least one byte; stage 3 is fully_shard"
            )
        defaults = elementwise_defaults(cls, kwargs, device=mesh.device_type)
        super().__init__(params, defaults)
        for group in map(_options, self.param_groups):
            elementwise_defaults(cls, kwargs, group=group, device=mesh.device_type)
        trainable = require_trainable(self.param_groups, mesh)
        self.stage, self._mesh, self._deterministic = stage, mesh, deterministic
        plan = buckets_in_order(trainable, bucket_bytes)
        self._groups = [group for _, group in plan]  # of each bucket
        self._buckets = [
            ZeroBucket(parameters, mesh, keeps_gradient=stage == 1)
            for parameters, _ in plan
        ]
        given = [p for group in self.param_groups for p in group["params"]]
        frozen = [p for p in given if not p.requires_grad]
        broadcast_state([*(b.weights for b in self._buckets), *frozen], mesh)
        self.inner = cls(
            [
                {
                    "params": [s.local for s in bucket.shards if s.local.numel()],
                    **_options(self.param_groups[group]),
                }
                for bucket, group in zip(self._buckets, self._groups, strict=True)
            ],
            **kwargs,
        )
        self.syncs, self._is_consumed = True, False
        self._num_launched, self._in_backward = 0, False
        for number, bucket in enumerate(self._buckets):
            for i, p in enumerate(bucket.parameters):
                hook = GradientHook(self, number, i)
                p.register_post_accumulate_grad_hook(hook)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a copy of a ZeroOptimizer would average nothing; save its "
            "full_state_dict, make a new one and load it"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take a group at construction; refuse it later: the slices are cut.

        Args:
            param_group: As in torch.

        Raises:
            ValueError: Once the optimizer is made.
        """
        if hasattr(self, "_buckets"):
            raise ValueError(
                "the parameters are cut already, so a group cannot be added; make a "
                "new ZeroOptimizer with all of them"
            )
        super().add_param_group(param_group)

    def accumulated(self, number: int, i: int) -> None:
        """Take the gradient of a parameter; its hook calls this.

        Args:
            number: The bucket.
            i: The parameter in the bucket.

        Raises:
            RuntimeError: If the gradient comes twice, or if the last one is still
                there though it was used.
        """
        if not self.syncs:
            return  # autograd adds it up in p.grad
        bucket = self._buckets[number]
        if i in bucket.ready:
            raise RuntimeError(
                "a parameter received its gradient twice: in one backward pass, as "
                "with reentrant checkpointing (use_reentrant=False avoids it), or "
                "after one that broke off (restart from a checkpoint)"
            )
        if not self._in_backward:
            self._begin_backward()
        bucket.take(i)
        while self._next_is_ready():
            self._launch_next()

    def _begin_backward(self) -> None:
        self._require_cleared()
        self._in_backward = True
        # Runs when the whole backward pass has ended.
        torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _require_cleared(self) -> None:
        if self._is_consumed:
            raise RuntimeError(
                "the gradients of the last step are still there and would be added to; "
                "call zero_grad() of the optimizer (the model's does not reach them)"
            )

    def _next_is_ready(self) -> bool:
        # Buckets leave in one order on every rank, whatever order gradients come in.
        if self._num_launched == len(self._buckets):
            return False
        bucket = self._buckets[self._num_launched]
        return len(bucket.ready) == len(bucket.parameters)

    def _launch_next(self) -> None:
        self._buckets[self._num_launched].launch(self._deterministic)
        self._num_launched += 1
        if self.stage == 2 and self._num_launched > _MOST_IN_FLIGHT:
            self._buckets[self._num_launched - 1 - _MOST_IN_FLIGHT].collect()

    def _finish(self) -> None:
        while self._num_launched < len(self._buckets):
            self._launch_next()
        used = self._used_by_any_rank()
        for bucket in self._buckets:
            bucket.collect()
            bucket.publish([used.pop(0) for _ in bucket.parameters])
        self._num_launched, self._in_backward = 0, False

    def _used_by_any_rank(self) -> list[bool]:
        own = [i in b.ready for b in self._buckets for i in range(len(b.parameters))]
        device = self._buckets[0].weights.device
        flags = torch.tensor(own, dtype=torch.uint8, device=device)
        all_reduce_(flags, self._mesh, op="max").wait()
        return own if all(own) else flags.bool().tolist()  # reading stalls a GPU

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Only accumulate gradients, whole ones, inside the block.

        The next backward outside of it, or `reduce_gradients`, reduces the sum: fewer
        bytes are sent, and more are stored. Without it each backward is reduced and
        added to the slices.
        """
        before, self.syncs = self.syncs, False
        try:
            yield
        finally:
            self.syncs = before

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Reduce what was accumulated under `no_sync`, without a backward pass.

        For gradients to which something is added after the last backward: stages of a
        `Pipeline` sum those of tied parameters, which takes whole ones. Every rank must
        call it, one without gradients too::

            with optimizer.no_sync():
                loss = pipeline.step(x, y)
            optimizer.reduce_gradients()

        Raises:
            RuntimeError: If the last backward pass broke off, or if the gradients of
                the last step are still there.

        Communication: as a backward pass, a reduce_scatter of the gradients.
        """
        self._require_ended()
        self._require_cleared()
        self._finish()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """Update this rank's slices, and fetch the others.

        A bucket travels while the next one is updated.

        Args:
            closure: Computes the loss again, as in torch.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: If the last backward pass broke off, or if gradients wait to
                be reduced.
            ValueError: If parameters were moved, cast, replaced or unfrozen.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._require_ready()
        self._pass_options()
        groups, works = self.inner.param_groups, []
        try:
            for group, bucket in zip(groups, self._buckets, strict=True):
                self.inner.param_groups = [group]
                self.inner.step()
                works.append(bucket.gather())
        finally:
            self.inner.param_groups = groups
            for work in works:
                work.wait()
        self._read_options()
        self._is_consumed = True
        return loss

    def _require_ended(self) -> None:
        if self._in_backward:
            raise RuntimeError(
                "the last backward pass did not end, so ranks may disagree about what "
                "was reduced; restart from a checkpoint"
            )

    def _require_ready(self) -> None:
        self._require_ended()
        for bucket in self._buckets:
            bucket.require_intact()
        num_cut = sum(len(bucket.parameters) for bucket in self._buckets)
        if num_cut != len(trainable_in(self.param_groups)):
            raise ValueError(
                "a parameter was frozen or unfrozen after ZeroOptimizer was made; make "
                "a new one after that"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, whole ones and slices.

        Args:
            set_to_none: Forget them instead of setting them to zero.
        """
        super().zero_grad(set_to_none)
        for bucket in self._buckets:
            for shard in bucket.shards:
                if set_to_none:
                    shard.local.grad = None
                elif shard.local.grad is not None:
                    shard.local.grad.zero_()
        self._is_consumed = False

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's slices of the state; for the same slices only.

        `full_state_dict(optimizer)` gathers what any number of ranks can load.
        """
        self._pass_options()
        return {"layout": self._layout(), **self.inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned on this rank.

        Args:
            state_dict: Slices of the state.

        Raises:
            ValueError: If they were cut for another rank, number of ranks or size of
                buckets.
        """
        given, own = state_dict.get("layout"), self._layout()
        if given != own:
            raise ValueError(
                f"the state was cut for [ranks, rank, elements of buckets] = {given}, "
                f"here they are {own}; save full_state_dict(optimizer)"
            )
        self.inner.load_state_dict(
            {k: v for k, v in state_dict.items() if k != "layout"}
        )
        self._read_options()

    def _layout(self) -> list[Any]:
        sizes = [bucket.layout.num_elements for bucket in self._buckets]
        return [self._mesh.size(), self._mesh.get_local_rank(), sizes]

    def _pass_options(self) -> None:
        """Hand on the options of the groups, which a scheduler may have changed."""
        for number, inner in zip(self._groups, self.inner.param_groups, strict=True):
            inner.update(_options(self.param_groups[number]))

    def _read_options(self) -> None:
        """Take over what loading or a step changed in the options of the groups."""
        for number, inner in zip(self._groups, self.inner.param_groups, strict=True):
            self.param_groups[number].update(_options(inner))


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in _NO_OPTIONS}
