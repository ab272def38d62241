"""Rules, findings, and the error that lists broken rules."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from fluxmoe.arguments import wrong
from fluxmoe.words import line

Subject = TypeVar("Subject")
Status = Literal["kept", "broken", "does not apply", "not tried"]


class Broken(Exception):
    """An exception that the check of a rule raises if the rule is broken.

    Args:
        found: Description of the problem, including the value.
        call: The call and its location.
        mend: The remedy for the author.
    """

    def __init__(self, found: str, *, call: str = "", mend: str = "") -> None:
        # Sanitised, because they contain values and exceptions from the tested code.
        self.found, self.call, self.mend = line(found), line(call), line(mend)
        super().__init__(self.found)


@dataclass(frozen=True, slots=True)
class Rule(Generic[Subject]):
    """One rule of a contract.

    Attributes:
        name: Name of one or two words.
        sentence: The requirement.
        check: Function that raises ``Broken`` if the rule is broken; it may return the reason why
            the rule does not apply.
        essential: True if later rules are not tested when this one is broken.
    """

    name: str
    sentence: str
    check: Callable[[Subject], str | None]
    essential: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one rule; ``detail`` is the problem, or why the rule does not apply."""

    rule: str
    sentence: str
    status: Status
    detail: str = ""
    call: str = ""
    mend: str = ""

    def text(self) -> str:
        """Describe the broken rule in several lines."""
        lines = [f"broken rule: {self.rule} ({self.sentence})"]
        for label, value in (("call", self.call), ("found", self.detail), ("fix", self.mend)):
            if value:
                lines += textwrap.wrap(
                    value,
                    96,
                    initial_indent=f"  {label + ':':<7}",
                    subsequent_indent=" " * 9,
                    break_long_words=False,
                )
        return "\n".join(lines)


class ConformanceError(AssertionError):
    """A policy or codec breaks a rule of its contract.

    Attributes:
        findings: The broken rules.
    """

    def __init__(self, subject: str, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__("\n".join([subject, *(finding.text() for finding in findings)]))


def try_rules(rules: Iterable[Rule[Subject]], subject: Subject) -> list[Finding]:
    """Test every rule; after a broken essential rule, the remaining rules are not tested."""
    findings: list[Finding] = []
    going = True
    for rule in rules:
        if not going:
            findings.append(Finding(rule.name, rule.sentence, "not tried"))
            continue
        try:
            reason = rule.check(subject)
        except Broken as broken:
            parts = broken.found, broken.call, broken.mend
            findings.append(Finding(rule.name, rule.sentence, "broken", *parts))
            going = not rule.essential
        else:
            status: Status = "does not apply" if reason else "kept"
            findings.append(Finding(rule.name, rule.sentence, status, reason or ""))
    return findings


def raise_broken(
    subject: str, findings: Callable[[Callable[[], Any]], Sequence[Finding]], factory: object
) -> None:
    """Raise ConformanceError if a rule is broken, or ConfigError if the factory is invalid."""
    if not callable(factory):
        raise wrong(
            "factory", "a class, or a function that returns an instance", factory, "the kit"
        )
    broken = [finding for finding in findings(factory) if finding.status == "broken"]
    if broken:
        raise ConformanceError(subject, broken)
