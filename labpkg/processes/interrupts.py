"""Ctrl-C at a safe moment: SIGINT while a run starts, waits and ends.

Python turns SIGINT into an exception between any two bytecodes. That is welcome while a
run waits, and harmful while it makes or buries processes: a second Ctrl-C could leave
some behind. So a run holds interrupts back and lets them through where it waits.

Chapter: processes/ranks.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """A context that holds SIGINT back, except inside `let_through`.

    An interrupt that was held back is raised as soon as it may be, at the latest when
    the context ends. In other threads than the main one, and where somebody has set a
    handler of their own, nothing changes. The handler of an event loop is replaced for
    the while: it would act in the loop, which the run keeps waiting.
    """

    def __init__(self) -> None:
        self._is_held, self._is_pending = True, False
        self._previous: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if handler is signal.default_int_handler or _is_in_event_loop():
                self._previous = handler
                signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
        self._raise_pending()

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Raise `KeyboardInterrupt` at once inside this block."""
        try:
            self._is_held = False
            self._raise_pending()
            yield
        finally:
            self._is_held = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._is_held:
            self._is_held = True  # once: the end of the run comes next
            raise KeyboardInterrupt
        self._is_pending = True

    def _raise_pending(self) -> None:
        if self._is_pending:
            self._is_pending = False
            raise KeyboardInterrupt


def _is_in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
