"""Reading settings: YAML files, maps and sizes, with errors in the user's terms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from fluxmoe import sizes
from fluxmoe.config.schema import Config, HandLimits
from fluxmoe.errors import ConfigError
from fluxmoe.words import line

#: pydantic's error types → messages in the terms of YAML instead of Python.
_WHAT = {
    "string_type": "it must be text",
    "dict_type": "it must be a map",
    "model_type": "it must be a map",
    "model_attributes_type": "it must be a map",
    "string_too_short": "it must be non-empty text",
    "list_type": "it must be a list",
}
_FIXES = {
    "unused": "give all stores but the last a limit",
    "size": "",  # the message already contains it
}


def size(text: object, *, where: str) -> int:
    """Parse a size given on the command line; it must be greater than 0. Raises ConfigError."""
    try:
        found = sizes.parse(text)
    except ValueError as error:
        raise ConfigError(str(error), where=where) from None
    if not found:
        raise ConfigError(f"it must be greater than 0, not {text!r}", where=where)
    return found


_Parsed = TypeVar("_Parsed", bound=BaseModel)


def parse(data: object, *, where: str) -> Config:
    """Validate a configuration.

    Raises:
        ConfigError: Names the first invalid field, its value and the remedy.
    """
    return _parse(Config, data, where)


def parse_limits(data: object, *, where: str) -> HandLimits:
    """Validate limits set while serving; see ``parse``."""
    return _parse(HandLimits, data, where)


def _parse(model: type[_Parsed], data: object, where: str) -> _Parsed:
    if data is None:
        raise ConfigError("it is empty", where=where, fix="see `fluxmoe config schema`")
    if not isinstance(data, Mapping):
        raise ConfigError(f"expected a map of settings, not {line(data, repr)}", where=where)
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        first = error.errors()[0]
        place = list(map(str, first["loc"]))
        if place[:1] == ["stores"]:
            del place[2:3]  # the store's kind, which pydantic added
        field = ".".join(place)
        if first["type"] == "extra_forbidden":
            what, fix = f"unknown key {field!r}", "remove it, or check its spelling"
        elif first["type"] in ("missing", "union_tag_not_found"):
            if first["type"] == "union_tag_not_found":
                field += ".kind"
            what, fix = f"{field!r} is missing", "add it"
        elif first["type"] == "union_tag_invalid":
            what = f"{field}.kind: it must be 'host' or 'file', not {first['input'].get('kind')!r}"
            fix = "see `fluxmoe config schema`"
        else:
            what = _WHAT.get(first["type"], first["msg"].replace("Input should", "it must"))
            what = f"{field}: {what}"
            if first["type"] != "size":  # its message already names the value
                what += f", not {line(first['input'], repr)}"
            fix = _FIXES.get(first["type"], "see `fluxmoe config schema`")
            if field in ("eviction", "prefetch", "arbitration"):
                fix = "write the name of a policy, or {kind: NAME, option: value}"
        raise ConfigError(what, where=where, fix=fix) from error


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration as a user writes it (docs/fluxmoe.schema.json)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Config.model_json_schema(mode="validation"),
        "title": "FluxMoE configuration",
    }


class _Loader(yaml.SafeLoader):
    """A loader that refuses duplicate keys; YAML's own takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key.value!r}", key.start_mark
                )
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def load(path: Path) -> Config:
    """Read a YAML file.

    Raises:
        ConfigError: The file is unreadable, not valid YAML, or does not validate.
    """
    if path.is_dir():
        raise ConfigError(
            "it is a folder", where=str(path), fix="give a YAML file with model: FOLDER in it"
        )
    try:
        data = yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read it: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"not a text file: {error}", where=str(path)) from error
    except yaml.YAMLError as error:
        where, problem = str(path), str(error)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            mark, problem = error.problem_mark, error.problem or "could not be parsed"
            where = f"{path}, line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(f"not valid YAML: {problem}", where=where) from error
    return parse(data, where=str(path))
