"""``kv-first``: requests wait for memory only while the experts have their minimum."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from fluxmoe.core.policy.arbitration import ArbitrationPolicy, ArbitrationView, Split


class KvFirstOptions(BaseModel):
    """Options of ``kv-first``."""

    model_config = ConfigDict(extra="forbid")

    headroom: float = Field(default=0.25, ge=0)
    """Spare KV cache, as a fraction of the KV cache that requests use."""
    patience: int = Field(default=200, ge=0)
    """Number of steps without a waiting request after which spare memory returns to the experts."""


class KvFirst(ArbitrationPolicy):
    """Grow the KV cache while requests wait; return spare memory later. A heuristic of FluxMoE."""

    def __init__(self, headroom: float = 0.25, patience: int = 200) -> None:
        self._headroom, self._patience = headroom, patience
        self.reset()

    def reset(self) -> None:
        self._calm = 0
        self._preemptions = 0

    def split(self, view: ArbitrationView) -> Split:
        kv, total = view.frames["kv"], view.total_frames
        needed = round(view.kv_used_frames * (1 + self._headroom))
        pressed = (
            view.waiting_requests and view.running_requests < view.max_running_requests
        ) or view.preemptions > self._preemptions
        self._preemptions = view.preemptions
        self._calm = 0 if pressed or needed > kv else self._calm + 1
        if pressed:
            # Room for the waiting requests, assumed to be as large as the average running request.
            each = view.kv_used_frames / max(view.running_requests, 1)
            needed += round(each * view.waiting_requests)
        elif needed <= kv and self._calm <= self._patience:
            return Split(view.frames)
        room = max(min(needed, total - view.bounds["experts"].min), view.bounds["kv"].min)
        return Split(
            {"experts": total - room, "kv": room},
            f"{view.waiting_requests} waiting, {view.kv_used_frames} of {kv} frames used",
        )
