"""Running code of a plugin at start-up: whatever it does, an error that names it comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fluxmoe.core.limits import HardLimitExceeded, Limits, Stopwatch, from_signal
from fluxmoe.core.words import raised
from fluxmoe.errors import FluxMoEError, PluginLoadError

T = TypeVar("T")

#: Imports may take their time; a loop that never ends must not.
LIMITS = Limits(hard_s=30.0)


def attempt(
    function: Callable[[], T],
    what: str,
    *,
    where: str,
    fix: str = "",
    passed: type[FluxMoEError] = PluginLoadError,
) -> T:
    """Call ``function``; how it failed is added to ``what``.

    An exit is a failure like any other, and so is a call that takes longer than ``LIMITS``: it is
    interrupted between two instructions of Python.

    Raises:
        PluginLoadError: It failed.
        FluxMoEError: It raised one of the kind ``passed``, which says itself what is wrong.
    """
    try:
        return Stopwatch(LIMITS).call(function, ())
    except HardLimitExceeded:
        reason = f"it took more than {LIMITS.hard_s:g} s"
        raise PluginLoadError(f"{what}TimeoutError: {reason}", where=where, fix=fix) from None
    except (passed, KeyboardInterrupt):
        raise
    except BaseException as error:
        if from_signal(error):
            raise
        raise PluginLoadError(f"{what}{raised(error)}", where=where, fix=fix) from error
