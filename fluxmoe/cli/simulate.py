"""``fluxmoe simulate``: replay a trace with policies and capacities, without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fluxmoe import sizes
from fluxmoe.cli import output
from fluxmoe.errors import ConfigError

if TYPE_CHECKING:
    from fluxmoe.plugins import PolicySpec
    from fluxmoe.sim.events import Events
    from fluxmoe.sim.runs import Outcome


def simulate(
    trace: Annotated[Path, typer.Argument(help="Trace file.")],
    policy: Annotated[
        str,
        typer.Option(help="Eviction policies, comma-separated; options as name:option=value."),
    ],
    capacity: Annotated[
        str,
        typer.Option(help="Capacities, comma-separated: pages (96), a share (25%) or 2GiB."),
    ],
    prefetch: Annotated[
        str, typer.Option(help="Prefetch policies, in the same form as eviction policies.")
    ] = "none",
    banks: Annotated[int, typer.Option(help="Number of banks for the layers.")] = 1,
    plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", metavar="FILE", help="Plugin: .py file or module; repeatable."),
    ] = None,
    strict_policies: Annotated[
        bool, typer.Option("--strict-policies", help="Stop at the first fault of a policy.")
    ] = False,
    hardware: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Hardware profile; adds step times."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Number of processes; default: one per core for large work."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a report: curves and a table.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Replay a trace with every combination of policy, capacity and prefetcher."""
    from fluxmoe import plugins
    from fluxmoe.arguments import require_new
    from fluxmoe.sim import hardware as profiles
    from fluxmoe.sim import report as page
    from fluxmoe.sim.events import Events
    from fluxmoe.sim.runs import RunPlan, SimulationRun, default_jobs, execute

    if report is not None:
        require_new(report, replace=force)
    registry = plugins.load(plugin or ())
    profile = None if hardware is None else profiles.load(hardware)
    events = Events.load(trace)
    capacities = _items(capacity, "--capacity")
    asked = [
        SimulationRun(spec(name), size, spec(ahead))
        for name in _items(policy, "--policy")
        for size in capacities
        for ahead in _items(prefetch, "--prefetch")
    ]
    optimum = [SimulationRun(page.OPTIMUM, size) for size in capacities]
    more = [run for run in optimum if run not in asked] if report is not None else []
    plan = RunPlan([*asked, *more], plugin or (), banks, strict_policies, profile)
    with _progress(len(plan.runs) * len(events)) as progress:
        outcomes = execute(
            plan,
            events,
            registry,
            jobs=default_jobs(events, len(plan.runs)) if jobs is None else jobs,
            bins=page.BINS if report is not None else 0,
            progress=progress,
        )
    if report is not None:
        page.write(report, trace.name, events, outcomes)
    outcomes = outcomes[: len(asked)]
    if as_json:
        output.print_json([outcome.result.to_json() for outcome in outcomes])
    else:
        _print_table(trace, events, outcomes)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A temporary progress bar on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), "events", TimeRemainingColumn()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=total)
        yield lambda events: progress.update(task, advance=events)


def _items(text: str, option: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise ConfigError("no values given", where=option)
    return items


def spec(text: str) -> PolicySpec:
    """Parse ``name`` or ``name:option=value:…`` into the form the registry takes."""
    name, *settings = text.split(":")
    if not settings:
        return name
    options = {"kind": name}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"not an option: {setting!r}", where=text, fix="write option=value")
        options[key] = value
    return options


def _print_table(trace: Path, events: Events, outcomes: list[Outcome]) -> None:
    from rich.table import Table

    meta = events.meta
    pages = meta.geometry.num_pages
    results = [outcome.result for outcome in outcomes]
    table = Table(
        "policy",
        "prefetch",
        title=f"{trace.name}: {meta.num_layers} layers x {meta.experts_per_layer} experts = "
        f"{pages} pages, {len(events)} events of at most {events.largest} experts",
        title_justify="left",
    )
    counts = ["hit rate", "misses", "prefetch hits", "evicted", "released"]
    timed = ["step ms", "stalled", "tokens/s"] if results[0].timing is not None else []
    for column in ["capacity", *counts, "demand", "prefetched", *timed]:
        table.add_column(column, justify="right")
    for result in results:
        cells = [
            f"{result.capacity_pages} ({result.capacity_pages / pages:.0%})",
            f"{result.hit_rate:.2%}",
            *map(str, (result.misses, result.prefetch_hits, result.evictions, result.released)),
        ]
        loaded = result.bytes_demand, result.bytes_prefetch
        cells += ["" if size is None else sizes.shown(size) for size in loaded]
        if (timing := result.timing) is not None:
            cells += [f"{timing.step_ms_mean:.2f}", f"{timing.stall_share:.1%}"]
            cells += [f"{timing.tokens_per_s:.1f}"]
        table.add_row(result.policy, result.prefetch, *cells)
    console = output.console()
    console.print(table)
    for name in sorted({outcome.result.policy for outcome in outcomes if outcome.oracle}):
        console.print(f"{name} is an oracle: it knows the trace's future; no engine can run it")
    for result in results:
        if result.policy_faults:
            console.print(
                f"{result.policy} at {result.capacity_pages} pages: {result.policy_faults} faults "
                "of a policy were answered by the fallback"
            )
