"""Measurement of a codec's compression of a checkpoint's experts, without loading the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fluxmoe.checkpoint import expert_tensors
from fluxmoe.core.types import Bytes
from fluxmoe.errors import NoExpertsError
from fluxmoe.inventory import natural
from fluxmoe.stores.codec.base import Codec
from fluxmoe.stores.codec.fixed4 import Fixed4, inspect
from fluxmoe.stores.coding import Coder

#: Engines concatenate an expert's gate and up weights, so one part of a page holds both.
_HALVES = ("gate_proj", "up_proj", "w1", "w3")


@dataclass(slots=True)
class Survey:
    """Counts over the weights of some experts.

    Attributes:
        name: The layer's name in the checkpoint.
        parts: Number of page parts, as engines lay them out.
        plain: Number of parts that a store would keep uncoded.
        raw_bytes, coded_bytes: Size of the originals, and of the data that a store would keep.
        segments, escapes, raw_segments, zero_coded: Counts for ``fixed4`` only
            (docs/concepts/lossless-code.md).
        weights, zeros: Number of bf16 weights, and number of those that are 0 or −0.
    """

    name: str
    parts: int = 0
    plain: int = 0
    raw_bytes: int = 0
    coded_bytes: int = 0
    segments: int = 0
    escapes: int = 0
    raw_segments: int = 0
    zero_coded: int = 0
    weights: int = 0
    zeros: int = 0

    @property
    def ratio(self) -> float:
        """Original bytes divided by kept bytes."""
        return self.raw_bytes / self.coded_bytes if self.coded_bytes else 1.0

    def add(self, other: Survey) -> None:
        """Add the counts of another survey."""
        for field in self.__dataclass_fields__:
            if field != "name":
                setattr(self, field, getattr(self, field) + getattr(other, field))


def survey(folder: Path, codec: Codec, name: str) -> list[Survey]:
    """Make one ``Survey`` per MoE layer of a safetensors checkpoint.

    Every expert is encoded, decoded and compared.

    Raises:
        NoExpertsError: The checkpoint has no experts under known names.
        CodecError: The codec failed or did not restore its input.
    """
    coder = Coder(codec, name, strict=True)
    layers: dict[str, Survey] = {}
    for layer, dtype, part in parts_of(folder):
        layers.setdefault(layer, Survey(layer)).add(_one(coder, codec, dtype, part))
    if not layers:
        raise NoExpertsError(
            "the checkpoint has no experts under known names",
            where=str(folder),
            fix="use a mixture-of-experts model in safetensors format",
        )
    return [layers[layer] for layer in sorted(layers, key=natural)]


def _one(coder: Coder, codec: Codec, dtype: str, raw: Bytes) -> Survey:
    kept = coder.encode(raw)
    found = Survey("", parts=1, raw_bytes=len(raw), coded_bytes=len(kept))
    found.plain = int(len(kept) == len(raw))
    if isinstance(codec, Fixed4) and not found.plain:
        facts = inspect(kept)
        found.segments, found.escapes = facts.segments, facts.escapes
        found.raw_segments, found.zero_coded = facts.layout.raw, facts.zero_coded
    if dtype == "BF16":
        weights = raw.view(np.uint16)
        found.weights = len(weights)
        found.zeros = found.weights - int(np.count_nonzero(weights & 0x7FFF))
    return found


def parts_of(folder: Path) -> Iterator[tuple[str, str, Bytes]]:
    """Yield the layer, the dtype and the bytes of every part of every expert, as in a page."""
    halves: dict[tuple[str, int], Bytes] = {}
    for name, dtype, shape, data in expert_tensors(folder):
        if name.expert is None:
            for row in data.reshape(shape[0], -1):
                yield name.owner, dtype, row
            continue
        if name.part in _HALVES:
            expert = name.owner, name.expert
            other = halves.pop(expert, None)
            if other is None:
                halves[expert] = data
                continue
            data = np.concatenate([other, data])
        yield name.owner, dtype, data
