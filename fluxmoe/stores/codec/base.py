"""The contract of lossless codecs: the base class ``Codec``."""

from __future__ import annotations

from abc import ABC, abstractmethod

from fluxmoe.core.types import Bytes


class Codec(ABC):
    """Encodes an array of bytes in fewer bytes, and decodes it exactly.

    One object serves all threads of a process. Both methods should release the GIL; otherwise
    copies are serialised.
    """

    @abstractmethod
    def encode(self, raw: Bytes) -> Bytes:
        """Encode ``raw``, one part of an expert page.

        The result may be longer than ``raw``, or empty if encoding gains nothing: stores then keep
        ``raw`` itself. It must not be a view of ``raw``.
        """

    @abstractmethod
    def decode(self, coded: Bytes, out: Bytes) -> None:
        """Write the decoded bytes to ``out``, which has exactly their size.

        Raises:
            CodecError: ``coded`` is damaged or does not fit ``out``, whose contents are then
                undefined.
        """
