"""Rules shared by several kinds of policies."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fluxmoe.testing.conformance.audit import Seen
from fluxmoe.testing.conformance.report import Broken, Rule
from fluxmoe.words import line, raised

Counts = npt.NDArray[np.int32]


class Played(Protocol):
    """A scene in progress: ``stage.Replay`` or ``arbitration.PolicyRun``."""

    def run(self, share: float = 1.0) -> Counts:
        """Continue up to ``share`` of the scene; return one count per turn."""

    def restart(self) -> None:
        """Restart from the beginning, after the policy's ``reset()``."""


Policy = TypeVar("Policy")
Scene = TypeVar("Scene")
Play = TypeVar("Play", bound=Played)


class Tried(Generic[Policy, Scene, Play]):
    """A policy under test, and the observations so far.

    Args:
        factory: Function that makes the policy.
        base: The required base class.
        play: Function that prepares a scene with a policy.
        some: Scenes for rules that run a scene several times.
        unit, turn: Names of the counted quantity and of its interval, such as ``misses`` per
            ``event``.

    Attributes:
        seen: Audit records of all scenes; None until the scenes have run.
        looks: True if the policy read the future in any scene.
    """

    def __init__(
        self,
        factory: Callable[[], Policy],
        base: type,
        play: Callable[[Scene, Policy], Play],
        some: Sequence[Scene],
        unit: str = "misses",
        turn: str = "event",
    ) -> None:
        self._factory, self.base, self._play = factory, base, play
        self.some, self._unit, self._turn = some, unit, turn
        self.seen: Seen | None = None
        self.looks = False

    def new(self) -> Policy:
        """Make a new policy."""
        return new(self._factory)

    def play(self, scene: Scene) -> Play:
        """Prepare a scene with a new policy."""
        return self._play(scene, self.new())

    def same(self, first: Counts, second: Counts, scene: Scene, found: str, mend: str) -> None:
        """Raise Broken if two runs differ."""
        differ = np.flatnonzero(first != second)
        if len(differ):
            at = int(differ[0])
            raise Broken(
                f"{found}: {first[at]} {self._unit}, then {second[at]}, in {self._turn} {at}",
                call=str(scene),
                mend=mend,
            )


def new(factory: Callable[[], Policy]) -> Policy:
    """Call the factory; raise Broken if it fails."""
    try:
        return factory()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise Broken(
            f"the factory raised {raised(error)}",
            mend="give every option a default, or pass a function that sets it",
        ) from error


def check_made(tried: Tried[Any, Any, Any]) -> None:
    """Check that the factory makes a new policy of the right kind each time."""
    first, second = tried.new(), tried.new()
    if not isinstance(first, tried.base):
        raise Broken(
            f"the factory made {line(first, repr)}",
            mend=f"derive the policy from fluxmoe.{tried.base.__name__}",
        )
    if first is second:
        raise Broken(
            "the factory returned the same object twice",
            mend="make a new object each time: the simulator runs several in one process",
        )


def check_signatures(policy: object, base: type, calls: Mapping[str, tuple[str, ...]]) -> None:
    """Check that methods accept the host's calls and that no hook is misspelt."""
    for name, arguments in calls.items():
        if getattr(type(policy), name) is getattr(base, name):
            continue
        check_signature(getattr(policy, name), name, arguments)
    for name in dir(type(policy)):
        if name.startswith("on_") and name not in calls:
            near = difflib.get_close_matches(name, calls, 1)
            raise Broken(
                f"{name} is never called",
                mend=f"did you mean {near[0]}?" if near else "use names without the prefix on_",
            )


def check_signature(method: object, name: str, arguments: tuple[str, ...]) -> None:
    """Check that a bound method can be called with these arguments."""
    if not callable(method):
        raise Broken(
            f"{name} is {line(method, repr)}, not a method", mend=f"define {name} as a method"
        )
    try:
        inspect.signature(method).bind(*arguments)
    except TypeError as error:
        raise Broken(
            f"{name}{inspect.signature(method)} cannot be called: {error}",
            call=f"{name}({', '.join(arguments)})",
            mend=f"write def {name}({', '.join(('self', *arguments))})",
        ) from None


def unseen(breach: str) -> Callable[[Tried[Any, Any, Any]], None]:
    """Make a check that the audits found no ``breach``, which is an attribute of ``Seen``."""

    def check(tried: Tried[Any, Any, Any]) -> None:
        found: Broken | None = getattr(tried.seen, breach)
        if found is not None:
            raise found

    return check


def check_repeats(tried: Tried[Any, Any, Any]) -> None:
    """Check that two new policies lead to the same counts."""
    for scene in tried.some:
        first, second = tried.play(scene).run(), tried.play(scene).run()
        tried.same(
            first,
            second,
            scene,
            "two new policies decide differently",
            "use only view.rng for randomness; avoid time, hashes, set order and class attributes",
        )


def check_resets(tried: Tried[Any, Any, Any]) -> None:
    """Check that a policy decides like a new one after ``reset()``."""
    for scene in tried.some:
        used = tried.play(scene)
        used.run(0.5)
        used.restart()
        tried.same(
            tried.play(scene).run(),
            used.run(),
            scene,
            "after reset() it decides differently from a new one",
            "make reset() clear all state; __init__ can call it",
        )


def check_alone(tried: Tried[Any, Any, Any]) -> None:
    """Check that a policy is not affected by another policy that runs at the same time."""
    for scene in tried.some:
        alone = tried.play(scene).run()
        first, second = tried.play(scene), tried.play(scene)
        first.run(0.5)
        second.run()
        tried.same(
            alone,
            first.run(),
            scene,
            "it decides differently while another one of its kind runs",
            "keep state in self, not in the class or the module",
        )


#: A rule of one kind of policy.
Check = Callable[[Any], str | None]
FAST: Rule[Any] = Rule("fast", "no call repeatedly takes longer than 5 ms", unseen("slow"))


def first_rules(
    kind: str, declares: Check, answers: Check, every: str = "at every size"
) -> list[Rule[Any]]:
    """Make the rules with which policies of any kind are tested first."""
    return [
        Rule("made", f"the factory makes a new {kind} policy each time", check_made, True),
        Rule("declared", "declarations and parameters are as the host expects", declares, True),
        Rule("answers", f"every call returns a valid answer {every}", answers, True),
        Rule("looks only", "the inputs are not modified", unseen("wrote")),
    ]


def same_again(
    sentence: str = "the same events and seed lead to the same misses",
) -> list[Rule[Any]]:
    """Make the rules that two runs must agree, for new, reset and concurrent policies."""
    return [
        Rule("repeats", sentence, check_repeats),
        Rule("resets", "after reset(), it behaves like a new policy", check_resets),
        Rule("alone", "two policies of one kind share no state", check_alone),
    ]
