"""Traces without a model: Zipf-distributed routing whose popular experts change slowly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fluxmoe.core.types import Phase
from fluxmoe.errors import ConfigError
from fluxmoe.sim.trace import TraceMeta, TraceWriter

#: One expert of Qwen3-30B-A3B in bf16: three matrices of 768 x 2048.
DEFAULT_PAGE_BYTES = 3 * 768 * 2048 * 2


@dataclass(frozen=True, slots=True)
class Workload:
    """A synthetic decode workload.

    Attributes:
        layers, experts, top_k: Geometry of the model.
        steps: Forward passes.
        batch: Tokens per step.
        seed: The same workload gives the same trace.
        skew: Zipf exponent: the expert of rank r is chosen in proportion to r^-skew; 0 = uniform.
        drift: How fast ranks change, 0 = never, 1 = anew in every step. The ranks are those of
            one random number per expert, of which each step renews this share of the amplitude.
    """

    layers: int
    experts: int
    top_k: int
    steps: int
    batch: int
    seed: int = 0
    skew: float = 1.0
    drift: float = 0.02

    def __post_init__(self) -> None:
        for name in ("layers", "experts", "top_k", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{getattr(self, name)} is not positive", where=_option(name))
        if self.top_k > self.experts:
            raise ConfigError(
                f"{self.top_k} of {self.experts} experts cannot be chosen", where=_option("top_k")
            )
        if self.seed < 0:
            raise ConfigError(f"{self.seed} is negative", where=_option("seed"))
        if not 0 <= self.skew < math.inf:
            raise ConfigError(f"{self.skew} is no exponent", where=_option("skew"))
        if not 0 <= self.drift <= 1:
            raise ConfigError(f"{self.drift} is not within 0…1", where=_option("drift"))

    def routing(self) -> Iterator[npt.NDArray[np.int16]]:
        """Per step the routed experts, int16 ``[layers, batch, top_k]``, the strongest first."""
        rng = np.random.default_rng(self.seed)
        by_rank = -self.skew * np.log(np.arange(1, self.experts + 1))
        popularity = rng.standard_normal((self.layers, self.experts))
        weight = np.empty_like(popularity)
        for _ in range(self.steps):
            ranking = np.argsort(-popularity, axis=1)
            np.put_along_axis(weight, ranking, by_rank[np.newaxis], axis=1)
            # Gumbel top-k: the k largest of log-weight + Gumbel noise are a draw without
            # replacement in proportion to the weights.
            noise = rng.gumbel(size=(self.layers, self.batch, self.experts))
            order = np.argsort(-(weight[:, np.newaxis] + noise), axis=2)
            yield order[..., : self.top_k].astype(np.int16)
            fresh = rng.standard_normal(popularity.shape)
            # Keeps the variance at 1, so that the drift is the same all along.
            popularity = np.sqrt(1 - self.drift**2) * popularity + self.drift * fresh


def write(workload: Workload, path: str | Path, page_bytes: int = DEFAULT_PAGE_BYTES) -> int:
    """Write the workload's trace; returns the number of events.

    Raises:
        TraceError: The file cannot be written, or an index does not fit the format.
    """
    meta = TraceMeta(
        model="synthetic",
        num_layers=workload.layers,
        experts_per_layer=workload.experts,
        top_k=workload.top_k,
        page_bytes=page_bytes,
        source=f"fluxmoe trace synth --seed {workload.seed} --skew {workload.skew} "
        f"--drift {workload.drift}",
    )
    with TraceWriter(path, meta) as writer:
        for step, layers in enumerate(workload.routing()):
            for layer, ids in enumerate(layers):
                writer.append(step, layer, ids, Phase.DECODE)
    return workload.steps * workload.layers


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
