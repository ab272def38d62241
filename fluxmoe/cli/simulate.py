"""``fluxmoe simulate``: replay a trace with given policies and capacities, without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fluxmoe import sizes
from fluxmoe.cli.shared import output, table
from fluxmoe.cli.shared.options import AsCsv, AsJson, Force, Plugins, items
from fluxmoe.errors import ConfigError

if TYPE_CHECKING:
    from fluxmoe.plugins import PolicySpec
    from fluxmoe.sim.events import Events
    from fluxmoe.sim.runs import Outcome


def simulate(
    trace: Annotated[Path, typer.Argument(help="Trace file.")],
    policy: Annotated[
        list[str],
        typer.Option(
            callback=items,
            help="Eviction policies, comma-separated or repeated; options as name:option=value.",
        ),
    ],
    capacity: Annotated[
        list[str],
        typer.Option(
            callback=items,
            help="Capacities, comma-separated or repeated: a number of pages (96), a share (25%) "
            "or a size (2GiB).",
        ),
    ],
    prefetch: Annotated[
        list[str] | None,
        typer.Option(
            callback=items,
            help="Prefetch policies, in the same form as --policy, comma-separated or repeated.",
        ),
    ] = None,
    banks: Annotated[
        int, typer.Option(help="Number of banks over which the layers are distributed.")
    ] = 1,
    plugin: Plugins = None,
    contain: Annotated[
        bool,
        typer.Option(
            "--contain",
            help="Use the default answer (LRU for eviction) when a policy fails, as in an engine.",
        ),
    ] = False,
    hardware: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Hardware profile for modelling step times."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of processes; default: up to one per core for large workloads, else 1.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html", help="Write a report with curves and a table to this HTML file."
        ),
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Replay a trace with every combination of policy, capacity and prefetch policy.

    If a policy fails, the command ends with exit status 2, unless --contain is given.
    """
    from fluxmoe import plugins
    from fluxmoe.arguments import require_new
    from fluxmoe.cli.shared.hardware import profile_of
    from fluxmoe.sim import report as page
    from fluxmoe.sim.events import Events
    from fluxmoe.sim.runs import RunPlan, SimulationRun, default_jobs, execute

    if report is not None:
        require_new(report, replace=force, by="--force")
    registry = plugins.load(plugin or ())
    profile = None if hardware is None else profile_of(hardware)
    events = Events.load(trace)
    asked = [
        SimulationRun(spec(name), size, spec(ahead))
        for name in policy
        for size in capacity
        for ahead in prefetch or ["none"]
    ]
    optimum = [SimulationRun(page.OPTIMUM, size) for size in capacity]
    more = [run for run in optimum if run not in asked] if report is not None else []
    plan = RunPlan([*asked, *more], plugin or (), banks, not contain, profile)
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
    _warn_of_cycle(outcomes, events)
    results = [outcome.result.to_json() for outcome in outcomes]
    if not output.printed(as_json, as_csv, results, results):
        _print(trace, events, outcomes)


def _warn_of_cycle(outcomes: list[Outcome], events: Events) -> None:
    pages = sorted({outcome.result.capacity_pages for outcome in outcomes})
    few = [str(count) for count in pages if count < events.cycle]
    if few:
        output.warn(
            f"{', '.join(few)} slots are fewer than the {events.cycle} pages of a step: lru "
            "evicts pages before their next use"
        )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show a temporary progress bar if standard error is a terminal; yield its update function."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), "events", TimeRemainingColumn()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=total)
        yield lambda events: progress.update(task, advance=events)


def spec(text: str) -> PolicySpec:
    """Parse ``name`` or ``name:option=value:…`` into the form that the registry accepts."""
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


def _print(trace: Path, events: Events, outcomes: list[Outcome]) -> None:
    meta = events.meta
    pages = meta.geometry.num_pages
    results = [outcome.result for outcome in outcomes]
    timed = ["step ms", "stalled", "tokens/s"] if results[0].timing is not None else []
    counts = ["hit rate", "misses", "prefetch hits", "evicted", "released"]
    rows = []
    for result in results:
        cells = [
            result.policy,
            result.prefetch,
            f"{result.capacity_pages} ({result.capacity_pages / pages:.0%})",
            f"{result.hit_rate:.2%}",
            *map(str, (result.misses, result.prefetch_hits, result.evictions, result.released)),
        ]
        loaded = result.bytes_demand, result.bytes_prefetch
        cells += ["" if size is None else sizes.shown(size) for size in loaded]
        if (timing := result.timing) is not None:
            cells += [f"{timing.step_ms_mean:.2f}", f"{timing.stall_share:.1%}"]
            cells += [f"{timing.tokens_per_s:.1f}"]
        rows.append(cells)
    table.show(
        f"{trace.name}: {meta.num_layers} layers x {meta.experts_per_layer} experts = "
        f"{pages} pages, {len(events)} events of at most {events.largest} experts",
        ["policy", "prefetch"],
        ["capacity", *counts, "demand", "prefetched", *timed],
        rows,
        keys=3,
    )
    for name in sorted({outcome.result.policy for outcome in outcomes if outcome.oracle}):
        output.say(f"{name} is an oracle: it knows the trace's future; no engine can run it")
    for result in results:
        if result.policy_faults:
            output.say(
                f"{result.policy} at {result.capacity_pages} pages: {result.policy_faults} "
                "calls to a policy failed and were answered by the fallback"
            )
