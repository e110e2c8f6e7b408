"""Limits on what a reader's function may take: time, and the size of its tensors.

A loop that never ends must not hang the notebook. And some exercises ask for a result
that is easy to compute in one large tensor, and are about not making that tensor. A
limit raises inside the function, so that the traceback ends at the reader's line.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class MemoryLimitError(MemoryError):
    """More memory than the exercise allows; `hint` says what to do instead."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class AnswerTimeoutError(TimeoutError):
    """More time than any answer needs: a loop that does not end, most likely."""


@contextmanager
def time_limit(limit_s: float) -> Iterator[None]:
    """Raise `AnswerTimeoutError` in the block after some time.

    Python delivers alarms to the main thread only, between two of its own instructions:
    in another thread there is no limit, and a single call of torch is not cut short.

    Args:
        limit_s: seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise AnswerTimeoutError(f"no answer after {limit_s:g} s")

    start = time.monotonic()
    old_handler = signal.signal(signal.SIGALRM, stop)
    old_left, _ = signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        left = max(old_left - (time.monotonic() - start), 0.01) if old_left else 0
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old_handler)
        signal.setitimer(signal.ITIMER_REAL, left)  # that of somebody around us


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
