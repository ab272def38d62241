"""``--report``: a self-contained HTML page with curves, timelines and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from fluxmoe.draw.charts import Chart, Line
from fluxmoe.errors import ConfigError, MissingDependencyError
from fluxmoe.sim.events import Events
from fluxmoe.sim.runs import Outcome
from fluxmoe.sim.simulator import Result

#: The policy that all others are compared to; added to the runs if not requested.
OPTIMUM = "belady"
#: Number of parts of the trace in the timelines.
BINS = 120

_TEMPLATES = Path(__file__).parent / "templates"
_COLOURS = 8
#: Maximum number of timelines; of more capacities an evenly spaced selection is shown.
_TIMELINES = 4


@dataclass(frozen=True, slots=True)
class _Row:
    kind: str
    cells: Sequence[str]


def write(path: Path, trace: str, events: Events, outcomes: Sequence[Outcome]) -> None:
    """Write the report.

    Args:
        path: HTML file to create or replace.
        trace: Name of the trace.
        events: The trace.
        outcomes: The runs, with timelines, including those of the optimum.

    Raises:
        MissingDependencyError: jinja2 is not installed.
        ConfigError: The file cannot be written.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError(
            "a report needs jinja2", where="--report", fix="pip install 'fluxmoe[report]'"
        ) from error
    meta = events.meta
    pages = meta.geometry.num_pages
    results = [outcome.result for outcome in outcomes]
    slots = _colours(results)
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("report.html.j2")
    html = template.render(
        title=trace,
        subtitle=f"{meta.model or 'unknown model'}: {meta.num_layers} layers × "
        f"{meta.experts_per_layer} experts = {pages} pages, top-{meta.top_k}; {len(events)} events "
        f"with {int(events.sizes.sum())} accesses, the largest of {events.largest} experts",
        legend=[Line(name, slot, ()) for name, slot in slots.items()],
        charts=[*_curves(results, slots, pages), *_timelines(outcomes, slots, pages)],
        notes=_notes(results),
        columns=_columns(results),
        rows=_rows(results, pages),
        version=version("fluxmoe"),
    )
    try:
        path.write_text(html, "utf-8", "backslashreplace")
    except OSError as error:
        raise ConfigError(f"cannot write the file: {error.strerror}", where=str(path)) from error


def name_of(result: Result) -> str:
    """Label of a run without its capacity."""
    return result.policy if result.prefetch == "none" else f"{result.policy} + {result.prefetch}"


def _is_optimum(result: Result) -> bool:
    return name_of(result) == OPTIMUM


def _colours(results: Sequence[Result]) -> dict[str, int]:
    names = dict.fromkeys(name_of(result) for result in results if not _is_optimum(result))
    slots = {name: i % _COLOURS + 1 for i, name in enumerate(names)}
    return {**slots, OPTIMUM: 0}


def _curves(results: Sequence[Result], slots: dict[str, int], pages: int) -> list[Chart]:
    shares = [result.capacity_pages / pages for result in results]
    low, high = min(shares), max(shares)
    if low == high:
        low, high = max(0.0, low - 0.05), low + 0.05
    ticks = [(x, f"{x:.0%}") for x in np.linspace(low, high, 5).tolist()]
    charts = []
    for title, rate in ("Hit rate", _hit_rate), ("Miss ratio", _miss_ratio):
        lines = []
        for name, slot in slots.items():
            mine = sorted(
                (result for result in results if name_of(result) == name),
                key=lambda result: result.capacity_pages,
            )
            points = [
                (
                    result.capacity_pages / pages,
                    rate(result),
                    f"{name}, {result.capacity_pages} pages: {rate(result):.2%}",
                )
                for result in mine
            ]
            lines.append(Line(name, slot, points))
        charts.append(
            Chart(f"{title} by capacity", "capacity, share of all pages", lines, ticks, _percent())
        )
    return charts


def _hit_rate(result: Result) -> float:
    return result.hit_rate


def _miss_ratio(result: Result) -> float:
    return 1.0 - result.hit_rate


def _timelines(outcomes: Sequence[Outcome], slots: dict[str, int], pages: int) -> list[Chart]:
    capacities = sorted({outcome.result.capacity_pages for outcome in outcomes})
    chosen = np.unique(np.linspace(0, len(capacities) - 1, _TIMELINES).round().astype(int))
    charts = []
    for capacity in (capacities[i] for i in chosen):
        lines = [
            Line(
                name_of(outcome.result),
                slots[name_of(outcome.result)],
                [((i + 0.5) / len(outcome.timeline), float(y), "")
                 for i, y in enumerate(outcome.timeline)],
            )
            for outcome in outcomes
            if outcome.result.capacity_pages == capacity
        ]  # fmt: skip
        title = f"Hit rate over the trace, {capacity} pages ({capacity / pages:.0%})"
        ticks = [(x, f"{x:.0%}") for x in (0.0, 0.25, 0.5, 0.75, 1.0)]
        charts.append(Chart(title, "part of the trace", lines, ticks, _percent(), dots=False))
    return charts


def _percent() -> list[tuple[float, str]]:
    return [(y, f"{y:.0%}") for y in (0.0, 0.25, 0.5, 0.75, 1.0)]


def _notes(results: Sequence[Result]) -> list[str]:
    notes = [
        f"{OPTIMUM} knows the future, so no engine can run it. It has the fewest misses possible "
        "if every miss must be admitted and nothing is prefetched."
    ]
    for result in results:
        if result.policy_faults:
            notes.append(
                f"{name_of(result)} at {result.capacity_pages} pages: {result.policy_faults} calls "
                "of a policy failed and were answered by the fallback."
            )
    return notes


def _columns(results: Sequence[Result]) -> list[str]:
    columns = ["policy", "prefetch", "capacity", "hit rate", "misses", "× optimum", "evictions"]
    columns += ["released", "prefetch hits", "demand GiB", "prefetched GiB"]
    if results[0].timing is not None:
        columns += ["step ms", "p95 ms", "stalled", "tokens/s"]
    return columns


def _rows(results: Sequence[Result], pages: int) -> list[_Row]:
    optimum = {r.capacity_pages: r.misses for r in results if _is_optimum(r)}
    rows = []
    before = None
    for result in sorted(results, key=lambda r: (r.capacity_pages, r.misses)):
        capacity = result.capacity_pages
        least = optimum[capacity]
        cells = [
            result.policy,
            result.prefetch,
            f"{capacity} ({capacity / pages:.0%})",
            f"{result.hit_rate:.2%}",
            f"{result.misses:,}",
            f"{result.misses / least:.2f}" if least else "",
            f"{result.evictions:,}",
            f"{result.released:,}",
            f"{result.prefetch_hits:,}",
            *(
                "" if size is None else f"{size / 2**30:,.1f}"
                for size in (result.bytes_demand, result.bytes_prefetch)
            ),
        ]
        if result.timing is not None:
            timing = result.timing
            cells += [
                f"{timing.step_ms_mean:.2f}",
                f"{timing.step_ms_p95:.2f}",
                f"{timing.stall_share:.1%}",
                f"{timing.tokens_per_s:,.1f}",
            ]
        kind = ["group"] if before not in (None, capacity) else []
        kind += ["optimum"] if _is_optimum(result) else []
        rows.append(_Row(" ".join(kind), cells))
        before = capacity
    return rows
