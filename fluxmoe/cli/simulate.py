"""``fluxmoe simulate``: what policies would do at which capacity, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fluxmoe.cli import output
from fluxmoe.errors import ConfigError

if TYPE_CHECKING:
    from fluxmoe.plugins import PolicySpec
    from fluxmoe.sim.events import Events
    from fluxmoe.sim.simulator import Result


def simulate(
    trace: Annotated[Path, typer.Argument(help="A trace file.")],
    policy: Annotated[
        str,
        typer.Option(help="Eviction policies, separated by commas; options as name:option=value."),
    ],
    capacity: Annotated[
        str,
        typer.Option(help="Capacities, separated by commas: pages (96), a share (25%) or 2GiB."),
    ],
    prefetch: Annotated[str, typer.Option(help="Prefetch policy.")] = "none",
    banks: Annotated[int, typer.Option(help="Banks that the layers are spread over.")] = 1,
    plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", metavar="FILE", help="A .py file or module; repeatable."),
    ] = None,
    strict_policies: Annotated[
        bool, typer.Option("--strict-policies", help="Stop at the first fault of a policy.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Replay a trace with each policy at each capacity."""
    from fluxmoe import plugins
    from fluxmoe.sim.events import Events
    from fluxmoe.sim.simulator import Simulation

    registry = plugins.load(plugin or ())
    events = Events.load(trace)
    # All are made before the first runs, so that a mistake in the last shows at once.
    runs = [
        Simulation(
            events,
            _spec(name),
            size,
            _spec(prefetch),
            registry=registry,
            banks=banks,
            strict=strict_policies,
        )
        for name in _items(policy, "--policy")
        for size in _items(capacity, "--capacity")
    ]
    results = [run.run() for run in runs]
    if as_json:
        output.print_json([result.to_json() for result in results])
    else:
        oracles = sorted({run.policy for run in runs if run.oracle})
        _print_table(trace, events, results, oracles)


def _items(text: str, option: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise ConfigError("nothing is given", where=option)
    return items


def _spec(text: str) -> PolicySpec:
    """``name`` or ``name:option=value:…`` as the registry takes it."""
    name, *settings = text.split(":")
    if not settings:
        return name
    options = {"kind": name}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"{setting!r} is no option", where=text, fix="write option=value")
        options[key] = value
    return options


def _print_table(trace: Path, events: Events, results: list[Result], oracles: list[str]) -> None:
    from rich.table import Table

    meta = events.meta
    pages = meta.geometry.num_pages
    table = Table(
        "policy",
        "prefetch",
        title=f"{trace.name}: {meta.num_layers} layers x {meta.experts_per_layer} experts = "
        f"{pages} pages, {len(events)} events, the largest of {events.largest} experts",
        title_justify="left",
    )
    counts = ["hit rate", "misses", "prefetch hits", "evicted", "released"]
    for column in ["capacity", *counts, "demand", "prefetched"]:
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            result.policy,
            result.prefetch,
            f"{result.capacity_pages} ({result.capacity_pages / pages:.0%})",
            f"{result.hit_rate:.2%}",
            f"{result.misses}",
            f"{result.prefetch_hits}",
            f"{result.evictions}",
            f"{result.released}",
            *(
                "" if size is None else output.nbytes(size)
                for size in (result.bytes_demand, result.bytes_prefetch)
            ),
        )
    console = output.console()
    console.print(table)
    for name in oracles:
        console.print(f"{name} is an oracle: it knows the trace's future, no engine can run it")
    for result in results:
        if result.policy_faults:
            console.print(
                f"{result.policy} at {result.capacity_pages} pages: {result.policy_faults} faults "
                "of a policy were answered by the fallback"
            )
