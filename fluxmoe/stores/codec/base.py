"""What stores ask of a lossless code. Whoever brings a new one derives it from ``Codec``."""

from __future__ import annotations

from abc import ABC, abstractmethod

from fluxmoe.core.types import Bytes


class Codec(ABC):
    """Keeps an array of bytes in fewer bytes, and gives back exactly what it was given.

    One object serves all threads of a process. Both methods should release the GIL, or copies will
    wait for each other.
    """

    @abstractmethod
    def encode(self, raw: Bytes) -> Bytes:
        """The code of ``raw``, one part of an expert page.

        It may be longer than ``raw``, or empty if nothing was to be gained: then stores keep
        ``raw`` itself. It must not be a view of ``raw``.
        """

    @abstractmethod
    def decode(self, coded: Bytes, out: Bytes) -> None:
        """Write what was encoded to ``out``, which has its size, and to nothing else.

        Raises:
            CodecError: ``coded`` is damaged, or is not what ``out`` is for. ``out`` may hold
                anything then.
        """
