"""Synthetic traces: skewed and drifting routing, tokens that repeat experts, and scans."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fluxmoe.core.types import Phase
from fluxmoe.errors import ConfigError
from fluxmoe.trace import StepRows, TraceMeta, TraceWriter

#: One expert of Qwen3-30B-A3B in bf16: three matrices of 768 x 2048.
DEFAULT_PAGE_BYTES = 3 * 768 * 2048 * 2

# Larger than any log-weight plus noise, so that kept experts come first.
_KEPT = 1e6


@dataclass(frozen=True, slots=True)
class Workload:
    """A synthetic workload: decode steps with a fixed batch size, and optional scans in between.

    Attributes:
        layers, experts, top_k: Geometry of the model.
        steps: Number of forward passes.
        batch: Number of tokens per step.
        seed: Random seed; equal workloads give equal traces.
        skew: Zipf exponent: the expert of rank r is chosen in proportion to r^-skew; 0 = uniform.
        drift: Rate at which ranks change; 0 = never, 1 = redrawn in every step. The ranks are
            the order of one random number per expert; each step mixes in new random numbers with
            this share of the amplitude.
        locality: Probability that a request keeps an expert of its previous token, in the first and
            in the last layer; linear between the two.
        scan_every: Interval in steps at which a scan (a prefill) replaces the decode step; the
            scan's tokens together use every expert of every layer, in a new random order. 1 = only
            scans, 0 = no scans.
    """

    layers: int
    experts: int
    top_k: int
    steps: int
    batch: int
    seed: int = 0
    skew: float = 1.0
    drift: float = 0.02
    locality: tuple[float, float] = (0.0, 0.0)
    scan_every: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "experts", "top_k", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{getattr(self, name)} is not positive", where=_option(name))
        if self.top_k > self.experts:
            raise ConfigError(
                f"{self.top_k} exceeds the {self.experts} experts", where=_option("top_k")
            )
        if self.seed < 0:
            raise ConfigError(f"{self.seed} is negative", where=_option("seed"))
        if not 0 <= self.skew < math.inf:
            raise ConfigError(f"{self.skew} is not a finite number ≥ 0", where=_option("skew"))
        if not 0 <= self.drift <= 1:
            raise ConfigError(f"{self.drift} is not within 0…1", where=_option("drift"))
        if not all(0 <= chance <= 1 for chance in self.locality):
            raise ConfigError(
                f"{self.locality[0]}:{self.locality[1]} is not within 0…1",
                where=_option("locality"),
            )
        if self.scan_every < 0:
            raise ConfigError(f"{self.scan_every} is negative", where=_option("scan_every"))

    def is_scan(self, step: int) -> bool:
        """Return True if a step, counted from 0, is a scan."""
        return self.scan_every > 0 and step % self.scan_every == self.scan_every - 1

    def routing(self) -> Iterator[npt.NDArray[np.int16]]:
        """Yield each step's routed experts, int16 ``[layers, tokens, top_k]``, strongest first."""
        rng = np.random.default_rng(self.seed)
        by_rank = -self.skew * np.log(np.arange(1, self.experts + 1))
        popularity = rng.standard_normal((self.layers, self.experts))
        weight = np.empty_like(popularity)
        chance = np.linspace(*self.locality, self.layers)[:, np.newaxis, np.newaxis]
        last: npt.NDArray[np.bool_] | None = None
        for step in range(self.steps):
            if self.is_scan(step):
                yield self._scan(rng)
                continue
            ranking = np.argsort(-popularity, axis=1)
            np.put_along_axis(weight, ranking, by_rank[np.newaxis], axis=1)
            # Gumbel top-k: the k largest values of log-weight + Gumbel noise are a draw without
            # replacement in proportion to the weights.
            score = weight[:, np.newaxis] + rng.gumbel(size=(self.layers, self.batch, self.experts))
            if chance.any():
                if last is not None:
                    score[last & (rng.random(score.shape) < chance)] += _KEPT
                else:
                    last = np.empty(score.shape, np.bool_)
            order = np.argsort(-score, axis=2)[..., : self.top_k]
            if last is not None:
                last[:] = False
                np.put_along_axis(last, order, True, axis=2)
            yield order.astype(np.int16)
            fresh = rng.standard_normal(popularity.shape)
            # The variance stays 1, so the rate of drift is constant.
            popularity = np.sqrt(1 - self.drift**2) * popularity + self.drift * fresh

    def _scan(self, rng: np.random.Generator) -> npt.NDArray[np.int16]:
        """Make the fewest tokens that use all experts; the last one may repeat some experts."""
        tokens = -(-self.experts // self.top_k)
        order = rng.permuted(np.tile(np.arange(self.experts), (self.layers, 1)), axis=1)
        cycle = np.resize(np.arange(self.experts), tokens * self.top_k)
        return order[:, cycle].reshape(self.layers, tokens, self.top_k).astype(np.int16)


def write(
    workload: Workload,
    path: str | Path,
    page_bytes: int = DEFAULT_PAGE_BYTES,
    *,
    replace: bool = False,
) -> tuple[int, int]:
    """Write the workload's trace step by step; return the numbers of events and routed experts.

    Raises:
        TraceError: The file cannot be written, or an index does not fit the format.
        ConfigError: The file already exists and ``replace`` is false.
    """
    meta = TraceMeta(
        model="synthetic",
        num_layers=workload.layers,
        experts_per_layer=workload.experts,
        top_k=workload.top_k,
        page_bytes=page_bytes,
        source=f"fluxmoe trace synth --seed {workload.seed} --skew {workload.skew:g} "
        f"--drift {workload.drift:g} --locality {workload.locality[0]:g}:{workload.locality[1]:g} "
        f"--scan-every {workload.scan_every}",
    )
    decode = StepRows(
        np.arange(workload.batch, dtype=np.int32), np.full(workload.batch, Phase.DECODE, np.int8)
    )
    routed = 0
    with TraceWriter(path, meta, replace=replace) as writer:
        for step, layers in enumerate(workload.routing()):
            scan = workload.is_scan(step)
            phase, rows = (Phase.PREFILL, None) if scan else (Phase.DECODE, decode)
            for layer, ids in enumerate(layers):
                writer.append(step, layer, ids, phase, rows=rows)
            routed += layers.size
    return workload.steps * workload.layers, routed


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
