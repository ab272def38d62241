"""A plugin for measurements that emulates the link between a GPU and host memory.

Loading an expert's weights from a CPU's own memory takes hardly longer than using the weights once.
Loading them from the host of a GPU takes 15 (GH200) to 60 times (PCIe) as long as the GPU needs to
read them from its own memory. The plugin's codec keeps pages unchanged; decoding a part takes as
long as a transfer of the part's bytes over a link with ``gb_per_s``.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

import fluxmoe
from fluxmoe.core.types import Bytes


class LinkOptions(BaseModel):
    """Option of the codec: the speed of the link."""

    model_config = ConfigDict(extra="forbid")

    gb_per_s: float = Field(gt=0)


class Link(fluxmoe.Codec):
    """A codec that decodes at the speed of the link. The coded form is the part's number."""

    def __init__(self, gb_per_s: float) -> None:
        self._rate = gb_per_s * 1e9
        self._parts: list[Bytes] = []

    def encode(self, raw: Bytes) -> Bytes:
        self._parts.append(raw.copy())
        return np.frombuffer(np.int64(len(self._parts) - 1).tobytes(), np.uint8)

    def decode(self, coded: Bytes, out: Bytes) -> None:
        end = time.perf_counter() + len(out) / self._rate
        out[:] = self._parts[int(coded.view(np.int64)[0])]
        while time.perf_counter() < end:
            pass


@fluxmoe.hookimpl
def fluxmoe_register_codecs(register: Any) -> None:
    register("link", Link, LinkOptions)
