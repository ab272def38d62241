"""Everything of arbitration that crosses processes, as plain data.

``Inventory`` goes from worker to scheduler at the start, ``Order`` from scheduler to worker and
``StepReport`` back, with ``Answer`` and ``ByHand`` in it, in each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from fluxmoe.core.memory.kv import KVLayout
from fluxmoe.core.types import Budget, Geometry, PageClass


@dataclass(frozen=True, slots=True)
class Inventory:
    """What the workers have, all of them the same: the scheduler's side knows nothing else of them.

    Attributes:
        frames: The budget.
        geometry, page_class: The experts.
        bank_limit: Most slots per bank; None if there is no limit.
        slots: Slots per bank at the start.
        experts, kv: What the tenants must and may have, in frames.
        layout: The KV cache's.
        groups: KV groups that are committed at the start, from the first on.
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
    """Give up the memory of KV groups. Nobody may use their blocks any more."""

    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TakeKV:
    """Commit memory for KV groups."""

    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SetSlots:
    """Give each bank of expert slots this size."""

    slots: tuple[int, ...]


Action: TypeAlias = FreeKV | TakeKV | SetSlots


@dataclass(frozen=True, slots=True)
class Order:
    """Scheduler to all workers: carry out ``action``, the ``number``-th, counted from 1."""

    number: int
    action: Action


@dataclass(frozen=True, slots=True)
class Answer:
    """Worker to scheduler: order ``number`` is done, or failed for a reason.

    ``seconds`` is what carrying it out took; it costs the step that long.
    """

    rank: int
    number: int
    problem: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ByHand:
    """Limits that a person has set, in frames; None leaves one as it was at the start.

    What requests use of the KV cache is not taken away, whatever is said here.
    """

    total: int | None = None
    experts_min: int | None = None
    experts_max: int | None = None
    kv_min: int | None = None
    kv_max: int | None = None


@dataclass(frozen=True, slots=True)
class StepReport:
    """One worker's last step. Plain data: it crosses processes.

    Attributes:
        rank: The worker's.
        answer: To the last order it carried out, if any.
        accesses, misses, loads: Of the step, see ``ExpertDemand``.
        stall_seconds: Time that layers waited for pages.
        load_seconds: Time to load one page, averaged over recent steps.
        curve: ``ExpertDemand.curve``; None if it was not sent with this step.
        limits: What a person has told the worker last, if anything.
    """

    rank: int
    answer: Answer | None
    accesses: int
    misses: int
    loads: int
    stall_seconds: float
    load_seconds: float
    curve: tuple[float, ...] | None
    limits: ByHand | None = None
