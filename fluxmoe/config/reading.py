"""Reading of sizes, and of settings from YAML files and maps, with errors in the user's terms."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fluxmoe import sizes
from fluxmoe.arguments import reason
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
    "size": "",  # the message already names the valid sizes
}


def size(text: object, *, where: str) -> int:
    """Parse a size given on the command line; raise ConfigError unless it is valid and positive."""
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
        ConfigError: A field is invalid; ``others`` contains further errors.
    """
    return _parse(Config, data, where)


def parse_most(data: object, found: Findings, *, where: str) -> Config | None:
    """Validate a configuration, and record its errors instead of raising them.

    The names of settings with errors are added to ``found.wrong``. These settings get their
    defaults (the budget: ``auto``), so that the other settings can still be checked. The result is
    None if ``data`` is not a map of settings.
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
        right = {key: rest[key] for key in Config.model_fields if key in rest.keys() - wrong}
        if "memory" in wrong:
            right["memory"] = {"budget": "auto"}
        if right == rest:
            return None
        rest = right


def parse_limits(data: object, *, where: str) -> HandLimits:
    """Validate limits set while serving. See ``parse``."""
    return _parse(HandLimits, data, where)


def _parse(model: type[_Parsed], data: object, where: str) -> _Parsed:
    if data is None:
        raise ConfigError("the document is empty", where=where, fix="see `fluxmoe config schema`")
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
    # Do not also report a misspelt key as missing.
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
        said = _WHAT.get(kind, reason(detail).replace("Input should", "it must"))
        if kind == "literal_error":
            fix = meant(found, re.findall("'(.*?)'", detail["msg"])) or fix
    if field in ("eviction", "prefetch", "arbitration"):
        fix = "write the name of a policy, or {kind: NAME, option: value}"
    if kind != "size":  # the message about a size already contains the value
        said += f", not {line(found, repr)}"
    return ConfigError(f"{field}: {said}", where=where, fix=fix)


def _field(place: Sequence[int | str]) -> str:
    """Format a location as a dotted name, without the store kind that pydantic adds."""
    parts = list(map(str, place))
    if parts[:1] == ["stores"]:
        del parts[2:3]
    return ".".join(parts)


def _keys(model: type[BaseModel], above: Sequence[int | str]) -> set[str]:
    """Return the valid keys at a location, whose parts are names, numbers and store kinds."""
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
        # A part that is not a key is the kind of a store, which pydantic adds to the location.
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


#: The tags of keys that are text, and of ``<<``, which merges maps.
_TEXT = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


class _Loader(yaml.SafeLoader):
    """A loader that rejects duplicate keys, of which the standard loader uses the last, and keys
    that are not text, such as ``on``, which YAML reads as true.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if node.id == "mapping" else ():  # !!map [a] is a sequence
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.tag not in _TEXT:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is not text: put it in quotes", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key.value!r}", key.start_mark
                )
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def load(path: Path, **changes: object) -> Config:
    """Read a YAML file, whose paths are relative to its folder (see ``Config.located``).

    Args:
        path: The file.
        changes: Key → value that replaces the value in the file.

    Raises:
        ConfigError: The file is unreadable, not valid YAML, or does not validate.
    """
    data = _changed(read(path), changes)
    return parse(data, where=str(path)).located(path.absolute().parent)


def load_most(path: Path, found: Findings, **changes: object) -> Config | None:
    """Read a YAML file, and record its errors (see ``load`` and ``parse_most``)."""
    try:
        data = _changed(read(path), changes)
    except ConfigError as error:
        found.errors.append(error)
        return None
    config = parse_most(data, found, where=str(path))
    return config and found.result(config.located, path.absolute().parent)


def _changed(data: object, changes: Mapping[str, object]) -> object:
    return {**data, **changes} if isinstance(data, dict) else data


def read(path: Path) -> object:
    """Load a YAML file without validating it.

    Raises:
        ConfigError: The file is unreadable or not valid YAML.
    """
    if path.is_dir():
        raise ConfigError(
            "the path is a folder", where=str(path), fix="give a YAML file that has model: FOLDER"
        )
    try:
        return yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read the file: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"not a text file: {error}", where=str(path)) from error
    except yaml.YAMLError as error:
        where, problem = str(path), line(error)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            mark, problem = error.problem_mark, error.problem or "could not be parsed"
            where = f"{path}, line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(f"not valid YAML: {problem}", where=where) from error
    except (ValueError, LookupError, AttributeError, OverflowError) as error:  # such as !!int x
        raise ConfigError(f"not valid YAML: {line(error)}", where=str(path)) from error
    except RecursionError as error:
        raise ConfigError("the document is nested too deeply", where=str(path)) from error
