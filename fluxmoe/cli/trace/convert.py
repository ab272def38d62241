"""``fluxmoe trace convert``: other people's traces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A file or folder.")],
    out: Annotated[Path, typer.Option(help="The Parquet file to write.")],
    from_: Annotated[
        str | None,
        typer.Option(
            "--from", help="flame, selection, vllm, sglang or jsonl; by default what it looks like."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model, for the metadata.")] = None,
    experts: Annotated[
        int | None, typer.Option(min=1, help="Experts per layer; default: the largest seen + 1.")
    ] = None,
    page_bytes: Annotated[
        int | None, typer.Option(min=1, help="Bytes of one expert page, for byte counts.")
    ] = None,
    step_tokens: Annotated[int, typer.Option(min=1, help="flame: tokens that make one step.")] = 1,
    prompt_tokens: Annotated[
        int, typer.Option(min=0, help="vllm: tokens of each request that are its prompt.")
    ] = 0,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Turn a routing trace of another tool into one of ours."""
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
