"""The configuration: one YAML document, validated as a whole, sizes written as ``24GiB``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from fluxmoe import sizes
from fluxmoe.core.policy.arbitration import ArbitrationPolicy
from fluxmoe.core.policy.watchdog import DEFAULT_LIMITS, Limits
from fluxmoe.core.words import line
from fluxmoe.errors import ConfigError, InvariantError

AUTO = "auto"


def _policy(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


def _size(value: object) -> int:
    try:
        return sizes.parse(value)
    except ValueError as error:
        raise PydanticCustomError("size", "{said}", {"said": str(error)}) from None


def _auto(value: object) -> object:
    return None if value is None else _budget(value)


def _budget(value: object) -> object:
    # An empty value in YAML is not "auto", which must be written out.
    return None if isinstance(value, str) and value == AUTO else _size(value)


#: A policy: its name, or a map with ``kind`` and the policy's own options.
Policy = Annotated[
    dict[str, Any], BeforeValidator(_policy, json_schema_input_type=str | dict[str, Any])
]
_Written = Annotated[str, Field(pattern=sizes.PATTERN)] | Annotated[int, Field(ge=0)]
#: A size in bytes or as text with a unit; None stands for ``auto``.
AutoSize = Annotated[
    ByteSize | None,
    BeforeValidator(_auto, json_schema_input_type=_Written | Literal["auto"] | None),
]
#: The same for the budget, which must be given and greater than 0.
Budget = Annotated[
    Annotated[ByteSize, Field(gt=0)] | None,
    BeforeValidator(_budget, json_schema_input_type=_Written | Literal["auto"]),
]


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


class _Model(BaseModel):
    # The docstrings below fields become the descriptions in the JSON schema, shown by editors.
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Share(_Model):
    """Bounds of one tenant; ``auto`` leaves a bound to the planner."""

    min: AutoSize = None
    target: AutoSize = None
    max: AutoSize = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        given = [n for n in ("min", "target", "max") if getattr(self, n) is not None]
        for less, more in itertools.pairwise(given):
            if getattr(self, less) > getattr(self, more):
                raise PydanticCustomError("order", f"{less} must not be above {more}")
        return self


class Memory(_Model):
    """The budget of one worker: experts and KV cache together."""

    budget: Budget
    """Bytes for experts and KV cache together, such as 24GiB; auto: half of the free memory."""
    experts: Share = Share()
    """Bounds of the expert pages."""
    kv: Share = Share()
    """Bounds of the KV cache."""
    frame: AutoSize = None
    """Bytes of the unit in which memory moves between the two; auto: budget/8192, 4KiB … 2MiB."""
    banks: int = Field(default=1, ge=1)
    """Minimum number of banks for the slots; more where the kernel's slot index is narrow."""

    @property
    def size(self) -> int:
        """The budget in bytes; ``auto`` must have been resolved (``backends.machine``)."""
        if self.budget is None:
            raise InvariantError("memory.budget is still auto")
        return int(self.budget)


class Bounds(_Model):
    """Minimum and maximum bytes of a tenant; ``auto``: as configured."""

    min: AutoSize = None
    max: AutoSize = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise PydanticCustomError("order", "min must not be above max")
        return self


class HandLimits(_Model):
    """Limits set while serving (``control``)."""

    budget: AutoSize = None
    experts: Bounds = Bounds()
    kv: Bounds = Bounds()


class PolicyLimits(_Model):
    """Limits beyond which a policy is interrupted or replaced."""

    strikes: int = Field(default=DEFAULT_LIMITS.strikes, ge=1)
    """Number of faults before a policy is replaced for good, or of slow calls before a log line."""
    soft_ms: float = Field(default=DEFAULT_LIMITS.soft_s * 1e3, gt=0, le=3.6e6)
    """Milliseconds beyond which a call is counted as slow."""
    hard_s: float = Field(default=DEFAULT_LIMITS.hard_s, gt=0, le=3600)
    """Seconds beyond which a call is interrupted, which counts as a fault."""

    def limits(self) -> Limits:
        """The same limits in the form the core takes."""
        return Limits(self.strikes, self.soft_ms / 1e3, self.hard_s)


class HostStoreConfig(_Model):
    """Pages in host memory."""

    kind: Literal["host"]
    limit: AutoSize = None
    """Bytes that the pages may take; what does not fit goes to the next store. auto: no limit."""
    codec: Policy = {"kind": "none"}
    """Lossless codec that the pages are kept in."""


class FileStoreConfig(_Model):
    """Pages in a file, which is built at the first start."""

    kind: Literal["file"]
    path: str = Field(min_length=1)
    """Folder of the page file; created if missing."""
    limit: AutoSize = None
    """Bytes that the pages may take; what does not fit goes to the next store. auto: no limit."""
    codec: Policy = {"kind": "none"}
    """Lossless codec that the pages are kept in."""
    direct: bool = True
    """Read uncached parts with direct I/O; set false if the file fits in the system's cache."""


StoreConfig = Annotated[HostStoreConfig | FileStoreConfig, Field(discriminator="kind")]


#: Settings that a preset fills in if absent. ``paper``: arXiv 2604.02715, window of two layers.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "off": {},
    "paper": {
        "eviction": {"kind": "immediate"},
        "prefetch": {"kind": "next-layer", "depth": 1},
        "arbitration": {"kind": "rho"},
    },
}


class Config(_Model):
    """All settings of FluxMoE. Keys of ``vllm`` are passed to vLLM untouched."""

    model: str | None = None
    """Folder or Hugging Face name of the model; needed to serve."""
    memory: Memory
    preset: Literal["default", "paper", "off"] = "default"
    """A named set of policies; explicit policies override it. off: no paging at all."""
    eviction: Policy = {"kind": "next-use"}
    """Policy that decides which expert is evicted: a name, or {kind: NAME, option: value}."""
    prefetch: Policy = {"kind": "none"}
    """Policy that decides which experts are loaded ahead."""
    arbitration: Policy = {"kind": "fixed"}
    """Policy that divides the budget between experts and KV cache."""
    policy_limits: PolicyLimits = PolicyLimits()
    stores: list[StoreConfig] = Field(
        default=[HostStoreConfig(kind="host")], min_length=1, max_length=8
    )
    """Stores for expert pages that are not resident; a page goes to the first that has room."""
    control: bool = False
    """True if limits can be set while serving (fluxmoe limit). Reserves room for growth."""
    plugins: list[str] = []
    """Files (.py) or modules that register further policies or codecs."""
    strict_policies: bool = False
    """Stop at the first fault of a policy instead of containing it."""
    copy_threads: int = Field(default=1, ge=0, le=64)
    """Number of threads that copy pages; 0: the engine's own thread copies them."""
    seed: int = 0
    """Seed of the random numbers available to policies."""
    vllm: dict[str, Any] = {}
    """Options passed to vLLM untouched."""

    def dynamic(self, arbitration: ArbitrationPolicy) -> bool:
        """True if the split may change while serving with this policy."""
        return self.control or not arbitration.fixed

    @field_validator("stores")
    @classmethod
    def _all_stores_are_used(cls, stores: list[StoreConfig]) -> list[StoreConfig]:
        for index, store in enumerate(stores[:-1]):
            if store.limit is None:
                raise PydanticCustomError(
                    "unused", f"number {index} has no limit, so those after it would hold nothing"
                )
        return stores

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("preset"), str):
            return {**PRESETS.get(data["preset"], {}), **data}
        return data


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
