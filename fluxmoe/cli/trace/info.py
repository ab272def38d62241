"""``fluxmoe trace info``: statistics of a trace, as numbers and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fluxmoe import sizes
from fluxmoe.cli import output

if TYPE_CHECKING:
    from rich.console import Console

    from fluxmoe.trace.statistics import Statistics


def info(
    trace: Annotated[Path, typer.Argument(help="Trace file.")],
    picture: Annotated[
        Path | None, typer.Option(help="Also draw it to this file (.svg, or .png with Pillow).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe a trace: skew, working sets, reuse distances, overlap, union per batch."""
    from fluxmoe.arguments import require_new
    from fluxmoe.trace import picture as pictures
    from fluxmoe.trace.statistics import describe

    if picture is not None:
        require_new(picture, replace=force)
    statistics = describe(trace)
    if picture is not None:
        pictures.draw(statistics, picture, f"{trace.name}: {statistics.meta.model}")
    if as_json:
        output.print_json(statistics.to_json())
        return
    _print(output.console(), trace, statistics)


def _print(console: Console, trace: Path, s: Statistics) -> None:
    from rich.table import Table

    meta, pages = s.meta, s.meta.geometry.num_pages
    size = "unknown size" if meta.page_bytes is None else f"{sizes.shown(meta.page_bytes)} each"
    decode = s.events - s.prefill_events
    console.print(
        f"{trace.name}: {meta.model or 'unnamed model'}, recorded by {meta.source or 'unknown'}\n"
        f"{meta.num_layers} layers x {meta.experts_per_layer} experts = {pages} pages of {size}, "
        f"top {meta.top_k}\n"
        f"{s.steps} steps, {s.events} events ({s.prefill_events} prefill, {decode} decode), "
        f"{s.requests or 'unknown'} requests\n"
        f"{s.routed} routed experts, {s.accesses} accesses (distinct per event), {s.pages_used} "
        f"pages used" + (f"\nadditional columns: {', '.join(s.columns)}" if s.columns else ""),
        highlight=False,
    )
    table = Table("layer", title="Skew and locality", title_justify="left")
    for column in ("Gini", "entropy", "top tenth", "used", "overlap", "predicted"):
        table.add_column(column, justify="right")
    for index, layer in enumerate(s.layers):
        table.add_row(
            str(index),
            f"{layer.gini:.2f}",
            f"{layer.entropy:.3f}",
            f"{layer.top_share:.1%}",
            str(layer.experts_used),
            _share(layer.overlap),
            _share(layer.predicted),
        )
    console.print(table)
    table = Table("window, steps", title="Working sets", title_justify="left")
    for column in ("mean pages", "of all", "most pages"):
        table.add_column(column, justify="right")
    for one in s.working_sets:
        table.add_row(
            str(one.steps),
            f"{one.mean_pages:.1f}",
            f"{one.mean_pages / pages:.1%}",
            str(one.max_pages),
        )
    console.print(table)
    table = Table("tokens", title="Union per event", title_justify="left")
    for column in ("events", "mean experts", "if uniform"):
        table.add_column(column, justify="right")
    for union in s.unions:
        lower, upper = union.tokens_from, union.tokens_to
        table.add_row(
            f"{lower}" if lower == upper else f"{lower}–{upper}",
            str(union.events),
            f"{union.mean_experts:.1f}",
            f"{union.uniform:.1f}",
        )
    console.print(table)
    quantiles = ", ".join(f"{float(q):.0%} {n}" for q, n in s.reuse.quantiles.items())
    console.print(
        f"Reuse distance in events, quantiles: {quantiles or 'nothing is used twice'} "
        f"({s.reuse.first_uses} first uses, {s.reuse.reuses} reuses)",
        highlight=False,
    )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
