"""``fluxmoe plugin check``: test a plugin's policies and codecs against their contracts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluxmoe.cli.shared import output, table
from fluxmoe.cli.shared.options import AsCsv, AsJson, items

if TYPE_CHECKING:
    from fluxmoe.plugins import PolicySpec, Registration, Registry
    from fluxmoe.testing.conformance.report import Finding

_MARKS = {"kept": "ok", "broken": "BROKEN", "does not apply": "-", "not tried": "?"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result for one policy or codec.

    Attributes:
        misses: Golden trace → policy → misses with room for half of the trace's pages, for this
            policy and the built-in ones; empty unless this is an eviction policy that conforms.
    """

    kind: str
    name: str
    findings: list[Finding]
    misses: Mapping[str, Mapping[str, int]]

    @property
    def conforms(self) -> bool:
        return not any(finding.status == "broken" for finding in self.findings)


def check(
    plugin: Annotated[
        str,
        typer.Argument(
            metavar="PLUGIN",
            help="A .py file, a module, an installed distribution, or the name of its entry point.",
        ),
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:OPTION=VALUE",
            callback=items,
            help="Check only these policies or codecs, with these options; comma-separated or "
            "repeated.",
        ),
    ] = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Test every policy and codec of a plugin against its contract.

    The exit status is 1 if a policy or a codec breaks a rule.
    """
    from fluxmoe import plugins
    from fluxmoe.plugins.loading import entries_called

    entries = [found.name for found in entries_called(plugin)]
    registry = plugins.load([] if entries else [plugin])
    for name in entries:
        registry.require(name)
    brought = [r for r in registry.everything() if r.plugin in (entries or [plugin])]
    verdicts = [
        _tried(registry, registration, spec)
        for registration, spec in _wanted(brought, policy or [], plugin)
    ]
    data = [_as_json(verdict) for verdict in verdicts]
    if not output.printed(as_json, as_csv, data, _lines(data)):
        for verdict in verdicts:
            _print(verdict)
    if not all(verdict.conforms for verdict in verdicts):
        sys.exit(1)


def _wanted(
    registrations: list[Registration], asked: list[str], plugin: str
) -> list[tuple[Registration, PolicySpec]]:
    """List the registrations to check, each with the specification to create it from."""
    from fluxmoe.cli.simulate import spec
    from fluxmoe.errors import ConfigError, join, meant
    from fluxmoe.plugins import name_of

    if not asked:
        return [(registration, registration.name) for registration in registrations]
    found = []
    for text in asked:
        made = spec(text)
        name = name_of(made)
        known = [registration.name for registration in registrations]
        matching = [registration for registration in registrations if registration.name == name]
        if not matching:
            raise ConfigError(
                f"{plugin} registers no {name!r}",
                where="--policy",
                fix=join(meant(name, known), f"it registers {', '.join(known)}"),
            )
        found += [(registration, made) for registration in matching]
    return found


def _tried(registry: Registry, registration: Registration, spec: PolicySpec) -> Verdict:
    from fluxmoe.testing.conformance import arbitration, codec, eviction, prefetch

    kind = registration.kind
    try_all: dict[str, Callable[[Callable[[], Any]], list[Finding]]] = {
        "eviction": eviction.findings,
        "prefetch": prefetch.findings,
        "arbitration": arbitration.findings,
        "codec": codec.findings,
    }
    findings = try_all[kind](partial(registry.create, kind, spec))
    verdict = Verdict(kind, registration.name, findings, {})
    if kind != "eviction" or not verdict.conforms:
        return verdict
    return Verdict(kind, registration.name, findings, _misses(registry, spec))


def _misses(registry: Registry, spec: PolicySpec) -> dict[str, dict[str, int]]:
    from fluxmoe.sim.simulator import simulate
    from fluxmoe.testing.golden import GOLDEN

    table = {}
    for name in ("sparse", "mixed", "scan"):
        trace = GOLDEN[name]
        own = simulate(trace.events, spec, trace.capacities[1], registry=registry).misses
        known = {policy: misses[1] for policy, misses in trace.misses.items()}
        table[name] = {"this": own, **known}
    return table


def _as_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "kind": verdict.kind,
        "name": verdict.name,
        "conforms": verdict.conforms,
        "rules": [
            {
                "rule": finding.rule,
                "sentence": finding.sentence,
                "status": finding.status,
                "detail": finding.detail,
                "call": finding.call,
                "mend": finding.mend,
            }
            for finding in verdict.findings
        ],
        "misses": verdict.misses,
    }


def _lines(data: list[dict[str, Any]]) -> Iterator[dict[str, object]]:
    """Yield a row for each rule, and a row for each policy's misses on each golden trace."""
    for verdict in data:
        named = {"kind": verdict["kind"], "name": verdict["name"]}
        for rule in verdict["rules"]:
            yield {**named, **rule}
        for trace, misses in verdict["misses"].items():
            for policy, count in misses.items():
                yield {**named, "trace": trace, "policy": policy, "misses": count}


def _print(verdict: Verdict) -> None:
    noun = verdict.kind if verdict.kind == "codec" else f"{verdict.kind} policy"
    title = f"{noun} {verdict.name}"
    rows = []
    for finding in verdict.findings:
        said = finding.sentence
        if finding.status == "does not apply":
            said = f"does not apply: {finding.detail}"
        rows.append([_MARKS[finding.status], finding.rule, said])
    table.show(title, ["", "rule", "requirement"], [], rows)
    for finding in verdict.findings:
        if finding.status == "broken":
            output.say(finding.text())
    if verdict.misses:
        table.show(
            "misses with room for half of the pages:",
            ["golden trace"],
            list(next(iter(verdict.misses.values()))),
            [[trace, *map(str, misses.values())] for trace, misses in verdict.misses.items()],
        )
    output.say(f"{title} {'conforms' if verdict.conforms else 'does not conform'}")
