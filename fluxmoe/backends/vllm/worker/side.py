"""A worker's side of the connector: metrics, the scheduler's orders, and reports of demand."""

from __future__ import annotations

import time

from fluxmoe.backends.runtime import Runtime
from fluxmoe.backends.vllm import metrics, sources
from fluxmoe.backends.vllm.board import Board
from fluxmoe.core.arbitration.demand import DemandMeter
from fluxmoe.core.arbitration.messages import Answer, Inventory, OperatorLimits, Order, StepReport
from fluxmoe.core.arbitration.moves import MoveWorker
from fluxmoe.errors import InvariantError

#: Steps between reads of the histograms, which have many buckets and are not urgent.
AGES_EVERY = 32


class WorkerSide:
    """The worker's side of the connector.

    Args:
        runtime: The worker's memory.
        rank: Rank of the worker in its tensor-parallel group.
        board: The board that the worker shares with the scheduler.
    """

    def __init__(self, runtime: Runtime, rank: int, board: Board) -> None:
        self._runtime = runtime
        #: The address at which the scheduler finds the worker's board.
        self.board = board.address
        self._meters = (
            metrics.Meter(sources.reader(runtime, rank, lambda: self.limits)),
            metrics.Meter(lambda: sources.read_ages(runtime), every=AGES_EVERY),
        )
        self._answer: Answer | None = None
        self._demand: DemandMeter | None = None
        if runtime.dynamic:
            self._demand = DemandMeter(rank, runtime.pager, seed=runtime.config.seed)
        self._moves = MoveWorker(rank, runtime.memory, runtime.pager, time.perf_counter)

    @property
    def orders(self) -> int:
        """Number of orders carried out so far."""
        return self._moves.done

    def inventory(self) -> Inventory | None:
        """Return the inventory for the scheduler; None if the split is fixed."""
        return self._runtime.inventory() if self._runtime.dynamic else None

    @property
    def limits(self) -> OperatorLimits | None:
        """The limits last set by an operator; None if no limits were set."""
        return None if self._demand is None else self._demand.limits

    def limit(self, limits: OperatorLimits) -> None:
        """Send operator limits to the scheduler with the next step."""
        if self._demand is None:
            raise InvariantError("the split is fixed")
        self._demand.limits = limits

    def receive(self, order: Order | None) -> None:
        """Begin a step with the scheduler's order."""
        self._answer = self._moves.receive(order)

    def report(self) -> StepReport | None:
        """End a step and return its report; None if the split is fixed."""
        return None if self._demand is None else self._demand.report(self._answer)

    def changes(self) -> metrics.Samples:
        """Return the changes to the metrics since the last step."""
        changes: metrics.Samples = {}
        for meter in self._meters:
            changes |= meter.take()
        return changes

    def restarted(self) -> None:
        """Account for a reset of the pager, whose counters are zero; earlier reports stay valid."""
        for meter in self._meters:
            meter.restarted()
        if self._demand is not None:
            self._demand.restarted()
