"""``fluxmoe trace convert``: convert a routing trace from another tool to FluxMoE's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fluxmoe.cli.shared.options import Force


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="File or folder to read.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="flame, selection, vllm, sglang or jsonl; default: detected from the content.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model name for the metadata.")] = None,
    experts: Annotated[
        int | None,
        typer.Option(min=1, help="Number of experts per layer; default: the largest id plus 1."),
    ] = None,
    page_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Size of one expert page, for byte counts.")
    ] = None,
    step_tokens: Annotated[int, typer.Option(min=1, help="Tokens per step (format flame).")] = 1,
    prompt_tokens: Annotated[
        int, typer.Option(min=0, help="Prompt tokens per request (format vllm).")
    ] = 0,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of steps to convert.")
    ] = None,
    force: Force = False,
) -> None:
    """Convert a routing trace from another tool to FluxMoE's format."""
    from fluxmoe.config import size
    from fluxmoe.trace import TraceReader
    from fluxmoe.trace.file import require_place
    from fluxmoe.trace.formats import Options, convert

    require_place(out, replace=force, by="--force")
    meta = convert(
        source,
        out,
        from_,
        Options(step_tokens, prompt_tokens),
        model=model,
        experts=experts,
        page_bytes=None if page_bytes is None else size(page_bytes, where="--page-bytes"),
        max_steps=max_steps,
        replace=force,
    )
    print(
        f"{out}: {TraceReader(out).num_rows} rows, {meta.num_layers} layers x "
        f"{meta.experts_per_layer} experts, top {meta.top_k}, from format {meta.source}"
    )
