"""Arbitration messages that cross processes, as plain data.

Each worker sends an ``Inventory`` to the scheduler at startup. In each step, the scheduler may send
an ``Order`` and receives a ``StepReport``, which may contain an ``Answer`` and ``OperatorLimits``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from fluxmoe.core.memory.kv import KVLayout
from fluxmoe.core.types import Budget, Geometry, PageClass


@dataclass(frozen=True, slots=True)
class Inventory:
    """Resources of a worker, identical on all workers, as sent to the scheduler.

    Attributes:
        frames: Budget in frames.
        geometry, page_class: Geometry and page layout of the experts.
        bank_limit: Maximum number of slots per bank; None if unlimited.
        minimum: Minimum number of slots per bank.
        slots: Initial number of slots of each bank.
        experts, kv: Minimum, target and maximum of each tenant, in frames.
        layout: Layout of the KV cache.
        groups: Number of KV groups committed at startup, beginning with the first.
    """

    frames: int
    geometry: Geometry
    page_class: PageClass
    bank_limit: int | None
    minimum: int
    slots: tuple[int, ...]
    experts: Budget
    kv: Budget
    layout: KVLayout
    groups: int


@dataclass(frozen=True, slots=True)
class FreeKV:
    """Release the memory of KV groups whose blocks are no longer in use."""

    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TakeKV:
    """Commit memory for KV groups."""

    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SetSlots:
    """Resize the banks of expert slots to these numbers of slots."""

    slots: tuple[int, ...]


Action: TypeAlias = FreeKV | TakeKV | SetSlots


@dataclass(frozen=True, slots=True)
class Order:
    """Order from the scheduler to all workers to carry out ``action``, numbered from 1."""

    number: int
    action: Action


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer from a worker to the scheduler: order ``number`` is done, or failed (``problem``).

    ``seconds`` is the time that the order took, which lengthens the step.
    """

    rank: int
    number: int
    problem: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class OperatorLimits:
    """Limits set by an operator, in frames; None leaves a limit as configured.

    KV cache that requests use is never taken away, whatever the limits are.
    """

    total: int | None = None
    experts_min: int | None = None
    experts_max: int | None = None
    kv_min: int | None = None
    kv_max: int | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision to move memory, with its number, its direction and the reason for it.

    ``direction`` is ``to_kv`` or ``to_experts``; ``time`` is the Unix time in whole seconds.
    """

    number: int
    policy: str
    direction: str
    reason: str
    time: int


@dataclass(frozen=True, slots=True)
class StepReport:
    """A worker's report on the last step.

    Attributes:
        rank: Rank of the worker.
        answer: Answer to the last order that was carried out, if any.
        accesses, misses, loads: Counts for the step (see ``ExpertDemand``).
        stall_seconds: Time that layers waited for pages.
        load_seconds: Time to load one page, averaged over recent steps.
        curve: ``ExpertDemand.curve``; None if this report does not include a curve.
        limits: Limits that an operator last set on this worker, if any.
    """

    rank: int
    answer: Answer | None
    accesses: int
    misses: int
    loads: int
    stall_seconds: float
    load_seconds: float
    curve: tuple[float, ...] | None
    limits: OperatorLimits | None = None
