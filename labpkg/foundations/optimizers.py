"""SGD and AdamW as written in the papers, in torch's optimizer protocol.

Contract: each step equals `torch.optim` to rounding; learning-rate schedulers,
parameter groups and `state_dict` work as there; a parameter whose gradient is None is
left alone (AdamW would decay it otherwise). Each update is a few operations on *lists*
of tensors (`torch._foreach_*`), a few kernels for the whole model on a GPU.

Notation: p parameter, g gradient, m first moment, v second moment, t step.

Chapter: foundations/gradient_descent.
References: Sutskever et al. 2013 (momentum, Nesterov); Kingma and Ba 2015,
arXiv:1412.6980 (Adam); Loshchilov and Hutter 2019, arXiv:1711.05101 (AdamW).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT


class _ListOptimizer(torch.optim.Optimizer):
    """Update all parameters of a group at once; a subclass says how."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the loss, as in `torch.optim.Optimizer.step`.

        Returns:
            What the closure returned, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, [p.grad for p in params], group)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with its own hyperparameters.

        Args:
            param_group: "params" and what differs from the defaults.

        Raises:
            ValueError: if a hyperparameter is out of range.
        """
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _update(
        self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]
    ) -> None:
        raise NotImplementedError

    def _moments(self, params: list[Tensor], name: str) -> list[Tensor]:
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in params]


class SGD(_ListOptimizer):
    """Stochastic gradient descent with momentum.

    g <- g + weight_decay p;  m <- momentum m + g;  p <- p - lr m, or with Nesterov
    p <- p - lr (g + momentum m). Without momentum there is no state; with it, one
    tensor per parameter.

    Args:
        params: parameters, or dictionaries that describe groups.
        lr: learning rate, >= 0.
        momentum: in [0, 1).
        nesterov: look one momentum step ahead; needs momentum > 0.
        weight_decay: L2 coefficient added to the gradient, >= 0.

    Raises:
        ValueError: if a hyperparameter is out of range.

    Reference:
        Sutskever, Martens, Dahl, Hinton 2013, On the importance of initialization and
        momentum in deep learning.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        _require_at_least_zero(group, "lr", "weight_decay")
        _require_below_one("momentum", group["momentum"])
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError(
                "nesterov=True with momentum=0 has no effect; choose momentum=0.9"
            )

    def _update(
        self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]
    ) -> None:
        lr, momentum = group["lr"], group["momentum"]
        if group["weight_decay"]:
            grads = [*torch._foreach_add(grads, params, alpha=group["weight_decay"])]
        if momentum:
            m = self._moments(params, "momentum_buffer")  # first step: m = g
            torch._foreach_mul_(m, momentum)
            torch._foreach_add_(m, grads)
            if group["nesterov"]:
                grads = [*torch._foreach_add(grads, m, alpha=momentum)]
            else:
                grads = m
        torch._foreach_add_(params, grads, alpha=-lr)


class AdamW(_ListOptimizer):
    """Adam with weight decay taken out of the gradient.

    p <- p - lr weight_decay p;  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;
    p <- p - lr m' / (sqrt(v') + eps) with m' = m / (1 - b1^t), v' = v / (1 - b2^t).
    State: two tensors per parameter. Each parameter counts its own steps t, because one
    without a gradient takes no step. A step reads and writes 18 elements per parameter;
    the formula as it stands takes 20, one fused kernel 7.

    Args:
        params: parameters, or dictionaries that describe groups.
        lr: learning rate, >= 0.
        betas: (b1, b2), each in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: decay per unit of lr, >= 0.

    Raises:
        ValueError: if a hyperparameter is out of range.

    Reference:
        Loshchilov and Hutter 2019, Decoupled weight decay regularization,
        arXiv:1711.05101.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        _require_at_least_zero(group, "lr", "eps", "weight_decay")
        if len(group["betas"]) != 2:
            raise ValueError(
                f"betas={group['betas']} must be two numbers; choose e.g. (0.9, 0.999)"
            )
        for beta in group["betas"]:
            _require_below_one("betas", beta)

    def _update(
        self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]
    ) -> None:
        lr, (b1, b2) = group["lr"], group["betas"]
        m = self._moments(params, "exp_avg")
        v = self._moments(params, "exp_avg_sq")
        for p in params:  # in the state of torch's own AdamW the step is a tensor
            self.state[p]["step"] = int(self.state[p].get("step", 0)) + 1
        steps = [self.state[p]["step"] for p in params]

        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(m, grads, 1 - b1)
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, grads, grads, 1 - b2)
        # m' / (sqrt(v') + eps), times its own root: no pass over memory divides by it
        roots = [(1 - b2**t) ** 0.5 for t in steps]
        denominator = torch._foreach_sqrt(v)
        torch._foreach_add_(denominator, [root * group["eps"] for root in roots])
        sizes = [-lr * r / (1 - b1**t) for r, t in zip(roots, steps, strict=True)]
        torch._foreach_addcdiv_(params, m, denominator, sizes)


def _require_at_least_zero(group: dict[str, Any], *names: str) -> None:
    for name in names:
        if not 0.0 <= group[name] < float("inf"):  # also refuses nan
            raise ValueError(
                f"{name}={group[name]} must be a finite number >= 0; choose e.g. "
                f"{name}={0.01 if name != 'eps' else 1e-8}"
            )


def _require_below_one(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(
            f"{name} has the value {value}, outside [0, 1): the running mean would "
            "not forget; choose e.g. 0.9"
        )


def elementwise_defaults(
    cls: type[torch.optim.Optimizer],
    options: dict[str, Any],
    *,
    group: dict[str, Any] | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Return the defaults of an optimizer; refuse one that looks beyond an element.

    A small matrix is updated whole, and in two slices, each a group that `step` updates
    by itself: the results must be equal.

    Args:
        cls: The optimizer's class.
        options: What it is made with, besides the parameters.
        group: Options of a parameter group, where they differ.
        device: Where to try it.

    Returns:
        Its `defaults`, the options of a parameter group.

    Raises:
        ValueError: If slices of a parameter cannot be updated each by itself.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    random = torch.randn(4, 12, dtype=torch.float64, generator=generator, device="cpu")
    start, *gradients = random.to(device)
    whole = nn.Parameter(start.view(3, 4).clone())
    pieces = [nn.Parameter(part.clone()) for part in start.split([5, 7])]
    group = group or {}
    optimizer = cls([{**group, "params": [whole]}], **options)
    try:
        sliced = cls([{**group, "params": [piece]} for piece in pieces], **options)
        alone = sliced.param_groups
        for gradient in gradients:
            whole.grad = gradient.view(3, 4).clone()
            optimizer.step()
            for i, part in enumerate(gradient.split([5, 7])):
                pieces[i].grad = part.clone()
                sliced.param_groups = [alone[i]]
                sliced.step()
    except Exception as error:
        raise _no_slices(cls, f"it fails on them: {error}") from error
    together = torch.cat([piece.detach() for piece in pieces])
    if not torch.allclose(whole.detach().view(-1), together, rtol=1e-9, atol=1e-12):
        raise _no_slices(
            cls, "an update of one element depends on others, or on earlier calls"
        )
    return optimizer.defaults


def _no_slices(cls: type, reason: str) -> ValueError:
    return ValueError(
        f"{cls.__name__} cannot update slices of parameters, because {reason}; choose "
        "an elementwise optimizer, such as AdamW or SGD, or use DataParallel"
    )
