"""Rules, what became of each, and the error that says so."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from fluxmoe.core.words import line

Subject = TypeVar("Subject")
Status = Literal["kept", "broken", "does not apply", "not tried"]


class Broken(Exception):
    """Raised inside a rule: it is not kept.

    Args:
        found: What was found, with the value.
        call: Which call, where.
        mend: What its author can do.
    """

    def __init__(self, found: str, *, call: str = "", mend: str = "") -> None:
        # Values and exceptions of the code that was tried are in them.
        self.found, self.call, self.mend = line(found), line(call), line(mend)
        super().__init__(self.found)


@dataclass(frozen=True, slots=True)
class Rule(Generic[Subject]):
    """One rule of a contract.

    Attributes:
        name: A word or two.
        sentence: What is demanded.
        check: Raises ``Broken``; may return why the rule does not apply.
        essential: If it is broken, the rules after it are not tried: they would all say the same.
    """

    name: str
    sentence: str
    check: Callable[[Subject], str | None]
    essential: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one rule. ``detail`` tells why it does not apply."""

    rule: str
    sentence: str
    status: Status
    detail: str = ""
    call: str = ""
    mend: str = ""

    def text(self) -> str:
        """Several lines, for people."""
        lines = [f"broken rule: {self.rule} ({self.sentence})"]
        for label, value in (("call", self.call), ("found", self.detail), ("mend", self.mend)):
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
    """Try every rule; after a broken essential one the rest is not tried."""
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


def raise_broken(subject: str, findings: Sequence[Finding]) -> None:
    """Raises ConformanceError if a rule is broken."""
    broken = [finding for finding in findings if finding.status == "broken"]
    if broken:
        raise ConformanceError(subject, broken)
