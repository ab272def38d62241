"""``marginal``: the split with the most expected tokens per second, estimated from measurements.

For each split the policy estimates the number of requests that could run (from the memory that a
request needs and the number of waiting requests), the duration of a step with that many requests (a
line fitted to recent steps), the wait for experts (the miss-ratio curve, scaled to the actual
misses, times the measured time per page), and the time to compute prompts (the part that a prefix
cache of the remaining size lacks). The policy moves memory when the best split promises clearly
more than the current one.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from fluxmoe.core.policy.arbitration import ArbitrationPolicy, ArbitrationView, Split, StepSample

Floats = npt.NDArray[np.float64]

#: Number of splits to compare.
_POINTS = 33
#: Prior for the fraction of a step's time that does not depend on the batch.
_FLAT = 0.6


class MarginalOptions(BaseModel):
    """Options of ``marginal``."""

    model_config = ConfigDict(extra="forbid")

    goal: Literal["throughput", "latency"] = "throughput"
    """Quantity to maximise: tokens per second of all requests, or of each running request."""
    gain: float = Field(default=0.02, ge=0)
    """Minimum relative improvement that justifies a move."""
    dwell: int = Field(default=64, ge=0)
    """Number of steps before the direction may be reversed, unless requests wait for KV cache."""
    headroom: float = Field(default=0.25, ge=0)
    """Spare KV cache for growth, as a fraction of that in use; not used in estimates if the sizes
    of requests are known."""
    interval: int = Field(default=4, ge=1)
    """Number of steps between comparisons; up to 16 times as many while nothing changes."""
    window: int = Field(default=32, ge=8)
    """Number of steps to average over."""


class Marginal(ArbitrationPolicy):
    """Move memory to where it yields more tokens per second. FluxMoE's own policy.

    The policy equalises the tenants' marginal benefits, using miss-ratio curves
    (``core.paging.measures``).
    """

    def __init__(
        self,
        goal: str = "throughput",
        gain: float = 0.02,
        dwell: int = 64,
        headroom: float = 0.25,
        interval: int = 4,
        window: int = 32,
    ) -> None:
        self._goal, self._gain, self._dwell = goal, gain, dwell
        self._headroom, self._window = headroom, window
        self.interval, self.calm_interval = interval, 16 * interval
        self.reset()

    def reset(self) -> None:
        self._model = StepModel(self._window)
        self._wish: Split | None = None
        self._turned, self._direction, self._present = 0, 0, -1

    def split(self, view: ArbitrationView) -> Split:
        self._model.observe(view)
        if not view.running_requests or not self._model.ready:
            return self._wish_within(view)
        present, before = view.frames["experts"], self._present
        self._present = present
        experts = self._candidates(view)
        values = self._model.value(view, experts, self._headroom, self._goal)
        here = float(np.interp(present, experts, values))
        best = int(np.argmax(values))
        if values[best] <= here * (1 + self._gain):
            if self._wish is None:
                return Split(view.frames)
            # Drop the requested split if it no longer pays off or if memory has stopped moving.
            goal = float(np.interp(self._wish.frames["experts"], experts, values))
            if goal < here * (1 - self._gain) or present == before:
                self._wish = None
            return self._wish_within(view)
        direction = 1 if experts[best] > present else -1
        pressed = view.waiting_requests > 0 and direction < 0
        turning = direction != self._direction
        if turning and not pressed and view.step - self._turned < self._dwell:
            return self._wish_within(view)
        if turning:
            self._direction, self._turned = direction, view.step
        wanted = int(experts[best])
        self._wish = Split(
            {"experts": wanted, "kv": view.total_frames - wanted},
            self._model.words(view, self._headroom, here, float(values[best])),
        )
        return self._wish

    def _wish_within(self, view: ArbitrationView) -> Split:
        """Return the last decision if it still fits the budget, otherwise the current split."""
        wish = self._wish
        if wish is None or sum(wish.frames.values()) > view.total_frames:
            return Split(view.frames)
        return wish

    def _candidates(self, view: ArbitrationView) -> Floats:
        """List candidate numbers of expert frames in ascending order, including the current one."""
        bounds, total = view.bounds, view.total_frames
        used = min(view.kv_used_frames, view.frames["kv"])
        kv = max(bounds["kv"].min, min(round(used * (1 + self._headroom)), view.frames["kv"]))
        least = bounds["experts"].min
        most = max(min(bounds["experts"].max, total - kv), least)
        least = max(least, min(total - bounds["kv"].max, most))
        grid = np.linspace(least, most, _POINTS).round()
        present = min(max(view.frames["experts"], least), most)
        return np.unique(np.append(grid, present))


class StepModel:
    """A cost model of steps, mostly from exponentially weighted averages of observed steps."""

    def __init__(self, window: int) -> None:
        self._keep = 1 - 1 / window
        # Sums over decode steps of the weights, x, y, xx and xy, for x requests and y seconds. Each
        # power of two of x has a row, which decays only when it gets new data, so that the cost of
        # large batches remains known through a long quiet period.
        self._sums = [[0.0] * 5 for _ in range(16)]
        # Prompts come in bursts, so the first prompt does not indicate the average rate.
        self._averages = {"prompt": 0.0}
        #: Prompt tokens computed in addition to decode steps, and their time in seconds.
        self._prefill = [0.0, 0.0]
        self._asked = 0

    @property
    def ready(self) -> bool:
        """True once a few steps have been observed."""
        return sum(row[0] for row in self._sums) > 4

    def observe(self, view: ArbitrationView) -> None:
        """Update the model with the last steps and the number of requests in the next one."""
        # The demand rises immediately and decays slowly: a burst of requests must not wait, and
        # another burst may follow.
        demand = min(view.running_requests + view.waiting_requests, view.max_running_requests)
        self._average("demand", demand, steps=len(view.steps))
        self._averages["demand"] = max(self._averages["demand"], demand)
        steps = [step for step in view.steps if step.tokens and step.requests]
        if not steps:
            return
        # Averaged over more steps, because entire answers lie between one prompt and the next.
        asked, self._asked = view.prefixes.asked - self._asked, view.prefixes.asked
        self._average("prompt", asked / len(steps), steps=len(steps) / 8)
        known, have = view.experts.curve.size, view.frames["experts"]
        ratio = float(view.experts.miss_ratio(have))
        for step in steps:
            self._learn(step)
            self._average("answer", step.requests, steps=1 / 8)
            self._average("running", step.requests)
            self._average("accesses", step.accesses)
            if known:
                self._average("misses", step.misses)
                self._average("expected", step.accesses * ratio)

    def _learn(self, step: StepSample) -> None:
        """Update the model with the duration of a step."""
        running, compute = step.requests, max(step.seconds - step.stall_seconds, 1e-9)
        if step.tokens <= 2 * running:  # mostly decode: prefill tokens are far cheaper
            x, y = float(running), compute
            row, new = min(running.bit_length(), len(self._sums)) - 1, (1.0, x, y, x * x, x * y)
            self._sums[row] = [
                old * self._keep + add for old, add in zip(self._sums[row], new, strict=True)
            ]
        elif self.ready:
            flat, slope = self.line()
            beyond = step.tokens - running, max(compute - flat - slope * running, 0.0)
            self._prefill = [
                old * self._keep + new for old, new in zip(self._prefill, beyond, strict=True)
            ]

    def _average(self, name: str, value: float, *, steps: float = 1) -> None:
        old = self._averages.get(name, value)
        self._averages[name] = value + (old - value) * self._keep**steps

    def line(self) -> tuple[float, float]:
        """Return the seconds of a decode step: the fixed part, and the part per request."""
        n, x, y, xx, xy = (sum(column, 0.0) for column in zip(*self._sums, strict=True))
        x, y = x / n, y / n
        # A weak prior for the slope, because steps with the same batch size do not determine it.
        weight = 0.02 * n
        spread = xx / n - x * x + weight / n * x * x
        slope = (xy / n - x * y + weight / n * x * (y - _FLAT * y)) / spread if spread else 0.0
        slope = min(max(slope, 0.05 * y / x), y / x)
        return y - slope * x, slope

    def prompt_token(self) -> float:
        """Return the seconds that a prompt token takes."""
        tokens, seconds = self._prefill
        # Prompt tokens are computed in batches. Until measured, they are assumed to be cheaper than
        # decoded tokens.
        return seconds / tokens if tokens else self.line()[1] / 2

    def value(self, view: ArbitrationView, experts: Floats, headroom: float, goal: str) -> Floats:
        """Return the expected tokens per second for these numbers of expert frames."""
        kv = view.total_frames - experts
        each = self._each(view, headroom)
        batch = np.clip(kv / each, 1.0, max(self._averages["demand"], 1.0))
        flat, slope = self.line()
        loading = self._misses(view, experts, batch) * view.experts.load_seconds
        # Prompt tokens not found in the prefix cache.
        prompts = batch * self._averages["prompt"] / max(self._averages["answer"], 1.0)
        found = view.prefixes.hit_ratio(np.maximum(kv - batch * each, 0.0))
        computed = prompts * (1 - found) * self.prompt_token()
        served = batch if goal == "throughput" else np.ones_like(batch)
        value: Floats = served / (flat + slope * batch + loading + computed)
        return value

    def _each(self, view: ArbitrationView, headroom: float) -> float:
        """Return the number of frames that a request needs."""
        each = view.kv_used_frames / max(view.running_requests, 1)
        if view.request_frames:
            return max(each, view.request_frames)
        # If the KV cache is full, it holds requests of all ages; otherwise the requests will grow.
        full = view.waiting_requests and view.running_requests < view.max_running_requests
        return max(each, 1e-9) * (1.0 if full else 1 + headroom)

    def _misses(self, view: ArbitrationView, experts: Floats, batch: Floats) -> Floats:
        """Return the expected misses per step: the curve, scaled to the actual misses."""
        demand, seen = view.experts, self._averages
        pages = max(demand.pages, 1)
        expected = seen.get("expected", 0.0)
        scale = seen["misses"] / expected if expected > 1 else 1.0
        # More requests use more experts; requests are assumed to choose experts independently.
        share = min(seen["accesses"] / pages, 0.999)
        used = pages * (1 - (1 - share) ** (batch / max(seen["running"], 1.0)))
        ratio = demand.miss_ratio(experts)
        misses: Floats = np.minimum(used * ratio * min(max(scale, 0.25), 4.0), used)
        return misses

    def words(self, view: ArbitrationView, headroom: float, here: float, there: float) -> str:
        """Describe the numbers behind a decision."""
        flat, slope = self.line()
        misses = self._averages.get("misses", 0.0)
        return (
            f"{there:.1f} expected tokens/s instead of {here:.1f}: "
            f"{view.running_requests} running, {view.waiting_requests} waiting, "
            f"{self._each(view, headroom):.1f} frames each; "
            f"step {flat * 1e3:.1f} ms + {slope * 1e3:.2f} ms per request; "
            f"{misses:.1f} misses at {view.experts.load_seconds * 1e6:.0f} µs"
        )
