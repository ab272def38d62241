"""``fluxmoe trace synth``: write a synthetic trace, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fluxmoe.cli.shared.options import Force
from fluxmoe.errors import ConfigError


def synth(
    layers: Annotated[int, typer.Option(help="MoE layers.")],
    experts: Annotated[int, typer.Option(help="Experts per layer.")],
    top_k: Annotated[int, typer.Option(help="Experts per token.")],
    steps: Annotated[int, typer.Option(help="Forward passes.")],
    batch: Annotated[int, typer.Option(help="Tokens per step.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    seed: Annotated[int, typer.Option(help="Random seed; the same seed gives the same trace.")] = 0,
    skew: Annotated[
        float, typer.Option(help="Zipf exponent of the experts' popularity; 0 = uniform.")
    ] = 1.0,
    drift: Annotated[
        float, typer.Option(help="Rate of change of popularity: 0 = never, 1 = redrawn every step.")
    ] = 0.02,
    locality: Annotated[
        str,
        typer.Option(
            metavar="P[:P]",
            help="Probability that a request reuses an expert of its last token; first:last layer.",
        ),
    ] = "0",
    scan_every: Annotated[
        int, typer.Option(help="Scan all experts every N steps; 1 = only scans, 0 = never.")
    ] = 0,
    page_bytes: Annotated[
        str, typer.Option(metavar="SIZE", help="Size of one expert page, for byte counts.")
    ] = "9MiB",
    force: Force = False,
) -> None:
    """Write a synthetic trace; the same arguments give the same file."""
    from fluxmoe.config import size
    from fluxmoe.trace.synth import Workload, write

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
