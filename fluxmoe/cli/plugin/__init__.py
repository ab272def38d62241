"""``fluxmoe plugin``: begin a package with policies or codecs, and check one."""

import typer

from fluxmoe.cli.plugin import check, new

app = typer.Typer(
    help="Begin a package of policies or codecs, and check one.", no_args_is_help=True
)
app.command("new")(new.new)
app.command("check")(check.check)
