"""``fluxmoe trace convert``: convert traces of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="File or folder.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    from_: Annotated[
        str | None,
        typer.Option("--from", help="flame, selection, vllm, sglang or jsonl; default: detected."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model name for the metadata.")] = None,
    experts: Annotated[
        int | None, typer.Option(min=1, help="Experts per layer; default: largest id found + 1.")
    ] = None,
    page_bytes: Annotated[
        int | None, typer.Option(min=1, help="Bytes of one expert page, for byte counts.")
    ] = None,
    step_tokens: Annotated[int, typer.Option(min=1, help="flame: tokens per step.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=0, help="vllm: prompt tokens per request.")] = 0,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after N steps.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Convert another tool's routing trace to FluxMoE's format."""
    from fluxmoe.trace import TraceReader
    from fluxmoe.trace.formats import Options, convert

    meta = convert(
        source,
        out,
        from_,
        Options(step_tokens, prompt_tokens),
        model=model,
        experts=experts,
        page_bytes=page_bytes,
        max_steps=max_steps,
        replace=force,
    )
    print(
        f"{out}: {TraceReader(out).num_rows} rows, {meta.num_layers} layers x "
        f"{meta.experts_per_layer} experts, top {meta.top_k}, from format {meta.source}"
    )
