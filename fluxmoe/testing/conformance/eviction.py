"""The contract of eviction policies, as tests."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np

from fluxmoe.core.policy.paging import EvictionPolicy
from fluxmoe.core.types import Int64s
from fluxmoe.testing.conformance.audit import AuditedEviction, gather
from fluxmoe.testing.conformance.common import (
    FAST,
    Tried,
    check_signatures,
    first_rules,
    same_again,
    unseen,
)
from fluxmoe.testing.conformance.report import Broken, Finding, Rule, raise_broken, try_rules
from fluxmoe.testing.conformance.stage import SOME, USUAL, Replay, Stage, stages
from fluxmoe.words import line, raised

Factory = Callable[[], EvictionPolicy]

_CALLS = {
    "score": ("view", "pages"),
    "make_kernel": ("view",),
    "on_access": ("view", "access"),
    "on_load": ("view", "pages"),
    "on_evict": ("view", "pages"),
    "retain": ("view", "access"),
    "select": ("view", "pages", "n"),
    "reset": (),
}


def check_eviction_policy(factory: Factory) -> None:
    """Test an eviction policy against its contract.

    Args:
        factory: The policy's class, or a function that makes a new policy each time.

    Raises:
        ConformanceError: A rule is broken; the message gives the rule, the call and the remedy.
    """
    raise_broken("an eviction policy does not conform", findings, factory)


def findings(factory: Factory) -> list[Finding]:
    """Test every rule and return the results."""
    return try_rules(RULES, Tried(factory, EvictionPolicy, _replay, SOME))


def _replay(stage: Stage, policy: EvictionPolicy) -> Replay:
    try:
        return Replay(stage, policy)
    except Broken:
        raise
    except Exception as error:  # the policy's kernel cannot be compiled
        raise Broken(raised(error), call=str(stage)) from error


def _declares(tried: Tried[EvictionPolicy, Stage, Replay]) -> str | None:
    policy = tried.new()
    check_signatures(policy, EvictionPolicy, _CALLS)
    for name in ("stable_score", "needs_future"):
        value = getattr(policy, name)
        if not isinstance(value, bool):
            raise Broken(
                f"{name} is {line(value, repr)}", mend="set it to True or False in the class"
            )
    kind = type(policy)
    kernel = inspect.getattr_static(kind, "score_kernel", None)
    if kernel is not None and not isinstance(kernel, staticmethod):
        raise Broken("score_kernel takes self", mend="put @staticmethod before it")
    own = ("score", "make_kernel", "select")
    if kernel is None and all(getattr(kind, m) is getattr(EvictionPolicy, m) for m in own):
        raise Broken(
            "it has neither score nor select, score_kernel or make_kernel",
            mend="define score(self, view, pages)",
        )
    return None


def _answers(tried: Tried[EvictionPolicy, Stage, Replay]) -> str | None:
    auditors, looks = [], False
    for stage in stages():
        replay = tried.play(stage)
        replay.run()
        auditors.append(replay.eviction.auditor)
        looks = looks or bool(replay.view.looks)
    tried.seen, tried.looks = gather(auditors), looks
    return None


def _pure(tried: Tried[EvictionPolicy, Stage, Replay]) -> str | None:
    unseen("impure")(tried)
    kind = type(tried.new())
    return None if kind.select is EvictionPolicy.select else "it selects, and select may learn"


def _stable(tried: Tried[EvictionPolicy, Stage, Replay]) -> str | None:
    policy = tried.new()
    if not policy.stable_score:
        return "stable_score is False"
    if type(policy).select is not EvictionPolicy.select:
        return "the scores of a policy with select are not used"
    known: dict[int, float] = {}

    def look(replay: Replay) -> None:
        view = replay.view
        pages = np.flatnonzero(view.resident)
        scores = np.asarray(policy.score(view, pages), np.float64)
        now = dict(zip(pages.tolist(), scores.tolist(), strict=True))
        for page, score in now.items():
            fresh = view.event in (view.last_use[page], view.loaded_at[page])
            if page in known and score != known[page] and not fresh:
                raise Broken(
                    f"the score of page {page} changed from {known[page]} to {score}, although it "
                    "was neither accessed nor loaded in between",
                    call=f"score in event {view.event}, {replay.stage}",
                    mend="set stable_score = False: the host keeps using the old score otherwise",
                )
        known.clear()
        known.update(now)

    for stage in SOME:
        known.clear()
        policy = tried.new()
        _replay(stage, policy).run(watch=look)
    return None


def _agrees(tried: Tried[EvictionPolicy, Stage, Replay]) -> str | None:
    policy = tried.new()
    kind = next((c for c in type(policy).__mro__ if "score" in vars(c)), EvictionPolicy)
    kernels = [c for c in type(policy).__mro__ if {"score_kernel", "make_kernel"} & set(vars(c))]
    if kernels[0] is EvictionPolicy or kind is not kernels[0]:
        return "score and score_kernel are not both given"

    def look(replay: Replay) -> None:
        pages = np.flatnonzero(replay.view.resident)
        asked = np.asarray(policy.score(replay.view, pages), np.float64)
        compiled = _kernel_scores(replay.eviction, pages)
        for page, one, other in zip(pages.tolist(), asked, compiled, strict=True):
            if not np.isclose(one, other, rtol=1e-9, equal_nan=True):
                raise Broken(
                    f"for page {page} score returns {one}, but score_kernel returns {other}",
                    call=f"event {replay.view.event}, {replay.stage}",
                    mend="omit score: the kernel replaces it",
                )

    _replay(USUAL, policy).run(watch=look)
    return None


def _kernel_scores(guard: AuditedEviction, pages: Int64s) -> Int64s:
    scores = guard.scores(pages)
    assert scores is not None  # otherwise the audit would have raised
    return scores.astype(np.float64)


def _foresight(tried: Tried[EvictionPolicy, Stage, Replay]) -> str | None:
    policy = tried.new()
    if not policy.needs_future:
        return "needs_future is False"  # reading the future then raises an error
    kernel = policy.make_kernel(tried.play(USUAL).view)
    asks = kernel is not None and "next_use" in inspect.signature(kernel).parameters
    if not tried.looks and not asks:
        raise Broken(
            "needs_future is True, but view.next_use was never read",
            mend="set needs_future = False, or no engine will accept the policy",
        )
    return None


RULES: list[Rule[Tried[EvictionPolicy, Stage, Replay]]] = [
    *first_rules("eviction", _declares, _answers),
    Rule("pure", "score returns the same values in the same state", _pure),
    *same_again(),
    Rule("stable", "stable_score is set only if the scores are stable", _stable),
    Rule("agrees", "score and score_kernel return the same scores", _agrees),
    Rule("foresight", "needs_future is set if the policy reads the future", _foresight),
    FAST,
]
