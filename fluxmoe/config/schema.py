"""The settings: types, defaults, presets and descriptions."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from fluxmoe import caches, sizes
from fluxmoe.checkpoint import is_hub_name
from fluxmoe.core.policy.arbitration import ArbitrationPolicy
from fluxmoe.core.policy.paging import EvictionPolicy, PrefetchPolicy
from fluxmoe.core.policy.watchdog import DEFAULT_LIMITS, Limits

_Chosen = str | type | EvictionPolicy | PrefetchPolicy | ArbitrationPolicy


def _policy(value: object) -> object:
    # In Python, a class or an instance can replace the name (``Registry.create``).
    return {"kind": value} if isinstance(value, _Chosen) else value


def _several(value: object) -> object:
    names = [value] if isinstance(value, str | os.PathLike) else value
    if not isinstance(names, list | tuple):
        return names
    return [os.fspath(name) if isinstance(name, os.PathLike) else name for name in names]


def _size(value: object) -> int:
    try:
        return sizes.parse(value)
    except ValueError as error:
        raise PydanticCustomError("size", "{said}", {"said": str(error)}) from None


def _auto(value: object) -> object:
    return None if value is None else _budget(value)


def _budget(value: object) -> object:
    # An empty value in YAML does not mean "auto"; the word must be written out.
    return None if isinstance(value, str) and value == "auto" else _size(value)


#: A policy: its name, or a map with ``kind`` and the policy's options.
Policy = Annotated[
    dict[str, Any], BeforeValidator(_policy, json_schema_input_type=str | dict[str, Any])
]
_Written = Annotated[str, Field(pattern=sizes.PATTERN)] | Annotated[int, Field(ge=0)]
#: A size in bytes or as text with a unit; None stands for ``auto``.
AutoSize = Annotated[
    ByteSize | None,
    BeforeValidator(_auto, json_schema_input_type=_Written | Literal["auto"] | None),
]
#: The same for the budget, which is required and must be greater than 0.
Budget = Annotated[
    Annotated[ByteSize, Field(gt=0)] | None,
    BeforeValidator(_budget, json_schema_input_type=_Written | Literal["auto"]),
]
#: A number of threads; None means ``auto``.
_Count = Annotated[int, Field(ge=1, le=64)]
AutoCount = Annotated[
    _Count | None,
    BeforeValidator(
        lambda value: None if value == "auto" else value,
        json_schema_input_type=_Count | Literal["auto"] | None,
    ),
]


def is_plugin_file(name: str) -> bool:
    """Return True if a plugin is given as a file, not as a module."""
    return name.endswith(".py") or os.sep in name


class _Model(BaseModel):
    # Docstrings of fields become descriptions in the JSON schema, which editors show.
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Share(_Model):
    """Bounds of one tenant; ``auto`` lets FluxMoE choose a bound."""

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
    """Bytes of a frame, the unit in which memory moves; auto: budget/8192, 4KiB … 2MiB."""
    banks: int = Field(default=1, ge=1)
    """Minimum number of banks; more are used if the kernel's slot index is too narrow."""


class Bounds(_Model):
    """Minimum and maximum bytes of a tenant; ``auto`` leaves a bound as configured."""

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
    """Number of faults after which a policy is disabled for good, or of slow calls to be logged."""
    soft_ms: float = Field(default=DEFAULT_LIMITS.soft_s * 1e3, gt=0, le=3.6e6)
    """Milliseconds of CPU time beyond which a call is counted as slow."""
    hard_s: float = Field(default=DEFAULT_LIMITS.hard_s, gt=0, le=3600)
    """Seconds beyond which a call is interrupted, which counts as a fault."""

    def limits(self) -> Limits:
        """Convert to the core's limits."""
        return Limits(self.strikes, self.soft_ms / 1e3, self.hard_s)


class HostStoreConfig(_Model):
    """Pages in host memory."""

    kind: Literal["host"]
    limit: AutoSize = None
    """Maximum bytes of the pages; further pages go to the next store. auto: no limit."""
    codec: Policy = {"kind": "none"}
    """Lossless codec for the pages."""

    @property
    def plain(self) -> bool:
        """True if the store keeps all pages as they were loaded, without a copy."""
        return self.limit is None and self.codec["kind"] == "none"


class FileStoreConfig(_Model):
    """Pages in a file, which is built on the first start."""

    kind: Literal["file"]
    path: str = Field(default="auto", min_length=1)
    """Folder of the page file, relative to the configuration file's folder; created if missing.
    auto: fluxmoe/pages in the user's cache folder."""
    limit: AutoSize = None
    """Maximum bytes of the pages; further pages go to the next store. auto: no limit."""
    codec: Policy = {"kind": "none"}
    """Lossless codec for the pages."""
    direct: bool = True
    """Read uncached parts with direct I/O; set to false if the file fits in the system's cache."""
    depth: AutoCount = None
    """Number of threads that read pages; auto: measured at startup (files of 256 MiB or more)."""

    @property
    def plain(self) -> bool:
        """False: pages are written to the file."""
        return False

    @property
    def folder(self) -> Path:
        """The folder of the page file."""
        return caches.own("pages") if self.path == "auto" else caches.expanded(self.path)


StoreConfig = Annotated[HostStoreConfig | FileStoreConfig, Field(discriminator="kind")]


#: Settings that a preset adds if they are absent. ``paper``: arXiv 2604.02715 with a window of two
#: layers.
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
    """All settings of FluxMoE. The keys of ``vllm`` are passed to vLLM unchanged."""

    model: Annotated[str, Field(min_length=1)] | None = None
    """Model folder, relative to this file, or Hugging Face name; required for serving."""
    memory: Memory
    preset: Literal["default", "paper", "off"] = "default"
    """Named set of policies, which explicit policies override. off: no paging."""
    eviction: Policy = {"kind": "next-use"}
    """Eviction policy: a name, or {kind: NAME, option: value}."""
    prefetch: Policy = {"kind": "none"}
    """Prefetch policy, which loads experts ahead of time."""
    arbitration: Policy = {"kind": "fixed"}
    """Arbitration policy, which splits the budget between experts and KV cache."""
    policy_limits: PolicyLimits = PolicyLimits()
    stores: list[StoreConfig] = Field(
        default=[HostStoreConfig(kind="host")], min_length=1, max_length=8
    )
    """Stores for non-resident expert pages; a page goes to the first one with room."""
    control: bool = False
    """Allow limits to be set while serving (fluxmoe limit), and reserve room for growth."""
    plugins: Annotated[
        list[str], BeforeValidator(_several, json_schema_input_type=str | list[str])
    ] = []
    """Plugins: .py files or modules that register policies or codecs; a list or a single name."""
    strict_policies: bool = False
    """Stop at the first policy fault instead of containing it."""
    copy_threads: int = Field(default=1, ge=0, le=64)
    """Number of threads that copy pages; 0: the engine's thread copies them."""
    seed: int = Field(default=0, ge=0)
    """Seed of the random numbers for policies."""
    vllm: dict[str, Any] = {}
    """Options passed to vLLM unchanged."""

    def resolved(self, budget: int) -> Resolved:
        """Return a copy whose budget, which may have been ``auto``, is this number of bytes."""
        memory = ResolvedMemory.model_construct(**{**dict(self.memory), "budget": ByteSize(budget)})
        return Resolved.model_construct(**{**dict(self), "memory": memory})

    def located(self, folder: Path) -> Self:
        """Return a copy with absolute paths; relative paths start from ``folder``.

        This applies to plugin files, stores, and the model, unless the model is a hub name and no
        folder has that name. The options of ``vllm`` are unchanged, except that a model whose path
        becomes absolute is served under its original name.
        """

        def absolute(path: str) -> str:
            return str(folder / caches.expanded(path))

        changed: dict[str, Any] = {
            "plugins": [absolute(name) if is_plugin_file(name) else name for name in self.plugins],
            "stores": [
                store.model_copy(update={"path": absolute(store.path)})
                if isinstance(store, FileStoreConfig) and store.path != "auto"
                else store
                for store in self.stores
            ],
        }
        if self.model is not None:
            local = not is_hub_name(self.model) or os.path.isdir(absolute(self.model))
            changed["model"] = absolute(self.model) if local else self.model
            named = {"served-model-name", "served_model_name"} & self.vllm.keys()
            if changed["model"] != self.model and not named:
                # Clients of the server use the model name that is written in the file.
                changed["vllm"] = {**self.vllm, "served-model-name": self.model}
        # Update only what changes, so that defaults remain unset.
        update = {key: value for key, value in changed.items() if value != getattr(self, key)}
        return self.model_copy(update=update)

    def dynamic(self, arbitration: ArbitrationPolicy) -> bool:
        """Return True if the split may change while serving with this policy."""
        return self.control or not arbitration.fixed

    @field_validator("stores")
    @classmethod
    def _all_stores_are_used(cls, stores: list[StoreConfig]) -> list[StoreConfig]:
        for index, store in enumerate(stores[:-1]):
            if store.limit is None:
                raise PydanticCustomError(
                    "unused", f"store {index} has no limit, so the stores after it would be empty"
                )
        return stores

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("preset"), str):
            return {**PRESETS.get(data["preset"], {}), **data}
        return data


class ResolvedMemory(Memory):
    """Memory with the budget in bytes."""

    budget: ByteSize


class Resolved(Config):
    """A configuration for an engine on this machine, with the budget in bytes."""

    memory: ResolvedMemory
