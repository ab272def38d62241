"""docs/reference/cli.md, generated from the command line: every verb, argument and option.

``python -m tests.docs.commands`` regenerates it.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

from fluxmoe import cli

from .pages import ROOT

PAGE = ROOT / "docs" / "reference" / "cli.md"

#: Verb → page that explains it.
EXPLAINED = {
    "demo": ("Get started", "../start/getting-started.md"),
    "serve": ("vLLM", "../guides/vllm.md#serving"),
    "plan": ("Planning", "../guides/plan.md"),
    "generate": ("PyTorch", "../guides/torch.md#from-the-command-line"),
    "simulate": ("Simulator", "simulator.md"),
    "policies": ("Plugins", "../plugins/index.md#broken-plugins"),
    "codec": ("The lossless code", "../concepts/lossless-code.md"),
    "top": ("Watch a server", "../guides/watching.md"),
    "limit": ("Arbitration", "../concepts/arbitration.md#operator-limits"),
    "doctor": ("Get started", "../start/getting-started.md#check-the-installation"),
    "trace": ("Traces", "traces.md"),
    "plugin": ("Plugins", "../plugins/index.md"),
    "config": ("Configuration", "configuration.md#checking-a-configuration"),
}

_HEAD = """\
# Command line

<!-- Made by `python -m tests.docs.commands`. -->

`fluxmoe --help` lists the verbs, `fluxmoe VERB --help` a verb's options. With `--json` a verb
prints pure JSON on standard output. Errors go to standard error as
`error[FM…]: what; where; what to do` ([all codes](errors.md)); the exit status is then 2, after
Ctrl-C 130, else 0.

| before the verb | meaning |
|---|---|
| `--version` | print the version |
| `--debug` | show the traceback of an error; allowed anywhere on the line |
"""


def verbs() -> Iterator[tuple[str, Any]]:
    """List all verbs, those of groups as ``group verb``."""
    for name, command in cli.program().commands.items():
        for inner, each in getattr(command, "commands", {"": command}).items():
            yield f"{name} {inner}".strip(), each


def options(command: Any) -> set[str]:
    """List the options of a command, or of all commands of a group."""
    commands = getattr(command, "commands", {"": command})
    return {
        option
        for each in commands.values()
        for parameter in each.params
        for option in parameter.opts
        if option.startswith("--") and option != "--help"
    }


def page() -> str:
    """Generate the content of docs/reference/cli.md."""
    return "\n".join([_HEAD, *(_section(verb, command) for verb, command in verbs())])


def _section(verb: str, command: Any) -> str:
    title, where = EXPLAINED[verb.split()[0]]
    arguments = [each for each in command.params if not _is_option(each)]
    options = [each for each in command.params if _is_option(each)]
    usage = ["fluxmoe", verb]
    for each in arguments:
        word = _metavar(each)
        usage.append(word if each.required else f"[{word}]")
    usage += [f"{each.opts[0]} {_metavar(each)}".strip() for each in options if each.required]
    if any(not each.required for each in options):
        usage.append("[OPTIONS]")
    summary = command.help.strip().splitlines()[0]
    lines = [f"## `{verb}`", "", f"{summary} See [{title}]({where}).", ""]
    lines += ["```text", " ".join(usage), "```", ""]
    if command.params:
        lines += ["| argument or option | default | meaning |", "|---|---|---|"]
        lines += [
            f"| {_name(each)} | {_default(each)} | {_help(each)} |" for each in command.params
        ]
        lines.append("")
    return "\n".join(lines)


def _is_option(parameter: Any) -> bool:
    return bool(parameter.opts[0].startswith("-"))


def _metavar(parameter: Any) -> str:
    if getattr(parameter, "is_flag", False):
        return ""
    return str(parameter.metavar)


def _name(parameter: Any) -> str:
    words = parameter.opts[0] if _is_option(parameter) else _metavar(parameter)
    return f"`{words}`"


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    if value is None or getattr(parameter, "is_flag", False):
        return "–"
    return f"`{value.value if isinstance(value, Enum) else value}`"


def _help(parameter: Any) -> str:
    text = (parameter.help or "").replace("|", "\\|")
    assert text, f"{parameter.opts[0]} says nothing of itself"
    choices = getattr(parameter.type_descriptor.annotation, "__members__", None)
    if choices:
        text += " One of " + ", ".join(f"`{each.value}`" for each in choices.values()) + "."
    if parameter.multiple and "repeat" not in text:
        text += " May be repeated."
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
