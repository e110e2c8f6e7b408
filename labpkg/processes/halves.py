"""Backward in two halves: first the gradient of the input, later those of the weights.

The stage before waits for the gradient of the input, and nobody waits for those of the
weights; a schedule that does the latter where it would idle has a smaller bubble. The
cost of a linear layer is two matrix products of equal size, one for each half, and that
is where the time of most models goes: inside `DeferWeights` each `F.linear` puts its
second product off. All other parameters get their gradient in the first half.

Chapter: parallelism/pipeline. Reference: Qi et al. 2024, Zero Bubble Pipeline
Parallelism, arXiv:2401.10241.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Product(NamedTuple):
    """A product that was put off: the gradient of a linear layer's parameters.

    Attributes:
        weight: The weight (F, D).
        bias: The bias (F,), or None if there is none to train.
        x: What the layer took, (..., D).
        gradient: Gradient of what it returned, (..., F).
    """

    weight: Tensor
    bias: Tensor | None
    x: Tensor
    gradient: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        """What gets a gradient."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]


class DeferWeights(TorchFunctionMode):
    """Put off the weight gradients of linear layers that run forward inside the block.

    Backward through them appends to a list; `finish_weights` computes what is in it.
    Backward belongs inside the block as well, because a checkpoint runs layers forward
    once more there. It starts from a `GradientEdge`: given a tensor, torch would leave
    the block.

    Args:
        products: Where backward puts them.

    Attributes:
        num_layers: How many layers have run.
    """

    def __init__(self, products: list[Product]) -> None:
        super().__init__()
        self._products, self.num_layers = products, 0
        # Needs a gradient, so that outputs do, but gets none. The weight could stand
        # here, but its hooks would run without a gradient.
        self._anchor = torch.zeros((), requires_grad=True)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Replace `F.linear` where a weight is trained."""
        if func is F.linear:
            layer = _layer(*args, **(kwargs or {}))
            if layer is not None:
                return self._linear(*layer)
        return func(*args, **(kwargs or {}))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        trained = bias if bias is not None and bias.requires_grad else None
        tensors = [x, weight.detach()] + ([] if bias is None else [bias.detach()])
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            # Autocast leaves float64 as it is.
            tensors = [t if t.dtype == torch.float64 else t.to(dtype) for t in tensors]
        self.num_layers += 1
        return _Linear.apply(  # pyright: ignore[reportReturnType]
            self._anchor, (weight, trained), self._products, *tensors
        )


def _layer(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return the arguments of `F.linear`, or None where it must stay as it is."""
    is_trained = type(weight) is nn.Parameter and weight.requires_grad
    can_wait = is_trained and (bias is None or bias.is_leaf)
    # vmap and its like take no autograd function of this form.
    transformed = torch._C._are_functorch_transforms_active()
    if not can_wait or transformed or not torch.is_grad_enabled():
        return None
    return input, weight, bias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        parameters: tuple[Tensor, Tensor | None],
        products: list[Product],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parameters, ctx.products = parameters, products
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:  # pyright: ignore
        x, weight = ctx.saved_tensors
        trained, bias = ctx.parameters
        ctx.products.append(Product(trained, bias, x, gradient))
        dx = gradient @ weight if ctx.needs_input_grad[3] else None
        return None, None, None, dx, *[None] * (len(ctx.needs_input_grad) - 4)


def finish_weights(products: list[Product]) -> None:
    """Compute the gradients that were put off and accumulate them, hooks included.

    It is one backward pass: each hook runs once, also that of a weight which was used
    several times, and each product is accumulated before the next one is computed.

    Args:
        products: What backward has put off; the list is empty afterwards.
    """
    roots = [_Later.apply(p, *p.parameters) for p in products]
    products.clear()  # each product goes as soon as it is computed
    if roots:
        torch.autograd.backward(roots, [torch.empty_like(root) for root in roots])  # pyright: ignore


class _Later(torch.autograd.Function):
    """Nothing forward; backward gives the gradients of one product."""

    @staticmethod
    def forward(ctx: Any, product: Product, *parameters: Tensor) -> Tensor:
        ctx.product = product
        return parameters[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple:  # pyright: ignore
        weight, bias, x, gradient = ctx.product
        del ctx.product
        rows = gradient.reshape(-1, gradient.shape[-1])  # (R, F)
        dw = (rows.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        return None, dw, *([] if bias is None else [rows.sum(0).to(bias.dtype)])


def enter(x: Tensor, gradient: list[Tensor], anchor: Tensor) -> Tensor:
    """Return `x` as it enters a stage; backward puts its gradient into a list.

    Unlike a leaf it may be changed in place, and its gradient is not copied.

    Args:
        x: A tensor without a graph.
        gradient: Where its gradient goes.
        anchor: Needs a gradient, so that the result does; it gets none.
    """
    return _Entrance.apply(anchor, x, gradient)  # pyright: ignore[reportReturnType]


class _Entrance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, gradient: list[Tensor]) -> Tensor:
        ctx.gradient = gradient
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:  # pyright: ignore
        ctx.gradient.append(gradient)
        return None, None, None
