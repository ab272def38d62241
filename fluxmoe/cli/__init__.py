"""The command line, one file per verb. ``main`` is the console script ``fluxmoe``.

Verbs import heavy modules only when they run: ``fluxmoe --help`` loads no array library or engine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import fluxmoe
from fluxmoe.cli import (
    codec,
    config,
    demo,
    doctor,
    generate,
    limit,
    output,
    plan,
    plugin,
    policies,
    serve,
    simulate,
    top,
    trace,
)
from fluxmoe.errors import FluxMoEError

_DEBUG = "--debug"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0, 2 for every error a user can correct, 130 after Ctrl-C.

    Args:
        arguments: Arguments without the program's name; default: those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Usually added after a failure, so it is accepted anywhere, such as at the end of the line.
    debug = _DEBUG in given
    try:
        _app()(args=[argument for argument in given if argument != _DEBUG], prog_name="fluxmoe")
    except FluxMoEError as error:
        if debug:
            raise
        output.print_error(error)
        sys.exit(2)


def _app() -> typer.Typer:
    app = typer.Typer(
        help="Memory manager for MoE inference: pages expert weights, simulates policies.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_globals)
    app.command("demo")(demo.demo)
    app.command("serve")(serve.serve)
    app.command("plan")(plan.plan)
    app.command("generate")(generate.generate)
    app.command("simulate")(simulate.simulate)
    app.add_typer(trace.app, name="trace")
    app.command("policies")(policies.policies)
    app.command("codec")(codec.codec)
    app.add_typer(plugin.app, name="plugin")
    app.add_typer(config.app, name="config")
    app.command("top")(top.top)
    app.command("limit")(limit.limit)
    app.command("doctor")(doctor.doctor)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fluxmoe {fluxmoe.__version__}")
        raise typer.Exit


def _globals(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option(_DEBUG, help="Show the traceback of an error (allowed anywhere).")
    ] = False,
) -> None:
    """Declare the options before the verb; both are handled before this runs."""
