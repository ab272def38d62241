"""``fluxmoe trace synth``: a trace without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def synth(
    layers: Annotated[int, typer.Option(help="MoE layers.")],
    experts: Annotated[int, typer.Option(help="Experts per layer.")],
    top_k: Annotated[int, typer.Option(help="Experts per token.")],
    steps: Annotated[int, typer.Option(help="Forward passes.")],
    batch: Annotated[int, typer.Option(help="Tokens per step.")],
    out: Annotated[Path, typer.Option(help="The Parquet file to write.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same trace.")] = 0,
    skew: Annotated[
        float, typer.Option(help="Zipf exponent of the experts' popularity; 0 = uniform.")
    ] = 1.0,
    drift: Annotated[
        float, typer.Option(help="How fast popularity changes: 0 = never, 1 = anew in every step.")
    ] = 0.02,
    page_bytes: Annotated[
        int, typer.Option(min=1, help="Bytes of one expert page, for byte counts.")
    ] = 3 * 768 * 2048 * 2,
) -> None:
    """Write a synthetic decode trace."""
    from fluxmoe.sim.synth import Workload, write

    workload = Workload(layers, experts, top_k, steps, batch, seed=seed, skew=skew, drift=drift)
    events = write(workload, out, page_bytes)
    print(f"{out}: {events} events, {events * batch * top_k} routed experts")
