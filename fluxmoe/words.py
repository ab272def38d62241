"""Sanitising of text from policies and plugins for logs, metrics, JSON and terminals (``line``).

Such text may have any length, contain line breaks, control characters or lone surrogates, or come
from a ``__str__`` that raises. A lone surrogate cannot be encoded as UTF-8: in the reason for a
decision, it would end the thread that encodes an engine's answers. The functions here sanitise text
where it enters FluxMoE.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

#: Maximum number of characters in a line.
LIMIT = 500

#: Returns the traceback of an exception, even if its class overrides ``__traceback__``.
traceback_of: Callable[[BaseException], TracebackType | None] = BaseException.__dict__[
    "__traceback__"
].__get__
#: Returns the name of a class, even if its metaclass overrides ``__name__``.
class_name: Callable[[type], str] = type.__dict__["__name__"].__get__


def line(value: object, how: Callable[[Any], str] = str, *, limit: int = LIMIT) -> str:
    """Convert ``value`` by ``str`` or ``repr`` to one line of up to ``limit`` printable characters.

    Each run of white space becomes one space, unprintable characters are escaped as in Python, and
    long text is truncated. Only exceptions from signal handlers and Ctrl-C are raised.
    """
    try:
        # Converted to a plain str: a subclass may override methods used here or later.
        text = str.__str__(value if how is str and isinstance(value, str) else how(value))
    except BaseException as error:  # including SystemExit
        if interrupts(error):
            raise
        text = f"a {class_name(type(value))} that cannot be printed"
    if len(text) <= limit and text.isprintable() and "  " not in text:
        return text
    # Read only slightly more than is shown, since the text may be very long.
    words = text[: 4 * limit].split()
    shown = "".join(c if c.isprintable() else _escaped(c) for c in " ".join(words))
    return shown if len(shown) <= limit and len(text) <= 4 * limit else shown[: limit - 1] + "…"


def printable(text: str) -> str:
    """Escape unprintable characters, such as line breaks, as in Python's ``repr``."""
    return (
        text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)
    )


def raised(error: BaseException) -> str:
    """Describe an exception, by its type and message, as one line (see ``line``)."""
    return line(error, lambda error: f"{class_name(type(error))}: {line(error)}")


def interrupts(error: BaseException) -> bool:
    """Return True if ``error`` is Ctrl-C, or if a signal handler raised it during a policy's call.

    ``__class__`` and ``__traceback__`` are not read: they may be the policy's code.
    """
    if issubclass(type(error), KeyboardInterrupt):
        return True
    handlers = {
        getattr(signal.getsignal(number), "__code__", None) for number in signal.valid_signals()
    } - {None}
    return any(frame.f_code in handlers for frame, _ in traceback.walk_tb(traceback_of(error)))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
