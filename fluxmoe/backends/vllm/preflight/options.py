"""Validation of vLLM's options against the list that its parser accepts, without importing vLLM.

``options.json`` is generated from the parser by ``python -m tests.vllm.options``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any

from fluxmoe.errors import ConfigError, meant
from fluxmoe.words import line

#: Options set by FluxMoE.
OURS = (
    *("worker-cls", "additional-config", "kv-transfer-config"),
    *("kv-cache-memory-bytes", "model"),
)
#: Option type → description of valid values.
_VALID = {
    "flag": "true or false",
    "switch": "true or false",
    "int": "a whole number",
    "float": "a number",
    "other": "text, a number, a list or a map",
}


@cache
def known() -> dict[str, str | list[str]]:
    """Return the options of ``vllm serve``, without leading dashes, and their types.

    The types are ``flag`` (an option with a negation ``--no-…``), ``switch`` (an option without
    one), ``int``, ``float``, ``other``, or a list of the valid values.
    """
    text = resources.files(__package__).joinpath("options.json").read_text()
    options: dict[str, str | list[str]] = json.loads(text)["options"]
    return options


def normalised(options: Mapping[str, Any]) -> dict[str, Any]:
    """Write option names with dashes; vLLM's command line also accepts underscores."""
    return {_dashed(name): value for name, value in options.items()}


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def problems(options: Mapping[str, Any]) -> Iterator[ConfigError]:
    """Yield an error for each option that is unknown, repeated, invalid, or set by FluxMoE.

    Args:
        options: Names without leading dashes → values: the configuration's ``vllm``.
    """
    for name, count in Counter(map(_dashed, options)).items():
        if count > 1:
            yield ConfigError(
                "the option is given more than once, with dashes and with underscores",
                where=f"vllm.{name}",
                fix="give it once",
            )
    for name, value in normalised(options).items():
        if name in OURS:
            yield ConfigError(
                f"{name} is set by FluxMoE", where=f"vllm.{name}", fix="remove it from vllm:"
            )
            continue
        if value is True and known().get(name.removeprefix("no-")) == "flag":
            continue  # the option is a flag or the negation of a flag
        kind = known().get(name.partition(".")[0])  # to vLLM, a.b is key b of the map a
        if kind is None:
            yield _unknown(name)
        elif "." not in name and value is not None and not _is_valid(kind, value):
            valid = _VALID[kind] if isinstance(kind, str) else f"one of {', '.join(kind)}"
            found = line(value, repr)
            yield ConfigError(f"it must be {valid}, not {found}", where=f"vllm.{name}")


def _unknown(name: str) -> ConfigError:
    positive = name.removeprefix("no-")
    if name != positive and known().get(positive) in ("flag", "switch"):
        fix = f"write {positive}: false"
    else:
        fix = meant(name, known()) or "see `vllm serve --help=all`"
    return ConfigError("vLLM has no such option", where=f"vllm.{name}", fix=fix)


def _is_valid(kind: str | list[str], value: object) -> bool:
    if kind in ("flag", "switch") or isinstance(value, bool):
        return kind in ("flag", "switch") and isinstance(value, bool)
    if isinstance(kind, list):
        return str(value) in kind
    if kind == "other":
        return True
    try:  # vLLM parses text
        (int if kind == "int" else float)(str(value))
    except ValueError:
        return False
    return True
