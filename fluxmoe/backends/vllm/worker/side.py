"""A worker's side of the connector: metrics, orders of the scheduler, reports of demand."""

from __future__ import annotations

import time

from fluxmoe.backends.runtime import Runtime
from fluxmoe.backends.vllm import metrics
from fluxmoe.core.arbitration.demand import DemandMeter
from fluxmoe.core.arbitration.messages import Answer, ByHand, Inventory, Order, StepReport
from fluxmoe.core.arbitration.moves import Follower
from fluxmoe.errors import InvariantError

#: Steps from one look at the histograms to the next: they have many buckets, and nobody waits.
AGES_EVERY = 32


class WorkerSide:
    """What the connector asks of one worker.

    Args:
        runtime: The worker's memory.
        rank: The worker's, within its tensor-parallel group.
    """

    def __init__(self, runtime: Runtime, rank: int) -> None:
        self._runtime = runtime
        self._meters = (
            metrics.Meter(metrics.reader(runtime)),
            metrics.Meter(lambda: metrics.read_ages(runtime), every=AGES_EVERY),
        )
        self._answer: Answer | None = None
        self._demand: DemandMeter | None = None
        if runtime.dynamic:
            self._demand = DemandMeter(rank, runtime.pager, seed=runtime.config.seed)
        self._follower = Follower(rank, runtime.execute, time.perf_counter)

    @property
    def orders(self) -> int:
        """Orders carried out so far."""
        return 0 if self._answer is None else self._answer.number

    def inventory(self) -> Inventory | None:
        """What the scheduler needs to know; None if the split is fixed."""
        return self._runtime.inventory() if self._runtime.dynamic else None

    def limit(self, limits: ByHand) -> None:
        """Tell the scheduler, with the next step, what a person wants."""
        if self._demand is None:
            raise InvariantError("the split is fixed")
        self._demand.limits = limits

    def receive(self, order: Order | None) -> None:
        """A step begins."""
        self._answer = self._follower.receive(order)

    def report(self) -> StepReport | None:
        """A step has ended."""
        return None if self._demand is None else self._demand.report(self._answer)

    def changes(self) -> metrics.Samples:
        """What has changed on the metrics since the last step."""
        changes: metrics.Samples = {}
        for meter in self._meters:
            changes |= meter.take()
        return changes

    def restarted(self) -> None:
        """The pager was reset: its counters are zero, what was told before stands."""
        for meter in self._meters:
            meter.restarted()
        if self._demand is not None:
            self._demand.restarted()
