"""What policies and plugins say, made fit for logs, metrics, JSON and terminals: ``line``.

Text of others may be of any length, hold line breaks, control characters or lone surrogates (which
no UTF-8 has: a single one in a reason would end the thread that encodes an engine's answers), or
come from a ``__str__`` that fails. It passes through here where it crosses into FluxMoE.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable
from typing import Any

#: Characters of a line.
LIMIT = 500

#: The name of a class, whatever its metaclass makes of ``__name__``.
_name: Callable[[type], str] = type.__dict__["__name__"].__get__


def line(value: object, how: Callable[[Any], str] = str, *, limit: int = LIMIT) -> str:
    """``str`` or ``repr`` of ``value`` as one line of at most ``limit`` printable characters.

    Runs of white space become one space, what cannot be printed is escaped as in Python, the end of
    a long text is left out. Never fails; what a signal handler raises meanwhile gets through.
    """
    try:
        # A str is taken as it is: a subclass may have methods of its own, here and further on.
        text = str.__str__(value if how is str and isinstance(value, str) else how(value))
    except BaseException as error:  # an exit, too
        if isinstance(error, KeyboardInterrupt) or from_signal(error):
            raise
        text = f"a {_name(type(value))} that cannot be printed"
    if len(text) <= limit and text.isprintable() and "  " not in text:
        return text
    # A bit more than is shown is looked at, however long the text is.
    words = text[: 4 * limit].split()
    shown = "".join(c if c.isprintable() else _escaped(c) for c in " ".join(words))
    return shown if len(shown) <= limit and len(text) <= 4 * limit else shown[: limit - 1] + "…"


def raised(error: BaseException) -> str:
    """An exception as ``line``: its type and what it says."""
    return line(error, lambda error: f"{_name(type(error))}: {line(error)}")


def from_signal(error: BaseException) -> bool:
    """Whether a signal handler raised ``error`` while a policy happened to run: not its fault."""
    handlers = {
        getattr(signal.getsignal(number), "__code__", None) for number in signal.valid_signals()
    } - {None}
    return any(frame.f_code in handlers for frame, _ in traceback.walk_tb(error.__traceback__))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
