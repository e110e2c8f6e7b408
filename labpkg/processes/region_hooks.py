"""Hooks that let a module border on a tensor-parallel region, its code unchanged.

`Border` changes what enters or leaves a module, `Region` lets layers inside share an
entry, `RankRandom` gives a module random numbers of its own on each rank,
`SumGradients` completes the gradients of one that sees a slice of the activations. A
deep copy of the model keeps them, on the same axis.

Chapter: parallelism/tensor_parallel. References: Shoeybi et al. 2019, arXiv:1909.08053;
Korthikanti et al. 2022, arXiv:2205.05198.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from labpkg.processes.in_place import all_reduce_

Operator = Callable[[Tensor, DeviceMesh], Tensor]
Args = tuple[Any, ...]
Options = dict[str, Any]


class _Hook:
    """What a hook keeps; a copied module keeps the hook itself."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def __deepcopy__(self, memo: dict) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a model that is cut over ranks is no object to save; save what "
            "full_state_dict(model) returns"
        )


class Border(_Hook):
    """Change the first input of a module, or its output.

    Args:
        mesh: The tensor-parallel axis.
        change: An operator of `regions`.
    """

    def __init__(self, mesh: DeviceMesh, change: Operator) -> None:
        super().__init__(mesh)
        self.change = change

    def before(self, module: nn.Module) -> None:
        """Change the first input of each forward.

        Args:
            module: Whose.
        """
        module.register_forward_pre_hook(self._enter, with_kwargs=True)

    def after(self, module: nn.Module) -> None:
        """Change the output of each forward.

        Args:
            module: Whose.
        """
        module.register_forward_hook(self._leave)

    def _enter(
        self, module: nn.Module, args: Args, options: Options
    ) -> tuple[Args, Options]:
        if args:
            return (self._changed(module, args[0]), *args[1:]), options
        first = next(iter(options), None)
        value = self._changed(module, options.get(first, None) if first else None)
        return args, {**options, str(first): value}

    def _leave(self, module: nn.Module, args: Args, output: Any) -> Tensor:
        return self._changed(module, output)

    def _changed(self, module: nn.Module, x: Any) -> Tensor:
        if not isinstance(x, Tensor):
            raise ValueError(
                f"a plan changes the first input or the output of {type(module)}, "
                f"which is a {type(x).__name__} and no tensor; name a module inside or "
                "around it"
            )
        return self.change(x, self.mesh)


class Region(_Hook):
    """Let layers inside a module that get the same tensor enter it once.

    Only these layers see what has entered. Whatever else the module does with the
    tensor, such as a residual sum, has its whole gradient already.

    Args:
        mesh: The tensor-parallel axis.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__(mesh)
        self.open: list[dict[Hashable, tuple[Tensor, Tensor]]] = []

    def around(self, module: nn.Module) -> None:
        """Share in each forward.

        Args:
            module: Around the layers.
        """
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def entered(self, x: Tensor, enter: Operator) -> Tensor | None:
        """Return what an operator makes of an input; None outside of the module.

        Args:
            x: The input of a layer.
            enter: `f` or `f_sequence`.
        """
        if not self.open:
            return None
        known, key = self.open[-1], (id(x), enter, torch.is_grad_enabled())
        if key not in known:
            known[key] = x, enter(x, self.mesh)  # keeps x, or another gets its id
        return known[key][1]

    def _enter(self, module: nn.Module, args: Args) -> None:
        self.open.append({})

    def _leave(self, module: nn.Module, args: Args, output: Any) -> None:
        self.open.pop()


class RankRandom(_Hook):
    """Let a module in training draw other random numbers on each rank.

    One number from the default generator, equal on all ranks, seeds a generator for
    this forward alone, by rank. So nothing is kept, and a forward that is repeated by
    activation checkpointing from the same state draws the same.

    Args:
        mesh: The tensor-parallel axis.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__(mesh)
        self.open: list[AbstractContextManager[None] | None] = []

    def around(self, module: nn.Module) -> None:
        """Draw so in each forward in training.

        Args:
            module: Whose.
        """
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: Args) -> None:
        if not module.training:
            self.open.append(None)
            return
        seed = int(torch.randint(2**62, (), device="cpu")) + self.mesh.get_local_rank()
        is_cuda = self.mesh.device_type == "cuda"
        devices = [torch.cuda.current_device()] if is_cuda else []
        context = torch.random.fork_rng(devices)
        context.__enter__()
        self.open.append(context)
        torch.default_generator.manual_seed(seed)
        if is_cuda:
            torch.cuda.manual_seed(seed)

    def _leave(self, module: nn.Module, args: Args, output: Any) -> None:
        context = self.open.pop() if self.open else None
        if context is not None:
            context.__exit__(None, None, None)


class SumGradients(_Hook):
    """Add up over the ranks the gradients of parameters that see a slice only.

    The hook is the tensor's, not one for accumulated gradients: each backward adds the
    sum of its own parts, whatever is there already.

    Args:
        mesh: The tensor-parallel axis.
        names: Which parameters, as the module calls them.
    """

    def __init__(self, mesh: DeviceMesh, names: Sequence[str]) -> None:
        super().__init__(mesh)
        self.names = names

    def around(self, module: nn.Module) -> None:
        """Add up from now on.

        Args:
            module: Whose parameters.
        """
        self._enter(module, ())
        # A copied, or newly assigned, parameter has no hooks: look before each forward.
        module.register_forward_pre_hook(self._enter)

    def _enter(self, module: nn.Module, args: Args) -> None:
        for name in self.names:
            parameter: Any = module.get_parameter(name)
            if not (parameter.is_meta or hasattr(parameter, "_labpkg_is_summed")):
                parameter._labpkg_is_summed = True
                is_trained = parameter.requires_grad
                parameter.requires_grad_(True)  # a frozen one takes no hook
                parameter.register_hook(self._sum)
                parameter.requires_grad_(is_trained)

    def _sum(self, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        all_reduce_(total, self.mesh).wait()
        return total
