"""Delay of signals until changes that belong together are complete: ``uninterrupted``."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, TypeAlias

Handler: TypeAlias = Callable[[int, FrameType | None], Any]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Python's signal handlers, which may raise an exception, until the end of the block.

    Python runs signal handlers in the main thread only, so blocks in other threads are not
    interrupted anyway.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Handler] = {
        number: handler
        for number in signal.valid_signals()
        if callable(handler := signal.getsignal(number))
    }
    with ExitStack() as end:
        end.callback(_call, handlers, came)
        for number, handler in handlers.items():
            end.callback(signal.signal, number, handler)
            signal.signal(number, lambda *signalled: came.append(signalled))
        yield


def _call(handlers: Mapping[int, Handler], came: list[tuple[int, FrameType | None]]) -> None:
    """Call the handler of each signal that arrived, even if another handler raises an error."""
    with ExitStack() as each:
        for number, frame in reversed(came):
            each.callback(handlers[number], number, frame)
