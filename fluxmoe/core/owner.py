"""The class ``Owner``: the process that owns a resource.

A forked child process gets copies of all books and locks, shares the frames and open files with its
parent, and has none of the parent's threads. So a child may neither use nor release the parent's
resources: each use checks the owner first, and a release in the child does nothing.
"""

from __future__ import annotations

import os

from fluxmoe.errors import UnsupportedError


class Owner:
    """The process that created this object.

    Comparing process ids takes 50 ns. Python's after-fork hooks would cost nothing, but they are
    not called when C code forks.
    """

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def here(self) -> bool:
        """True if the current process is the owner."""
        return os.getpid() == self._process

    def require(self) -> None:
        """Raise UnsupportedError if the current process is not the owner."""
        if os.getpid() != self._process:  # called for every event: avoid the call of ``here``
            raise UnsupportedError(
                f"this process was forked from process {self._process} and cannot use what "
                "FluxMoE created there: paged models, engines, traces being written",
                fix="use them there, or start other processes with spawn and page models in each",
            )
