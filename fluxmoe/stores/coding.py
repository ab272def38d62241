"""Encoding of page parts for stores: parts are kept encoded if that is shorter and verified."""

from __future__ import annotations

import logging

import numpy as np

from fluxmoe.core.types import Bytes
from fluxmoe.errors import CodecError, StoreError
from fluxmoe.stores.codec.base import Codec
from fluxmoe.words import line

logger = logging.getLogger("fluxmoe")


class Coder:
    """The host's side of a codec, which verifies the codec's output and handles its faults.

    A part that the codec cannot restore bit for bit is kept uncoded and counted; the first such
    fault is reported. Stored data of the original's length *is* the original.

    Args:
        codec: The codec.
        name: The codec's registered name, for messages.
        strict: Raise an error for a fault instead of keeping the part uncoded.

    Attributes:
        faults: Number of times that the codec raised an error or did not restore its input.
    """

    def __init__(self, codec: Codec, name: str, *, strict: bool = False) -> None:
        self._codec, self.name, self._strict = codec, name, strict
        self.faults = 0

    def encode(self, raw: Bytes) -> Bytes:
        """Encode ``raw``; the result is a new, shorter array, or ``raw`` itself.

        Raises:
            CodecError: The codec failed, and ``strict`` is true.
        """
        try:
            coded: object = self._codec.encode(raw)
            if not isinstance(coded, np.ndarray) or coded.dtype != np.uint8 or coded.ndim != 1:
                raise CodecError(f"encode returned {type(coded).__name__}, not a 1-d uint8 array")
            if not 0 < len(coded) < len(raw):
                return raw
            back = ~raw  # so that bytes that the codec does not write differ from ``raw``
            self._codec.decode(coded, back)
            if not np.array_equal(back, raw):
                raise CodecError("decoding does not restore the encoded bytes")
        except Exception as error:
            if self._strict:
                raise CodecError(f"codec {self.name!r} failed: {line(error, repr)}") from error
            if not self.faults:
                logger.warning(
                    "codec %r failed, pages are kept uncoded: %s", self.name, line(error, repr)
                )
            self.faults += 1
            return raw
        return coded

    def decode(self, kept: Bytes, out: Bytes) -> None:
        """Decode ``kept`` to ``out``.

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
