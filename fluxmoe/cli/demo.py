"""``fluxmoe demo``: compare stock vLLM and FluxMoE at one memory budget."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from fluxmoe import sizes
from fluxmoe.cli.shared import output, table
from fluxmoe.cli.shared.options import AsCsv, AsJson

if TYPE_CHECKING:
    from fluxmoe.demo.compare import Comparison
    from fluxmoe.demo.model import DemoModel

#: Number of requests that stock vLLM's KV cache holds at the demo's budget.
STARVED = 3
#: Number of generated texts printed.
SAMPLES = 3


def demo(
    requests: Annotated[int, typer.Option(min=1, help="Requests, all queued at once.")] = 64,
    output_tokens: Annotated[
        int, typer.Option(min=1, max=100, help="Tokens generated per request.")
    ] = 96,
    rounds: Annotated[int, typer.Option(min=1, help="Runs per engine, alternating.")] = 3,
    eviction: Annotated[str, typer.Option(help="Eviction policy.")] = "next-use",
    prefetch: Annotated[str, typer.Option(help="Prefetch policy.")] = "none",
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Serve one workload with stock vLLM and with FluxMoE at the same memory budget."""
    from rich.console import Console

    from fluxmoe.demo.compare import DemoWorkload, compare
    from fluxmoe.demo.model import SHIPPED, DemoModel

    model = DemoModel.read(SHIPPED)
    console = Console(stderr=True)
    with console.status("starting") as status:

        def progress(what: str) -> None:
            status.update(what)
            if not console.is_terminal:
                console.print(what, style="dim")

        result = compare(
            model.folder,
            DemoWorkload(requests, output_tokens=output_tokens),
            budget_bytes=model.budget(STARVED),
            experts_total_bytes=model.experts_total_bytes,
            fluxmoe={"eviction": eviction, "prefetch": prefetch, "copy_threads": 0},
            rounds=rounds,
            options=model.options(max_num_seqs=requests),
            progress=progress,
        )
    data = result.to_json()
    shared = {key: value for key, value in data.items() if key not in ("stock", "fluxmoe")}
    rows = [{"engine": name, **data[name], **shared} for name in ("stock", "fluxmoe")]
    if not output.printed(as_json, as_csv, data, rows):
        _print(result, model)
    if not result.tokens_identical:
        sys.exit(1)


def _print(result: Comparison, model: DemoModel) -> None:
    from rich.text import Text

    stock, paged, stats = result.stock, result.fluxmoe, result.stats
    rows = [
        (
            "experts in the budget",
            sizes.shown(result.experts_total_bytes),
            sizes.shown(stats["expert_bytes"]),
        ),
        ("  of all experts", "100 %", f"{stats['slots'] / stats['pages']:.0%}"),
        ("KV cache in the budget", sizes.shown(stock.kv_bytes), sizes.shown(paged.kv_bytes)),
        ("  blocks", str(stock.kv_blocks), str(paged.kv_blocks)),
        ("requests running at once", str(stock.peak_running), str(paged.peak_running)),
        ("expert hit rate", "–", f"{stats['hit_rate']:.1%}"),
        ("tokens/s", f"{stock.tokens_per_s:.0f}", f"{paged.tokens_per_s:.0f}"),
        ("speed-up", "1.00×", f"{result.speedup:.2f}×"),
        ("tokens", "", "identical" if result.tokens_identical else "DIFFERENT"),
        ("page store, outside the budget", "–", sizes.shown(stats["store_bytes"])),
    ]
    both = f"both in {sizes.shown(result.budget_bytes)}"
    table.show("", [both], ["stock vLLM", "vLLM + FluxMoE"], rows)
    output.say(
        f"{len(result.texts)} requests × {result.output_tokens} tokens, medians of "
        f"{len(stock.runs)} alternating runs, eager, one thread. The shipped Qwen3-MoE, "
        f"{model.layers} layers × {model.experts} experts, top-{model.top_k}; a token is a byte.\n"
        "The budget bounds the memory that the kernels read (expert arenas + KV cache); the page "
        "store lies outside it in host memory, as it would beside a GPU.",
        style="dim",
    )
    output.say("Sample outputs (prompts in bold):")
    console = output.console()
    for prompt, written in result.texts[:SAMPLES]:
        console.print(Text.assemble("  ", (prompt, "bold"), written.replace("\n", "\n  ")))
