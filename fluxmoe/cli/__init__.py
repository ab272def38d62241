"""The command line, with one file per verb. ``main`` is the console script ``fluxmoe``.

Verbs import heavy modules only when they run: ``fluxmoe --help`` loads neither an array library nor
an engine.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Annotated, Any

import typer

import fluxmoe
from fluxmoe import caches
from fluxmoe.cli import (
    cache,
    codec,
    config,
    demo,
    doctor,
    generate,
    limit,
    plan,
    plugin,
    policies,
    serve,
    simulate,
    top,
    trace,
)
from fluxmoe.cli.shared import output
from fluxmoe.errors import ConfigError, FluxMoEError

_DEBUG = "--debug"
#: Options that make a verb print only machine-readable data.
_DATA = ("--json", "--csv")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status.

    The status is 2 after an error that the user can correct, 130 after Ctrl-C, 1 if the verb made a
    comparison or a check that failed, and otherwise 0.

    Args:
        arguments: Arguments without the program name; default: the process's arguments.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Users add --debug after a failure, so it is accepted anywhere, even at the end of the line.
    debug = _DEBUG in given
    output.prepare()
    with suppress(ConfigError):  # only servers need the folders, and they raise the error again
        os.environ.update(caches.folders(os.environ))
    try:
        with ExitStack() as stack:
            stack.enter_context(_compilation_announced())
            if asked := [option for option in _DATA if option in given]:
                if len(asked) > 1:
                    raise ConfigError("only one output format is possible", where=" ".join(asked))
                stack.enter_context(output.reserved())
            arguments = [argument for argument in given if argument != _DEBUG]
            program()(args=arguments, prog_name="fluxmoe")
    except FluxMoEError as error:
        if debug:
            raise
        output.print_error(error)
        sys.exit(2)
    except OSError as error:
        if debug or error.filename is not None or error.errno not in output.LOST:
            raise
        output.print_error(output.lost(error))
        sys.exit(2)


@contextmanager
def _compilation_announced() -> Iterator[None]:
    """Show the core's message about compilation, which takes seconds without other output."""
    logger, handler = logging.getLogger("fluxmoe.compile"), logging.StreamHandler()
    if sys.stderr.isatty():  # replaces an unfinished line, such as a progress bar
        handler.setFormatter(logging.Formatter("\r\x1b[K%(message)s"))
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def program() -> Any:
    """Build the whole command line, as a click group."""
    app = typer.Typer(
        help="Memory manager for MoE inference: pages expert weights and simulates policies.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
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
    app.add_typer(cache.app, name="cache")
    app.add_typer(plugin.app, name="plugin")
    app.add_typer(config.app, name="config")
    app.command("top")(top.top)
    app.command("limit")(limit.limit)
    app.command("doctor")(doctor.doctor)
    group = typer.main.get_command(app)
    _spell(group)
    return group


def _spell(command: Any) -> None:
    """Make the help show values as ``TRACE`` and ``--policy POLICY``, and whole summaries.

    Typer would write ``{trace}`` and ``--policy <str>``, and would shorten the summaries.
    """
    command.short_help = (command.help or "").partition("\n")[0]
    for parameter in command.params:
        if parameter.metavar is None and not getattr(parameter, "is_flag", False):
            parameter.metavar = parameter.name.upper().strip("_").replace("_", "-")
        if parameter.param_type_name == "argument":
            word, described = parameter.metavar, parameter.get_help_record
            pieces = [word if parameter.required else f"[{word}]"]
            parameter.get_usage_pieces = lambda context, pieces=pieces: pieces
            parameter.get_help_record = lambda context, word=word, described=described: (
                word,
                described(context)[1],
            )
    for inner in getattr(command, "commands", {}).values():
        _spell(inner)


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
    """Declare the options that precede the verb; they are handled before this function runs."""
