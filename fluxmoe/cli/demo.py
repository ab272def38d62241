"""``fluxmoe demo``: compare stock vLLM and FluxMoE at the same memory budget."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluxmoe import machine, sizes
from fluxmoe.cli.shared import output, table
from fluxmoe.cli.shared.options import AsCsv, AsJson

if TYPE_CHECKING:
    from fluxmoe.demo.compare import Comparison, Side
    from fluxmoe.demo.model import DemoModel

#: Number of requests for which stock vLLM's KV cache has room at the demo's budget.
STARVED = 3
#: Number of generated texts that are printed.
SAMPLES = 3


def demo(
    requests: Annotated[
        int, typer.Option(min=1, help="Number of requests, which are all queued at once.")
    ] = 64,
    output_tokens: Annotated[
        int, typer.Option(min=1, max=100, help="Number of tokens to generate per request.")
    ] = 96,
    rounds: Annotated[int, typer.Option(min=1, help="Runs per engine; engines alternate.")] = 3,
    eviction: Annotated[str, typer.Option(help="Eviction policy.")] = "next-use",
    prefetch: Annotated[str, typer.Option(help="Prefetch policy.")] = "none",
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Serve one workload with stock vLLM and with FluxMoE, in the same amount of memory."""
    from rich.console import Console

    from fluxmoe.demo.compare import DemoWorkload, compare
    from fluxmoe.demo.model import SHIPPED, DemoModel

    model = DemoModel.read(SHIPPED)
    console = Console(stderr=True)
    disk = _disk()
    with console.status("starting") as status, tempfile.TemporaryDirectory(dir=disk) as page_files:

        def progress(what: str) -> None:
            status.update(what)
            if not console.is_terminal:
                console.print(what, style="dim")

        result = compare(
            model,
            DemoWorkload(requests, output_tokens=output_tokens),
            sequences=STARVED,
            fluxmoe={"eviction": eviction, "prefetch": prefetch, "copy_threads": 0},
            rounds=rounds,
            options=model.options(max_num_seqs=requests),
            page_files=Path(page_files) if disk else None,
            progress=progress,
        )
    data = result.to_json()
    shared = {key: value for key, value in data.items() if key not in result.sides}
    rows = [{"engine": name, **data[name], **shared} for name in result.sides]
    if not output.printed(as_json, as_csv, data, rows):
        _print(result, model)
    if not result.tokens_identical:
        sys.exit(1)


def _disk() -> str | None:
    """Find a folder for temporary files on a disk: in memory, a page file would save nothing."""
    folders = [tempfile.gettempdir(), "/var/tmp"]
    usable = (each for each in folders if os.access(each, os.W_OK))
    return next((each for each in usable if not machine.in_memory(Path(each))), None)


def _print(result: Comparison, model: DemoModel) -> None:
    from rich.text import Text

    from fluxmoe.demo.compare import AT_TOTAL, FLUXMOE, PAGE_FILE, STOCK, TITLES, UNLIMITED

    budget = sizes.shown(result.stock.budget_bytes)
    _table(
        result,
        f"A simulated card: a budget of {budget}, the page store beside it",
        [name for name in result.sides if name != PAGE_FILE],
    )
    faster = ", ".join(
        f"{TITLES[name]}: {result.speedup(name, FLUXMOE):.2f}×"
        for name in (AT_TOTAL, UNLIMITED)
        if name in result.sides
    )
    output.say(
        "The page store stands for the host memory beside a card; on a CPU, the store takes "
        "additional memory of the same kind. Speed relative to FluxMoE with its store: "
        f"{faster or 'not measured'}.\n",
        style="dim",
    )
    if PAGE_FILE in result.sides:
        _table(result, f"On this CPU: a total of {budget}, the pages in a file", [STOCK, PAGE_FILE])
    else:
        output.say("No page file: to include one, set TMPDIR to a folder on a disk.\n")
    output.say(
        f"{len(result.texts)} requests × {result.output_tokens} tokens, medians of "
        f"{len(result.stock.runs)} alternating runs, eager, one thread. The shipped Qwen3-MoE, "
        f"{model.layers} layers × {model.experts} experts, top-{model.top_k}; a token is a byte. "
        "The processes' memory (PSS) includes Python, vLLM and all other weights.",
        style="dim",
    )
    output.say("Sample outputs (prompts in bold):")
    console = output.console()
    for prompt, written in result.texts[:SAMPLES]:
        console.print(Text.assemble("  ", (prompt, "bold"), written.replace("\n", "\n  ")))


def _table(result: Comparison, title: str, names: Sequence[str]) -> None:
    """Print a table with one column for each engine in ``names``."""
    from fluxmoe.demo.compare import TITLES

    sides = [result.sides[name] for name in names]

    def row(label: str, cell: Callable[[Side], str]) -> tuple[str, ...]:
        return (label, *map(cell, sides))

    def size(attribute: str) -> Callable[[Side], str]:
        return lambda side: sizes.shown(found) if (found := getattr(side, attribute)) else "–"

    rows = [
        row("experts in slots", size("expert_bytes")),
        row("  of all experts", lambda side: f"{_share(side.stats):.0%}"),
        row("KV cache", size("kv_bytes")),
        row("page store", size("store_bytes")),
        row("page file on disk", size("disk_bytes")),
        row("total memory", size("total_bytes")),
        row("processes (PSS)", size("pss_bytes")),
        row("requests at once", lambda side: str(side.peak_running)),
        row(
            "expert hit rate",
            lambda side: f"{side.stats['hit_rate']:.1%}" if side.stats else "–",
        ),
        row("tokens/s", lambda side: f"{side.tokens_per_s:.0f}"),
        ("speed-up", *(f"{result.speedup(name):.2f}×" for name in names)),
        ("tokens", *("identical" if result.identical(name) else "DIFFERENT" for name in names)),
    ]
    unused = ("–",) * len(names)
    table.show(title, [""], [TITLES[name] for name in names], [r for r in rows if r[1:] != unused])


def _share(stats: dict[str, Any]) -> float:
    """Return the share of the experts that have a slot; stock vLLM keeps all of them in memory."""
    return float(stats["slots"] / stats["pages"]) if stats else 1.0
