"""Rules that policies of several kinds have in common."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fluxmoe.core.words import line, raised
from fluxmoe.testing.conformance.audit import Seen
from fluxmoe.testing.conformance.report import Broken

Counts = npt.NDArray[np.int32]


class Played(Protocol):
    """A scene under way: ``stage.Replay`` and ``arbitration.Run``."""

    def run(self, share: float = 1.0) -> Counts:
        """Go on up to that share of the scene; one count per turn."""

    def restart(self) -> None:
        """From the beginning again, after ``reset()`` of the policy."""


Policy = TypeVar("Policy")
Scene = TypeVar("Scene")
Play = TypeVar("Play", bound=Played)


class Tried(Generic[Policy, Scene, Play]):
    """A policy that is tried, and what has been seen of it so far.

    Args:
        factory: Makes it.
        base: The class it must be of.
        play: Puts a policy into a scene.
        some: Scenes for the rules that play one several times.
        unit, turn: What a play counts, and of what: ``misses`` of each ``event``.

    Attributes:
        seen: What the audits of all scenes have noted, once they have run.
        looks: Whether it read the future there.
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
        """A new policy."""
        return new(self._factory)

    def play(self, scene: Scene) -> Play:
        """A scene with a new policy, ready to run."""
        return self._play(scene, self.new())

    def same(self, first: Counts, second: Counts, scene: Scene, found: str, mend: str) -> None:
        """Raises Broken where two runs differ."""
        differ = np.flatnonzero(first != second)
        if len(differ):
            at = int(differ[0])
            raise Broken(
                f"{found}: {first[at]} {self._unit}, then {second[at]}, in {self._turn} {at}",
                call=str(scene),
                mend=mend,
            )


def new(factory: Callable[[], Policy]) -> Policy:
    """What the factory makes."""
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
    """The factory makes a policy of the right kind, another one each time."""
    first, second = tried.new(), tried.new()
    if not isinstance(first, tried.base):
        raise Broken(
            f"the factory made {line(first, repr)}",
            mend=f"derive the policy from fluxmoe.{tried.base.__name__}",
        )
    if first is second:
        raise Broken(
            "the factory gave the same object twice",
            mend="make a new one each time: the simulator runs several in one process",
        )


def check_signatures(policy: object, base: type, calls: Mapping[str, tuple[str, ...]]) -> None:
    """Every method can be called as the host calls it, and no hook is misspelt."""
    for name, arguments in calls.items():
        if getattr(type(policy), name) is getattr(base, name):
            continue
        check_signature(getattr(policy, name), name, arguments)
    for name in dir(type(policy)):
        if name.startswith("on_") and name not in calls:
            near = difflib.get_close_matches(name, calls, 1)
            raise Broken(
                f"{name} is never called",
                mend=f"is {near[0]} meant?" if near else "begin names of your own differently",
            )


def check_signature(method: object, name: str, arguments: tuple[str, ...]) -> None:
    """A bound method can be called with so many arguments."""
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


def check_sees_only(tried: Tried[Any, Any, Any]) -> None:
    """Nothing that was shown has changed."""
    assert tried.seen is not None
    if tried.seen.wrote is not None:
        raise tried.seen.wrote


def check_fast(tried: Tried[Any, Any, Any]) -> None:
    """No method is slow every time."""
    assert tried.seen is not None
    if tried.seen.slow is not None:
        raise tried.seen.slow


def check_repeats(tried: Tried[Any, Any, Any]) -> None:
    """Two new policies miss the same."""
    for scene in tried.some:
        first, second = tried.play(scene).run(), tried.play(scene).run()
        tried.same(
            first,
            second,
            scene,
            "two new policies decide differently",
            "draw from view.rng only; no time, no hash, no order of a set, nothing in the class",
        )


def check_resets(tried: Tried[Any, Any, Any]) -> None:
    """A policy that was reset decides like a new one."""
    for scene in tried.some:
        used = tried.play(scene)
        used.run(0.5)
        used.restart()
        tried.same(
            tried.play(scene).run(),
            used.run(),
            scene,
            "after reset() it decides differently from a new one",
            "let reset() forget all that was learnt; __init__ can call it",
        )


def check_alone(tried: Tried[Any, Any, Any]) -> None:
    """A policy does not notice that another one runs beside it."""
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
            "keep what is learnt in self, not in the class or the module",
        )
