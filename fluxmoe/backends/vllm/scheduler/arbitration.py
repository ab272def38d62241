"""The scheduler's side of arbitration in vLLM: the engine's demand, and the arbiter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fluxmoe.backends.vllm.scheduler.balloon import Balloon
from fluxmoe.backends.vllm.scheduler.requests import RequestWatch, StepClock
from fluxmoe.config import Config
from fluxmoe.core.arbitration.controller import Arbiter, EngineState
from fluxmoe.core.arbitration.demand import DemandView
from fluxmoe.core.arbitration.messages import Inventory, OperatorLimits, Order, StepReport
from fluxmoe.core.arbitration.prefixes import PrefixCurve
from fluxmoe.core.policy.arbitration import (
    ArbitrationPolicy,
    ExpertDemand,
    PrefixDemand,
    StepSample,
)
from fluxmoe.core.policy.guards import ArbitrationGuard
from fluxmoe.errors import InvariantError


class Arbitration:
    """The connection between vLLM's scheduler and the workers of an engine whose split may change.

    This class implements ``controller.Demand`` for the arbiter.

    Args:
        config: FluxMoE's configuration.
        policy: The configured arbitration policy.
        inventories: Inventory of each worker, by rank.
        manager: vLLM's ``KVCacheManager``.
        watermark: vLLM's setting ``watermark``.
        max_running: Maximum number of requests that vLLM runs at once.
        block_tokens: Number of tokens per KV block.
        requests: Counts of the scheduler's requests.

    Raises:
        InvariantError: The workers' inventories differ.
    """

    def __init__(
        self,
        config: Config,
        policy: ArbitrationPolicy,
        inventories: Sequence[Inventory],
        manager: Any,
        *,
        watermark: float,
        max_running: int,
        block_tokens: int,
        requests: RequestWatch,
    ) -> None:
        inventory = inventories[0]
        if any(other != inventory for other in inventories):
            raise InvariantError("the workers' inventories differ")
        self._guard = ArbitrationGuard(
            policy,
            name=config.arbitration["kind"],
            strict=config.strict_policies,
            limits=config.policy_limits.limits(),
        )
        self.balloon = Balloon(manager, inventory.layout, inventory.groups, watermark)
        self.arbiter = Arbiter(inventory, self._guard, self.balloon, len(inventories))
        self._demand = DemandView(
            inventory.page_class, inventory.geometry.num_pages, inventory.layout.frame_bytes
        )
        self._layout, self.max_running = inventory.layout, max_running
        self._block_tokens = block_tokens
        self._requests = requests
        requests.prefixes = self._prefixes = PrefixCurve(inventory.layout.blocks)
        self._reports: list[StepReport] = []
        self._limits: OperatorLimits | None = None
        self._clock = StepClock()

    def order(self) -> Order | None:
        """Begin a step, and return the order for the workers."""
        self._clock.begins(rested=self._requests.rested)
        reports, self._reports = self._reports, []
        self._demand.update(reports)
        self._obey(reports)
        requests, demand = self._requests, self._demand
        last = StepSample(
            requests.ran,
            requests.computed,
            self._clock.seconds,
            demand.stall_seconds,
            demand.accesses,
            demand.misses,
        )
        answers = [report.answer for report in reports if report.answer is not None]
        return self.arbiter.step(
            EngineState(last, requests.running, requests.waiting, answers, self)
        )

    # --- the engine's demand, read by the arbiter -------------------------------------------------

    @property
    def preemptions(self) -> int:
        return self._requests.preemptions

    def request_blocks(self) -> float:
        blocks = self._requests.foreseen_blocks(self._block_tokens)
        # Shared prefixes are stored only once.
        return max(blocks - self._prefixes.saved(), 1.0) if blocks else 0.0

    def experts(self) -> ExpertDemand:
        return self._demand.latest()

    def prefixes(self) -> PrefixDemand:
        requests, layout = self._requests, self._layout
        return PrefixDemand(
            requests.prompt_tokens,
            requests.prefix_hits,
            layout.blocks * layout.block_bytes / layout.frame_bytes,
            self._prefixes.curve(),
        )

    # --- end of a step ----------------------------------------------------------------------------

    def _obey(self, reports: Sequence[StepReport]) -> None:
        """Apply the operator limits in the reports; all workers report the same limits."""
        limits = reports[0].limits if reports else None
        if limits is not None and limits != self._limits:
            self._limits = limits
            self.arbiter.set_limits(limits)

    def reported(self, reports: Sequence[StepReport]) -> None:
        """Record the end of a step."""
        self._clock.answered()
        self._reports += reports
