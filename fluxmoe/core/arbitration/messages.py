"""Messages of arbitration that cross processes, as plain data.

``Inventory`` goes from worker to scheduler at the start; in each step ``Order`` goes from scheduler
to worker, and ``StepReport``, with ``Answer`` and ``OperatorLimits`` in it, back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from fluxmoe.core.memory.kv import KVLayout
from fluxmoe.core.types import Budget, Geometry, PageClass


@dataclass(frozen=True, slots=True)
class Inventory:
    """Resources of each worker, the same for all: all that the scheduler's side knows of them.

    Attributes:
        frames: Budget in frames.
        geometry, page_class: Geometry and page layout of the experts.
        bank_limit: Most slots per bank; None if unlimited.
        slots: Slots per bank at the start.
        experts, kv: Minimum, target and maximum of each tenant, in frames.
        layout: Layout of the KV cache.
        groups: Number of KV groups that are committed at the start, from the first on.
    """

    frames: int
    geometry: Geometry
    page_class: PageClass
    bank_limit: int | None
    slots: tuple[int, ...]
    experts: Budget
    kv: Budget
    layout: KVLayout
    groups: int


@dataclass(frozen=True, slots=True)
class FreeKV:
    """Release the memory of KV groups. Their blocks must no longer be used."""

    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TakeKV:
    """Commit memory for KV groups."""

    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SetSlots:
    """Resize each bank of expert slots to this number of slots."""

    slots: tuple[int, ...]


Action: TypeAlias = FreeKV | TakeKV | SetSlots


@dataclass(frozen=True, slots=True)
class Order:
    """Scheduler to all workers: carry out ``action``, the ``number``-th, counted from 1."""

    number: int
    action: Action


@dataclass(frozen=True, slots=True)
class Answer:
    """Worker to scheduler: order ``number`` is done, or failed because of ``problem``.

    ``seconds`` is the time it took to carry out, by which the step is longer.
    """

    rank: int
    number: int
    problem: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class OperatorLimits:
    """Limits set by an operator, in frames; None leaves a limit as configured.

    KV cache that requests use is never taken away, whatever the limits.
    """

    total: int | None = None
    experts_min: int | None = None
    experts_max: int | None = None
    kv_min: int | None = None
    kv_max: int | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Reason of a move: the ``number``-th decision, direction ``to_kv`` or ``to_experts``.

    ``time`` is its Unix time in whole seconds.
    """

    number: int
    policy: str
    direction: str
    reason: str
    time: int


@dataclass(frozen=True, slots=True)
class StepReport:
    """One worker's last step. Plain data: it crosses processes.

    Attributes:
        rank: Rank of the worker.
        answer: Answer to the last order it carried out, if any.
        accesses, misses, loads: Counts of the step, see ``ExpertDemand``.
        stall_seconds: Time that layers waited for pages.
        load_seconds: Time to load one page, averaged over recent steps.
        curve: ``ExpertDemand.curve``; None if not sent with this step.
        limits: Limits that an operator last gave to the worker, if any.
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
