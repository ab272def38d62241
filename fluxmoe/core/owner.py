"""Owner: the process that something belongs to.

A forked child gets copies of all books and locks, but shares the frames and every open file with
its parent, and has none of its threads. So it may neither use what the parent made nor give it
back: each use asks first, and each release does nothing.
"""

from __future__ import annotations

import os

from fluxmoe.errors import UnsupportedError


class Owner:
    """The process that runs now.

    It compares process numbers, which takes 50 ns. What Python calls after a fork would be for
    nothing, but a fork in C does not call it.
    """

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def here(self) -> bool:
        """Whether this is that process."""
        return os.getpid() == self._process

    def require(self) -> None:
        """Raise UnsupportedError in any other process."""
        if not self.here:
            raise UnsupportedError(
                f"this process was forked from process {self._process}, and cannot use what "
                "FluxMoE made there: paged models, engines, traces that are being written",
                fix="use them there; other processes start by spawn, and page models of their own",
            )
