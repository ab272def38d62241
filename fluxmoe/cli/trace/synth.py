"""``fluxmoe trace synth``: write a synthetic trace without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fluxmoe.cli.shared.options import Force
from fluxmoe.errors import ConfigError


def synth(
    layers: Annotated[int, typer.Option(help="Number of MoE layers.")],
    experts: Annotated[int, typer.Option(help="Number of experts per layer.")],
    top_k: Annotated[int, typer.Option(help="Number of experts per token.")],
    steps: Annotated[int, typer.Option(help="Number of forward passes.")],
    batch: Annotated[int, typer.Option(help="Number of tokens per step.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    seed: Annotated[int, typer.Option(help="Random seed; the same seed gives the same trace.")] = 0,
    skew: Annotated[
        float, typer.Option(help="Zipf exponent of the experts' popularity; 0 means uniform.")
    ] = 1.0,
    drift: Annotated[
        float,
        typer.Option(
            help="Rate at which popularity changes: 0 means never; 1 means a new draw every step."
        ),
    ] = 0.02,
    locality: Annotated[
        str,
        typer.Option(
            metavar="P[:P]",
            help="Probability that a request reuses an expert of its previous token; a:b for the "
            "first and the last layer.",
        ),
    ] = "0",
    scan_every: Annotated[
        int,
        typer.Option(
            help="Scan all experts every N steps; 1 means only scans, and 0 means no scans."
        ),
    ] = 0,
    page_bytes: Annotated[
        str, typer.Option(metavar="SIZE", help="Size of one expert page, for byte counts.")
    ] = "9MiB",
    force: Force = False,
) -> None:
    """Write a synthetic trace; the same arguments give the same file."""
    from fluxmoe.config import size
    from fluxmoe.trace.file import require_place
    from fluxmoe.trace.synth import Workload, write

    require_place(out, replace=force, by="--force")
    workload = Workload(
        layers,
        experts,
        top_k,
        steps,
        batch,
        seed=seed,
        skew=skew,
        drift=drift,
        locality=_range(locality),
        scan_every=scan_every,
    )
    events, routed = write(workload, out, size(page_bytes, where="--page-bytes"), replace=force)
    print(f"{out}: {events} events, {routed} routed experts")


def _range(text: str) -> tuple[float, float]:
    first, _, last = text.partition(":")
    try:
        return float(first), float(last or first)
    except ValueError as error:
        raise ConfigError(
            f"{text!r} is neither a number nor first:last", where="--locality", fix="write 0.6:0.2"
        ) from error
