"""``fluxmoe trace``: record, synthesise, convert and describe traces, with one file per verb."""

from __future__ import annotations

import typer

from fluxmoe.cli.trace import convert, info, record, synth

app = typer.Typer(
    help="Record, convert, describe and synthesise traces of routed experts.", no_args_is_help=True
)
app.command("record")(record.record)
app.command("convert")(convert.convert)
app.command("info")(info.info)
app.command("synth")(synth.synth)
