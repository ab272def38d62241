"""Reading of settings: YAML files, maps and sizes, with errors in the user's terms."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fluxmoe import sizes
from fluxmoe.config.schema import Config, HandLimits
from fluxmoe.errors import ConfigError, meant, together
from fluxmoe.findings import Findings
from fluxmoe.words import line

#: pydantic error types → messages in terms of YAML instead of Python.
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
        ConfigError: A field is invalid; ``others`` has further errors.
    """
    return _parse(Config, data, where)


def parse_most(data: object, found: Findings, *, where: str) -> Config | None:
    """Validate a configuration, and record its errors instead of raising them.

    Settings with errors, which are added to ``found.wrong``, have their defaults (the budget:
    ``auto``), so that the others can still be checked. None if ``data`` is no map of settings.
    """
    config = found.result(parse, data, where=where)
    if config is not None or not isinstance(data, Mapping):
        return config
    rest = dict(data)
    while True:
        try:
            return Config.model_validate(rest)
        except ValidationError as error:
            wrong = {str(each["loc"][0]) for each in error.errors()}
        found.wrong |= wrong
        rest = {key: value for key, value in rest.items() if str(key) not in wrong}
        if "memory" in wrong:
            rest["memory"] = {"budget": "auto"}


def parse_limits(data: object, *, where: str) -> HandLimits:
    """Validate limits set while serving. See ``parse``."""
    return _parse(HandLimits, data, where)


def _parse(model: type[_Parsed], data: object, where: str) -> _Parsed:
    if data is None:
        raise ConfigError("it is empty", where=where, fix="see `fluxmoe config schema`")
    if not isinstance(data, Mapping):
        raise ConfigError(f"expected a map of settings, not {line(data, repr)}", where=where)
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        raise together(_problems(model, error, where)) from error


def _problems(model: type[BaseModel], error: ValidationError, where: str) -> list[ConfigError]:
    """Translate all pydantic errors into terms of the configuration, unknown keys first."""
    unknown, rest, intended = [], [], set()
    for each in error.errors(include_url=False):
        if each["type"] != "extra_forbidden":
            rest.append(each)
            continue
        *above, key = each["loc"]
        fix = meant(key, known := sorted(_keys(model, above)))
        unknown.append(
            ConfigError(
                f"unknown key {_field(each['loc'])!r}",
                where=where,
                fix=fix or f"remove it; known here: {', '.join(known)}",
            )
        )
        intended |= {(*above, name) for name in known if meant(key, [name])}
    # A misspelt key is not also reported as missing.
    rest = [each for each in rest if each["type"] != "missing" or each["loc"] not in intended]
    return unknown + [_problem(each, where) for each in rest]


def _problem(detail: ErrorDetails, where: str) -> ConfigError:
    """Translate one pydantic error into terms of the configuration."""
    kind, field, found = detail["type"], _field(detail["loc"]), detail["input"]
    if kind == "missing":
        return ConfigError(f"{field!r} is missing", where=where, fix="add it")
    if kind == "union_tag_not_found":
        return ConfigError(f"'{field}.kind' is missing", where=where, fix="add it")
    fix = _FIXES.get(kind, "see `fluxmoe config schema`")
    if kind == "union_tag_invalid":
        found, said = found.get("kind"), "it must be 'host' or 'file'"
        field, fix = f"{field}.kind", meant(found, ["host", "file"]) or fix
    else:
        said = _WHAT.get(kind, detail["msg"].replace("Input should", "it must"))
        if kind == "literal_error":
            fix = meant(found, re.findall("'(.*?)'", detail["msg"])) or fix
    if field in ("eviction", "prefetch", "arbitration"):
        fix = "write the name of a policy, or {kind: NAME, option: value}"
    if kind != "size":  # its message already has the value
        said += f", not {line(found, repr)}"
    return ConfigError(f"{field}: {said}", where=where, fix=fix)


def _field(place: Sequence[int | str]) -> str:
    """Format a location as a dotted name, without the store kind that pydantic adds."""
    parts = list(map(str, place))
    if parts[:1] == ["stores"]:
        del parts[2:3]
    return ".".join(parts)


def _keys(model: type[BaseModel], above: Sequence[int | str]) -> set[str]:
    """List the valid keys at a location, whose parts are names, numbers and store kinds."""
    models = [model]
    for part in above:
        if isinstance(part, int):
            continue
        inside = [
            inner
            for each in models
            if part in each.model_fields
            for inner in _models(each.model_fields[part].annotation)
        ]
        # Not a key: the kind of a store, which pydantic adds to the location.
        models = inside or [m for m in models if _kind(m) == part]
    return {name for each in models for name in each.model_fields}


def _kind(store: type[BaseModel]) -> object:
    return get_args(store.model_fields["kind"].annotation)[0]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """List the classes of settings in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _models(inner)]


def json_schema() -> dict[str, Any]:
    """Make the JSON schema of a configuration file (docs/fluxmoe.schema.json)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Config.model_json_schema(mode="validation"),
        "title": "FluxMoE configuration",
    }


class _Loader(yaml.SafeLoader):
    """A loader that rejects duplicate keys; the standard one takes the last."""

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
    """Read a YAML file, with paths relative to its folder. See ``Config.located``.

    Raises:
        ConfigError: The file is unreadable, not valid YAML, or does not validate.
    """
    return parse(read(path), where=str(path)).located(path.absolute().parent)


def load_most(path: Path, found: Findings) -> Config | None:
    """Read a YAML file, and record its errors. See ``load`` and ``parse_most``."""
    try:
        data = read(path)
    except ConfigError as error:
        found.errors.append(error)
        return None
    config = parse_most(data, found, where=str(path))
    return config and config.located(path.absolute().parent)


def read(path: Path) -> object:
    """Load a YAML file without validating it.

    Raises:
        ConfigError: The file is unreadable or not valid YAML.
    """
    if path.is_dir():
        raise ConfigError(
            "it is a folder", where=str(path), fix="give a YAML file with model: FOLDER in it"
        )
    try:
        return yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read the file: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"not a text file: {error}", where=str(path)) from error
    except yaml.YAMLError as error:
        where, problem = str(path), str(error)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            mark, problem = error.problem_mark, error.problem or "could not be parsed"
            where = f"{path}, line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(f"not valid YAML: {problem}", where=where) from error
