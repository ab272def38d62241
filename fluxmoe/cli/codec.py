"""``fluxmoe codec``: measure the compression of a checkpoint's experts by a lossless codec."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluxmoe import sizes
from fluxmoe.cli.shared import output, table
from fluxmoe.cli.shared.options import AsCsv, AsJson, Plugins
from fluxmoe.errors import CheckpointError

if TYPE_CHECKING:
    from fluxmoe.stores.survey import Survey


def codec(
    model: Annotated[
        Path | None,
        typer.Argument(help="Folder of a safetensors checkpoint; default: the shipped model."),
    ] = None,
    name: Annotated[str, typer.Option("--codec", metavar="NAME", help="Codec.")] = "fixed4",
    plugin: Plugins = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Measure the compression of a checkpoint's experts by a codec, per layer."""
    from fluxmoe import plugins
    from fluxmoe.checkpoint import require_readable
    from fluxmoe.demo.model import SHIPPED
    from fluxmoe.stores.survey import Survey, survey

    model = SHIPPED if model is None else model
    made = plugins.load(plugin or ()).create("codec", name)
    if not model.is_dir():
        raise CheckpointError(
            "no such folder", where=str(model), fix="name the folder of a checkpoint"
        )
    require_readable(str(model))
    layers = survey(model, made, name)
    total = Survey("all layers")
    for layer in layers:
        total.add(layer)
    each, whole = [_as_json(layer) for layer in layers], _as_json(total)
    data = {"model": str(model), "codec": name, "total": whole, "layers": each}
    if output.printed(as_json, as_csv, data, [*each, whole]):
        return
    table.show(
        f"{name} on {model.name}",
        ["layer"],
        ["experts", "kept in", "ratio", "escapes", "zero-coded", "raw", "zeros"],
        [_row(layer) for layer in (*layers, total)],
        total=True,
    )
    output.say("escapes, zero-coded and raw: per 100 segments; zeros: weights that are exactly 0")
    if total.plain:
        output.say(f"{total.plain} of {total.parts} parts are kept uncompressed")


def _row(survey: Survey) -> list[str]:
    def per_cent(count: int) -> str:
        return f"{count / survey.segments:.3%}"[:-1] if survey.segments else ""

    return [
        survey.name,
        sizes.shown(survey.raw_bytes),
        sizes.shown(survey.coded_bytes),
        f"{survey.ratio:.3f}",
        per_cent(survey.escapes),
        per_cent(survey.zero_coded),
        per_cent(survey.raw_segments),
        f"{survey.zeros / survey.weights:.3%}" if survey.weights else "",
    ]


def _as_json(survey: Survey) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(survey), "ratio": round(survey.ratio, 5)}
