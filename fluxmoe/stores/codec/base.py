"""The contract of lossless codecs: the base class ``Codec``."""

from __future__ import annotations

from abc import ABC, abstractmethod

from fluxmoe.core.types import Bytes


class Codec(ABC):
    """A lossless codec, which encodes an array in fewer bytes and restores it exactly.

    One object serves all threads of a process. Both methods should release the GIL; otherwise
    concurrent copies run one after another.
    """

    @abstractmethod
    def encode(self, raw: Bytes) -> Bytes:
        """Encode ``raw``, one part of an expert page.

        If encoding gains nothing, the result may be empty or longer than ``raw``; stores then keep
        ``raw`` itself. The result must not be a view of ``raw``.
        """

    @abstractmethod
    def decode(self, coded: Bytes, out: Bytes) -> None:
        """Write the decoded bytes to ``out``, which has exactly the size of the original.

        Raises:
            CodecError: ``coded`` is damaged, or its original differs from ``out`` in size. The
                contents of ``out`` are then undefined.
        """
