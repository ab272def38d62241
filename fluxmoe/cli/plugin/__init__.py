"""``fluxmoe plugin``: create and check packages with policies or codecs."""

import typer

from fluxmoe.cli.plugin import check, new

app = typer.Typer(help="Create and check packages with policies or codecs.", no_args_is_help=True)
app.command("new")(new.new)
app.command("check")(check.check)
