"""A plan for a budget: its splits, the best split, a verdict on paging, and advice as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fluxmoe.core.memory import sizing
from fluxmoe.core.memory.host import frame_bytes_for
from fluxmoe.core.paging.waves import most_loads
from fluxmoe.dimensions import Model
from fluxmoe.errors import BudgetTooSmallError
from fluxmoe.plan import cost
from fluxmoe.plan.cost import Floats, PlannedWorkload, Splits
from fluxmoe.sim.hardware import Profile
from fluxmoe.sizes import apart, at_least, shown

#: Minimum relative gain for recommending paging, or a split other than the automatic one.
GAIN = 0.05
#: Among the splits within this fraction of the best, the one that streams least is recommended.
_ALIKE = 0.005
#: Number of tokens of the prefill for which the bound on the loads of a layer is printed.
_CHUNK = 512
#: Larger budgets that a plan compares, as multiples of half the budget.
_MORE = (3, 4, 8)
#: Approximate number of points in the curve.
_POINTS = 65

#: ``nothing``: all experts fit, and paging gains nothing. ``share``: all experts fit, but part of
#: their memory is better used for KV cache. ``needed``: the experts do not fit.
Verdict = Literal["nothing", "share", "needed"]


@dataclass(frozen=True, slots=True)
class Point:
    """One split and its predicted performance, with sizes in bytes and times in milliseconds."""

    expert_bytes: int
    resident_pages: int
    resident_share: float
    kv_bytes: int
    requests: int
    step_ms: float
    stall_ms: float
    tokens_per_s: float
    prefetch: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The result of ``fluxmoe plan``.

    Attributes:
        memory: The budget, in bytes.
        hardware: Name of the profile.
        assumption: Description of the miss-ratio curve.
        verdict: Benefit of paging.
        resident: The split with all experts resident, without paging; None if the experts and one
            request do not fit.
        automatic: The initial split if no target is set (docs/concepts/memory.md).
        recommended: The best split.
        curve: Splits in order, from the fewest resident experts to the most.
        advice: The plan in sentences.
    """

    model: Model
    memory: int
    work: PlannedWorkload
    hardware: str
    assumption: str
    verdict: Verdict
    resident: Point | None
    automatic: Point
    recommended: Point
    curve: tuple[Point, ...]
    advice: tuple[str, ...]


def make(
    model: Model,
    profile: Profile,
    work: PlannedWorkload,
    memory: int,
    curve: Floats,
    assumption: str,
) -> Plan:
    """Compare all splits of ``memory`` bytes.

    Args:
        model, profile, work: The model, the machine and the load.
        memory: Bytes for experts and KV cache.
        curve: Miss ratio for each number of slots from 0 to all pages.
        assumption: Description of the curve.

    Raises:
        BudgetTooSmallError: The experts of one token and one request do not fit.
    """
    require_room(model, work, memory)
    splits = _splits(model, profile, work, memory, curve)
    slots, rates = splits.slots, splits.tokens_per_s
    least, most = int(slots[0]), int(slots[-1])
    best = int(np.flatnonzero(rates >= rates.max() * (1 - _ALIKE))[-1])
    whole = len(slots) - 1 if most == model.pages else None
    verdict: Verdict = "needed"
    if whole is not None:
        verdict = "share" if rates[best] > rates[whole] * (1 + GAIN) else "nothing"
        best = best if verdict == "share" else whole

    def point(index: int) -> Point:
        return _point(model, memory, splits, index)

    shown = np.unique(np.append(np.linspace(0, len(slots) - 1, _POINTS).round().astype(int), best))
    resident = None if whole is None else point(whole)
    recommended, automatic = point(best), point(_first_split(model, work, memory, least, most))
    words = _words(model, memory, work, verdict, resident, recommended, automatic, profile)
    if verdict == "needed":
        words += _with_more(model, profile, work, memory, curve)
    return Plan(
        model,
        memory,
        work,
        profile.name,
        assumption,
        verdict,
        resident,
        automatic,
        recommended,
        tuple(point(int(index)) for index in shown),
        tuple(words),
    )


def require_room(model: Model, work: PlannedWorkload, memory: int) -> None:
    """Raise BudgetTooSmallError unless the experts of one token and one request fit."""
    least = model.top_k * model.page_bytes + model.request_bytes(work.tokens)
    if memory < least:
        given, needed = apart(memory, least)
        raise BudgetTooSmallError(
            f"{given} is too little: the {model.top_k} experts of one token and one request "
            f"of {work.tokens} tokens need {needed}",
            where="--memory",
            fix=f"give at least {at_least(least)}, or lower --context",
        )


def _splits(
    model: Model, profile: Profile, work: PlannedWorkload, memory: int, curve: Floats
) -> Splits:
    """Evaluate all splits of ``memory`` bytes, in ascending order of the number of slots."""
    most = min(model.pages, (memory - model.request_bytes(work.tokens)) // model.page_bytes)
    least = model.experts if most >= model.experts else model.top_k
    return cost.splits(model, profile, work, memory, np.arange(least, most + 1), curve)


def _with_more(
    model: Model, profile: Profile, work: PlannedWorkload, memory: int, curve: Floats
) -> list[str]:
    """Describe the rates with more memory, up to enough for all experts and all requests."""
    enough = model.experts_bytes + work.requests * model.request_bytes(work.tokens)
    budgets = [min(memory * times // 2, enough) for times in _MORE]
    rates = {
        budget: _splits(model, profile, work, budget, curve).tokens_per_s.max()
        for budget in budgets
        if budget > memory
    }
    said = ", ".join(f"{rate:.1f} with {shown(budget)}" for budget, rate in rates.items())
    return [f"With more memory, tokens/s: {said}."] if said else []


def _point(model: Model, memory: int, splits: Splits, index: int) -> Point:
    slots = int(splits.slots[index])
    experts = slots * model.page_bytes
    streams = slots < model.pages
    return Point(
        expert_bytes=experts,
        resident_pages=slots,
        resident_share=slots / model.pages,
        kv_bytes=memory - experts,
        requests=int(splits.requests[index]),
        step_ms=float(splits.seconds[index]) * 1e3,
        stall_ms=float(splits.waits[index]) * 1e3,
        tokens_per_s=float(splits.tokens_per_s[index]),
        prefetch="next-layer" if streams and splits.ahead[index] else "none",
    )


def _first_split(model: Model, work: PlannedWorkload, memory: int, least: int, most: int) -> int:
    """Return the index of the engine's initial split."""
    frame = frame_bytes_for(memory)
    need = least * model.page_bytes
    one = model.request_bytes(work.tokens)
    experts, _ = sizing.first_split(
        memory,
        frame,
        sizing.Wish(need // frame, -(-model.experts_bytes // frame)),
        sizing.Wish(one // frame, -(-one * work.requests // frame)),
    )
    slots = np.clip(experts.target * frame // model.page_bytes, least, most)
    return int(slots) - least


def _words(
    model: Model,
    memory: int,
    work: PlannedWorkload,
    verdict: Verdict,
    resident: Point | None,
    best: Point,
    automatic: Point,
    profile: Profile,
) -> list[str]:
    asked = f"{work.requests} requests of {work.tokens} tokens"
    words = [
        f"{model.pages} experts take {shown(model.experts_bytes)}; a request of {work.tokens} "
        f"tokens takes {shown(model.request_bytes(work.tokens))} of KV cache. The other weights, "
        f"{shown(model.other_bytes)}, lie outside the budget of {shown(memory)}."
    ]
    if resident is None:
        short = model.experts_bytes + model.request_bytes(work.tokens) - memory
        words.append(
            f"The experts and one request do not fit: {shown(short)} more is needed. Without "
            "paging this model cannot be served in this budget."
        )
    else:
        words.append(
            f"All experts fit, with room for {resident.requests} of {asked}: "
            f"{resident.tokens_per_s:.0f} tokens/s."
        )
    if verdict == "nothing":
        words.append(
            "Paging does not pay here: no split gains more than "
            f"{GAIN:.0%}. Serve the model without paging."
        )
        return words
    gain = ""
    if resident is not None:
        gain = f" ({best.tokens_per_s / resident.tokens_per_s:.2f} times as many as without paging)"
    words.append(
        f"The best split keeps {best.resident_share:.1%} of the experts resident "
        f"({shown(best.expert_bytes)}) and leaves {shown(best.kv_bytes)} of KV cache, "
        f"for {best.requests} requests at once: {best.tokens_per_s:.0f} tokens/s{gain}, "
        f"{best.stall_ms:.1f} of {best.step_ms:.1f} ms a step waiting for experts."
    )
    if best.stall_ms > best.step_ms / 2:
        source = "disk" if profile.store == "disk" else "link"
        words.append(f"The {source} is the bottleneck: most of a step is waiting for experts.")
    if best.requests < work.requests:
        words.append(f"The KV cache holds {best.requests} of {asked}; the others wait.")
    cycle = model.moe_layers * model.top_k
    if best.resident_pages < cycle:
        words.append(
            f"{best.resident_pages} slots are fewer than the {cycle} pages of one token: lru "
            "evicts pages before their next use."
        )
    if best.resident_pages < model.experts:
        loads = most_loads(_CHUNK * model.top_k, model.experts, model.top_k, best.resident_pages)
        words.append(
            f"{best.resident_pages} slots do not hold the {model.experts} experts of a layer, so "
            f"layers run in waves of tokens: a prefill of {_CHUNK} tokens loads at most {loads} "
            f"pages in each layer ({shown(loads * model.page_bytes)}), "
            f"{loads / model.experts:.0f} times the layer."
        )
    if best.prefetch == "next-layer":
        words.append("Copying whole layers ahead beats loading on demand: prefetch next-layer.")
    if automatic.tokens_per_s * (1 + GAIN) < best.tokens_per_s:
        words.append(
            f"Set memory.experts.target: {best.expert_bytes >> 20}MiB. Without a target FluxMoE "
            f"begins with KV cache for all requests: {automatic.tokens_per_s:.0f} tokens/s."
        )
    words.append("The load changes while serving: arbitration: marginal follows it.")
    return words
