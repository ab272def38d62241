"""Parts of pages as stores keep them: coded where that is shorter, and proved to come back."""

from __future__ import annotations

import logging

import numpy as np

from fluxmoe.core.types import Bytes
from fluxmoe.core.words import line
from fluxmoe.errors import CodecError, StoreError
from fluxmoe.stores.codec.base import Codec

logger = logging.getLogger("fluxmoe")


class Coder:
    """The host's side of a codec: checks what it makes, and contains what it does wrong.

    What a codec cannot give back bit for bit is kept as it is, counted, and reported once. What is
    as long as the original *is* the original.

    Args:
        codec: What encodes and decodes.
        name: As registered, for messages.
        strict: Raise at a fault instead of containing it.

    Attributes:
        faults: How often the codec raised, or did not give back what it was given.
    """

    def __init__(self, codec: Codec, name: str, *, strict: bool = False) -> None:
        self._codec, self.name, self._strict = codec, name, strict
        self.faults = 0

    def encode(self, raw: Bytes) -> Bytes:
        """What to keep of ``raw``: an array of its own that is shorter, or ``raw`` itself.

        Raises:
            CodecError: The codec failed, under ``strict``.
        """
        try:
            coded: object = self._codec.encode(raw)
            if not isinstance(coded, np.ndarray) or coded.dtype != np.uint8 or coded.ndim != 1:
                raise CodecError(f"encode gave {type(coded).__name__}, not a row of uint8")
            if not 0 < len(coded) < len(raw):
                return raw
            back = ~raw  # what is not written stays wrong
            self._codec.decode(coded, back)
            if not np.array_equal(back, raw):
                raise CodecError("what was decoded is not what was encoded")
        except Exception as error:
            if self._strict:
                raise CodecError(f"codec {self.name!r} failed: {line(error, repr)}") from error
            if not self.faults:
                logger.warning(
                    "codec %r failed, pages stay as they are: %s", self.name, line(error, repr)
                )
            self.faults += 1
            return raw
        return coded

    def decode(self, kept: Bytes, out: Bytes) -> None:
        """Write to ``out`` what ``kept`` was made of.

        Raises:
            StoreError: The codec failed, or ``kept`` is damaged.
        """
        if len(kept) == len(out):
            np.copyto(out, kept)
            return
        try:
            self._codec.decode(kept, out)
        except StoreError:
            raise
        except Exception as error:
            raise CodecError(f"codec {self.name!r} failed: {line(error, repr)}") from error
