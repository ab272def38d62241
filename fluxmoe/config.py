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
    # An empty line in YAML is not "auto", which must be asked for.
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
#: The same for the budget, which must be given and more than nothing.
Budget = Annotated[
    Annotated[ByteSize, Field(gt=0)] | None,
    BeforeValidator(_budget, json_schema_input_type=_Written | Literal["auto"]),
]


#: What pydantic says in words of Python, in words of YAML.
_WHAT = {
    "string_type": "a text is needed",
    "dict_type": "a map is needed",
    "model_type": "a map is needed",
    "model_attributes_type": "a map is needed",
    "string_too_short": "a text is needed",
    "list_type": "a list is needed",
}
_FIXES = {
    "unused": "give all stores but the last a limit",
    "size": "",  # it is in what was said
}


def size(text: object, *, where: str) -> int:
    """A size given on the command line, more than nothing. Raises ConfigError."""
    try:
        found = sizes.parse(text)
    except ValueError as error:
        raise ConfigError(str(error), where=where) from None
    if not found:
        raise ConfigError(f"it must be greater than 0, not {text!r}", where=where)
    return found


class _Model(BaseModel):
    # The docstrings below fields are the descriptions that editors show from the JSON schema.
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
    """Bytes for experts and KV cache together, such as 24GiB; auto: half of what is free."""
    experts: Share = Share()
    """Bounds of the expert pages."""
    kv: Share = Share()
    """Bounds of the KV cache."""
    frame: AutoSize = None
    """Unit in which memory moves between the two; auto: budget/8192 within 4KiB … 2MiB."""
    banks: int = Field(default=1, ge=1)
    """Banks to spread the slots over at least; more where the kernel's slot index is narrow."""

    @property
    def size(self) -> int:
        """The budget in bytes; ``auto`` must have been resolved (``backends.machine``)."""
        if self.budget is None:
            raise InvariantError("memory.budget is still auto")
        return int(self.budget)


class Bounds(_Model):
    """What a tenant must and may have; ``auto`` is as at the start."""

    min: AutoSize = None
    max: AutoSize = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise PydanticCustomError("order", "min must not be above max")
        return self


class HandLimits(_Model):
    """Limits that are set while serving (``control``)."""

    budget: AutoSize = None
    experts: Bounds = Bounds()
    kv: Bounds = Bounds()


class PolicyLimits(_Model):
    """What a policy is allowed before it is interrupted or replaced."""

    strikes: int = Field(default=DEFAULT_LIMITS.strikes, ge=1)
    """Faults after which a policy is replaced for good, and slow calls worth a line in the log."""
    soft_ms: float = Field(default=DEFAULT_LIMITS.soft_s * 1e3, gt=0, le=3.6e6)
    """Milliseconds beyond which a call is counted as slow."""
    hard_s: float = Field(default=DEFAULT_LIMITS.hard_s, gt=0, le=3600)
    """Seconds beyond which a call is interrupted, which is a fault."""

    def limits(self) -> Limits:
        """The same as the core takes it."""
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
    """Folder of the page file; it is made if there is none."""
    limit: AutoSize = None
    """Bytes that the pages may take; what does not fit goes to the next store. auto: no limit."""
    codec: Policy = {"kind": "none"}
    """Lossless codec that the pages are kept in."""
    direct: bool = True
    """Read past the system's cache what is not in it; false where memory has room for the file."""


StoreConfig = Annotated[HostStoreConfig | FileStoreConfig, Field(discriminator="kind")]


#: What a preset chooses where nothing is said. ``paper``: arXiv 2604.02715, a window of two layers.
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
    """Everything FluxMoE can be told. Keys of ``vllm`` are passed to vLLM untouched."""

    model: str | None = None
    """Folder or Hugging Face name of the model; needed to serve."""
    memory: Memory
    preset: Literal["default", "paper", "off"] = "default"
    """A named set of policies; those named themselves win over it. off: no paging at all."""
    eviction: Policy = {"kind": "next-use"}
    """Policy that decides which expert is given up: a name, or {kind: NAME, option: value}."""
    prefetch: Policy = {"kind": "none"}
    """Policy that decides which experts are loaded ahead."""
    arbitration: Policy = {"kind": "fixed"}
    """Policy that divides the budget between experts and KV cache."""
    policy_limits: PolicyLimits = PolicyLimits()
    stores: list[StoreConfig] = Field(
        default=[HostStoreConfig(kind="host")], min_length=1, max_length=8
    )
    """Where the expert pages lie that are not resident: in the first store that has room."""
    control: bool = False
    """Whether limits can be set by hand while serving: fluxmoe limit. Reserves room for growth."""
    plugins: list[str] = []
    """Files (.py) or modules that register further policies or codecs."""
    strict_policies: bool = False
    """Stop at the first fault of a policy instead of containing it."""
    copy_threads: int = Field(default=1, ge=0, le=64)
    """Threads that copy pages; 0 = the engine's own thread does."""
    seed: int = 0
    """Seed of the random numbers that policies may use."""
    vllm: dict[str, Any] = {}
    """Options passed to vLLM untouched."""

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
        ConfigError: Names the first wrong field, its value and the way out.
    """
    return _parse(Config, data, where)


def parse_limits(data: object, *, where: str) -> HandLimits:
    """The same for limits that are set while serving."""
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
            del place[2:3]  # the store's kind, which nobody wrote there
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
            if first["type"] != "size":  # which says what it has found
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
    """Refuses a key that is there twice; of which YAML's own reader would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def load(path: Path) -> Config:
    """Read a YAML file.

    Raises:
        ConfigError: It cannot be read, is no YAML, or does not validate.
    """
    if path.is_dir():
        raise ConfigError(
            "it is a folder", where=str(path), fix="give a YAML file; it names the model: FOLDER"
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
            mark, problem = error.problem_mark, error.problem or "cannot be read"
            where = f"{path}, line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(f"not valid YAML: {problem}", where=where) from error
    return parse(data, where=str(path))
