"""The contract of prefetch policies, as tests."""

from __future__ import annotations

from collections.abc import Callable

from fluxmoe.core.policy.paging import PrefetchPolicy
from fluxmoe.policies.eviction.lru import LeastRecentlyUsed
from fluxmoe.testing.conformance.audit import Auditor, gather
from fluxmoe.testing.conformance.common import (
    FAST,
    Tried,
    check_signatures,
    first_rules,
    same_again,
    unseen,
)
from fluxmoe.testing.conformance.report import Broken, Finding, Rule, raise_broken, try_rules
from fluxmoe.testing.conformance.stage import SOME, Replay, Stage, stages
from fluxmoe.words import line

Factory = Callable[[], PrefetchPolicy]


def check_prefetch_policy(factory: Factory) -> None:
    """Test a prefetch policy against its contract.

    Args:
        factory: The policy's class, or a function that makes a new policy each time.

    Raises:
        ConformanceError: A rule is broken; the message gives the rule, the call and the remedy.
    """
    raise_broken("a prefetch policy does not conform", findings, factory)


def findings(factory: Factory) -> list[Finding]:
    """Test every rule and return the results."""
    return try_rules(RULES, Tried(factory, PrefetchPolicy, _replay, SOME))


def _replay(stage: Stage, policy: PrefetchPolicy) -> Replay:
    # Stages with several banks use LRU, which evicts the pages needed next; the others use
    # ``next-use``, which keeps them.
    return Replay(stage, LeastRecentlyUsed() if stage.banks > 1 else None, policy)


def _declares(tried: Tried[PrefetchPolicy, Stage, Replay]) -> str | None:
    policy = tried.new()
    check_signatures(policy, PrefetchPolicy, {"propose": ("view", "access"), "reset": ()})
    lead: object = policy.lead
    if isinstance(lead, bool) or not isinstance(lead, int) or lead < 0:
        raise Broken(
            f"lead is {line(lead, repr)}", mend="set it to a number of layers (0: never called)"
        )
    return None


def _answers(tried: Tried[PrefetchPolicy, Stage, Replay]) -> str | None:
    auditors: list[Auditor] = []
    reached: list[Broken] = []
    for stage in stages():
        replay = tried.play(stage)
        replay.run()
        auditors.append(replay.prefetch.auditor)
        reached += [replay.prefetch.reached] if replay.prefetch.reached else []
    tried.seen = gather(auditors, next(iter(reached), None))
    return None if tried.new().lead else "lead is 0: it is never called"


RULES: list[Rule[Tried[PrefetchPolicy, Stage, Replay]]] = [
    *first_rules("prefetch", _declares, _answers),
    Rule("leads", "proposals reach no further than lead declares", unseen("reached")),
    *same_again(),
    FAST,
]
