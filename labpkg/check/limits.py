"""A limit on the size of the tensors that a reader's function makes.

Some exercises ask for a result that is easy to compute in one large tensor, and are
about not making that tensor. The limit raises inside the function, so that the
traceback ends at the reader's line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class MemoryLimitError(MemoryError):
    """More memory than the exercise allows; `hint` says what to do instead."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class SizeLimit(TorchFunctionMode):
    """While it is entered, a call of torch that returns too large a tensor raises.

    What counts is the memory behind a tensor, so that views are free. Autograd is
    refused as well, for it keeps many small tensors until backward.

    Args:
        num_elements: the largest size that is allowed.
        hint: what to do instead.
    """

    def __init__(self, num_elements: int, hint: str) -> None:
        super().__init__()
        self.num_elements, self.hint = num_elements, hint

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                continue
            if tensor.requires_grad:
                raise MemoryLimitError(
                    "this needs autograd, which keeps what it meets until backward",
                    self.hint,
                )
            held = tensor.untyped_storage().nbytes() // tensor.element_size()
            if held > self.num_elements:
                raise MemoryLimitError(
                    f"this makes a tensor of {held} elements, shape "
                    f"{tuple(tensor.shape)}; this case allows {self.num_elements}",
                    self.hint,
                )
        return result
