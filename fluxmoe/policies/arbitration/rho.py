"""``rho``: compares the time to compute a step with the time to load its experts.

Source: the FluxMoE paper, arXiv 2604.02715, Algorithm 2.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fluxmoe.core.policy.arbitration import ArbitrationPolicy, ArbitrationView, Split


class RhoOptions(BaseModel):
    """Options of ``rho``."""

    model_config = ConfigDict(extra="forbid")

    low: float = Field(default=0.9, gt=0)
    """Lower threshold of ρ, below which loading is the bottleneck and the experts get memory."""
    high: float = Field(default=1.0, gt=0)
    """Upper threshold of ρ, above which compute hides loading and the KV cache gets memory."""
    share: float = Field(default=1 / 32, gt=0, le=1)
    """Fraction of the budget to move at once."""
    window: int = Field(default=8, ge=1)
    """Number of steps to average over."""

    @model_validator(mode="after")
    def _in_order(self) -> RhoOptions:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not be above high ({self.high})")
        return self


class Rho(ArbitrationPolicy):
    """Move memory by ρ = compute time / load time of a step (arXiv 2604.02715, Algorithm 2)."""

    def __init__(
        self, low: float = 0.9, high: float = 1.0, share: float = 1 / 32, window: int = 8
    ) -> None:
        self._low, self._high, self._share, self._window = low, high, share, window
        self.reset()

    def reset(self) -> None:
        self._compute = self._load = 0.0

    def split(self, view: ArbitrationView) -> Split:
        frames, total = dict(view.frames), view.total_frames
        if not view.tokens:
            return Split(frames)
        weight = 1 / self._window if self._compute else 1.0
        compute = max(view.step_seconds - view.stall_seconds, 0.0)
        load = view.experts.loads * view.experts.load_seconds
        self._compute += (compute - self._compute) * weight
        self._load += (load - self._load) * weight
        rho = self._compute / self._load if self._load else float("inf")
        amount = max(1, round(total * self._share))
        experts = min(max(frames["experts"], 0), total)
        if rho > self._high:
            experts -= amount
        elif rho < self._low:
            experts += amount
        else:
            return Split(frames)
        # KV cache in use always takes precedence.
        experts = min(experts, total - view.kv_used_frames, view.bounds["experts"].max)
        experts = max(experts, view.bounds["experts"].min)
        return Split(
            {"experts": experts, "kv": max(total - experts, 0)},
            f"ρ = {self._compute * 1e3:.1f} ms / {self._load * 1e3:.1f} ms = {rho:.2f}",
        )
