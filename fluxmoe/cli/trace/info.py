"""``fluxmoe trace info``: print statistics of a trace, and draw them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluxmoe import sizes
from fluxmoe.cli.shared import output, table
from fluxmoe.cli.shared.options import AsCsv, AsJson, Force

if TYPE_CHECKING:
    from fluxmoe.trace.statistics import Statistics


def info(
    trace: Annotated[Path, typer.Argument(help="Trace file.")],
    picture: Annotated[
        Path | None, typer.Option(help="Also draw to this file (.svg, or .png with Pillow).")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Describe a trace: skew, working sets, reuse, overlap, and distinct experts per event."""
    from fluxmoe.arguments import require_new
    from fluxmoe.trace import picture as pictures
    from fluxmoe.trace.statistics import describe

    if picture is not None:
        require_new(picture, replace=force, by="--force")
    statistics = describe(trace)
    if picture is not None:
        pictures.draw(statistics, picture, f"{trace.name}: {statistics.meta.model}")
    data = statistics.to_json()
    if not output.printed(as_json, as_csv, data, _lines(data)):
        _print(trace, statistics)


def _lines(data: dict[str, Any]) -> Iterator[dict[str, object]]:
    """Yield the rows of all tables, each with the name of its table."""
    for name in ("layers", "working_sets", "unions"):
        for index, row in enumerate(data[name]):
            yield {"table": name, **({"layer": index} if name == "layers" else {}), **row}
    for name, value in data["reuse"]["quantiles"].items():
        yield {"table": "reuse", "quantile": name, "distance": value}


def _print(trace: Path, s: Statistics) -> None:
    meta, pages = s.meta, s.meta.geometry.num_pages
    size = "unknown size" if meta.page_bytes is None else f"{sizes.shown(meta.page_bytes)} each"
    decode = s.events - s.prefill_events
    output.say(
        f"{trace.name}: {meta.model or 'unnamed model'}, recorded by {meta.source or 'unknown'}\n"
        f"{meta.num_layers} layers x {meta.experts_per_layer} experts = {pages} pages of {size}, "
        f"top {meta.top_k}\n"
        f"{s.steps} steps, {s.events} events ({s.prefill_events} prefill, {decode} decode), "
        f"{s.requests or 'unknown'} requests\n"
        f"{s.routed} routed experts, {s.accesses} accesses (distinct per event), {s.pages_used} "
        f"pages used" + (f"\nadditional columns: {', '.join(s.columns)}" if s.columns else "")
    )
    table.show(
        "Skew and locality",
        ["layer"],
        ["Gini", "entropy", "top tenth", "used", "overlap", "predicted"],
        [
            [
                str(index),
                f"{layer.gini:.2f}",
                f"{layer.entropy:.3f}",
                f"{layer.top_share:.1%}",
                str(layer.experts_used),
                _share(layer.overlap),
                _share(layer.predicted),
            ]
            for index, layer in enumerate(s.layers)
        ],
    )
    table.show(
        "Working sets",
        ["window, steps"],
        ["mean pages", "of all", "most pages"],
        [
            [str(n.steps), f"{n.mean_pages:.1f}", f"{n.mean_pages / pages:.1%}", str(n.max_pages)]
            for n in s.working_sets
        ],
    )
    table.show(
        "Union per event",
        ["tokens"],
        ["events", "mean experts", "if uniform"],
        [
            [
                str(n.tokens_from)
                if n.tokens_from == n.tokens_to
                else f"{n.tokens_from}–{n.tokens_to}",
                str(n.events),
                f"{n.mean_experts:.1f}",
                f"{n.uniform:.1f}",
            ]
            for n in s.unions
        ],
    )
    quantiles = ", ".join(f"{float(q):.0%} {n}" for q, n in s.reuse.quantiles.items())
    output.say(
        f"Reuse distance in events, quantiles: {quantiles or 'nothing is used twice'} "
        f"({s.reuse.first_uses} first uses, {s.reuse.reuses} reuses)"
    )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
