"""The configuration: one YAML document, validated as a whole, sizes written as ``24GiB``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, ValidationError

from fluxmoe.errors import ConfigError

AUTO = "auto"


def _policy(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


def _auto(value: object) -> object:
    return None if value == AUTO else value


#: A policy: its name, or a map with ``kind`` and the policy's own options.
Policy = Annotated[dict[str, Any], BeforeValidator(_policy)]
#: A size in bytes or as text with a unit; None stands for ``auto``.
AutoSize = Annotated[ByteSize | None, BeforeValidator(_auto)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Share(_Model):
    """Bounds of one tenant; ``auto`` leaves a bound to the planner."""

    min: AutoSize = None
    target: AutoSize = None
    max: AutoSize = None


class Memory(_Model):
    """The budget of one worker: experts and KV cache together."""

    budget: ByteSize = Field(gt=0)
    experts: Share = Share()
    kv: Share = Share()
    frame: AutoSize = None
    #: Banks to spread the slots over at least; more where the kernel's slot index is narrow.
    banks: int = Field(default=1, ge=1)


class HostStoreConfig(_Model):
    """Pages in host memory."""

    kind: Literal["host"]


class Config(_Model):
    """Everything FluxMoE can be told. Keys of ``vllm`` are passed to vLLM untouched."""

    model: str | None = None
    memory: Memory
    preset: Literal["default"] = "default"
    eviction: Policy = {"kind": "next-use"}
    prefetch: Policy = {"kind": "none"}
    arbitration: Policy = {"kind": "fixed"}
    stores: list[HostStoreConfig] = Field(
        default=[HostStoreConfig(kind="host")], min_length=1, max_length=1
    )
    plugins: list[str] = []
    strict_policies: bool = False
    copy_threads: int = Field(default=1, ge=0, le=64)
    seed: int = 0
    vllm: dict[str, Any] = {}


def parse(data: object, *, where: str) -> Config:
    """Validate a configuration.

    Raises:
        ConfigError: Names the first wrong field, its value and the way out.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"expected a map of settings, not {data!r}", where=where)
    try:
        return Config.model_validate(dict(data))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            what, fix = f"unknown key {field!r}", "remove it, or check its spelling"
        elif first["type"] == "missing":
            what, fix = f"{field!r} is missing", "add it"
        else:
            what, fix = f"{field}: {first['msg']}, not {first['input']!r}", ""
        raise ConfigError(what, where=where, fix=fix) from error


def load(path: Path) -> Config:
    """Read a YAML file.

    Raises:
        ConfigError: It cannot be read, is no YAML, or does not validate.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read it: {error.strerror}", where=str(path)) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}", where=str(path)) from error
    return parse(data, where=str(path))
