"""Finding plugins, loading them, and the registry of policies and codecs that results.

Sources, in order: what is built in, entry points of the group ``fluxmoe`` (restricted by the
allow-list ``FLUXMOE_PLUGINS``), then files and modules named on the command line or in the
configuration. A plugin that cannot be loaded is an error that names it; nothing is skipped
silently.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pluggy
from pydantic import BaseModel, ValidationError

from fluxmoe import hookspecs
from fluxmoe.config import Config
from fluxmoe.core.codec import Codec
from fluxmoe.core.policy import ArbitrationPolicy, EvictionPolicy, PrefetchPolicy
from fluxmoe.errors import (
    ConfigError,
    MissingDependencyError,
    NeedsFutureError,
    PluginLoadError,
    UnknownCodecError,
    UnknownPolicyError,
)

GROUP = "fluxmoe"
ALLOW_LIST = "FLUXMOE_PLUGINS"

_KINDS: dict[str, type] = {
    "eviction": EvictionPolicy,
    "prefetch": PrefetchPolicy,
    "arbitration": ArbitrationPolicy,
}

#: Hook → kinds of what it may register.
_HOOKS: dict[str, tuple[str, ...]] = {
    "fluxmoe_register_policies": tuple(_KINDS),
    "fluxmoe_register_codecs": ("codec",),
}
_KINDS["codec"] = Codec

#: How a configuration or a command line names a policy: ``lru`` or ``{kind: lru, option: value}``.
PolicySpec = str | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Registration:
    """One registered policy or codec."""

    kind: str
    name: str
    factory: Callable[..., Any]
    config_model: type[BaseModel] | None
    plugin: str

    @property
    def summary(self) -> str:
        """First line of the factory's docstring."""
        return (self.factory.__doc__ or "").strip().partition("\n")[0]


class Registry:
    """All policies and codecs that are known in this process, by kind and name."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._policies: dict[tuple[str, str], Registration] = {}

    def __iter__(self) -> Iterator[Registration]:
        policies = (r for r in self._policies.values() if r.kind != "codec")
        return iter(sorted(policies, key=lambda r: (r.kind, r.name)))

    def add(self, plugin: object, name: str) -> None:
        """Register a plugin object or module and everything its hooks register.

        Raises:
            PluginLoadError: Its hooks raised, or registered something unusable.
        """
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except (ValueError, pluggy.PluginValidationError) as error:
            raise PluginLoadError(str(error), where=f"plugin {name}") from error
        implemented = self._manager.get_hookcallers(plugin) or []
        if not implemented:
            raise PluginLoadError(
                "no hook was found",
                where=f"plugin {name}",
                fix=f"decorate {' or '.join(_HOOKS)} with @fluxmoe.hookimpl",
            )
        for hook in _HOOKS:
            self._call(hook, plugin, name)

    def _call(self, hook: str, plugin: object, name: str) -> None:
        others = [p for p in self._manager.get_plugins() if p is not plugin]
        call = self._manager.subset_hook_caller(hook, others)
        try:
            call(register=lambda *a, **k: self._register(name, hook, *a, **k))
        except PluginLoadError:
            raise
        except Exception as error:
            raise PluginLoadError(
                f"{hook} raised {type(error).__name__}: {error}",
                where=f"plugin {name}",
            ) from error

    def _register(
        self,
        plugin: str,
        hook: str,
        name: object,
        factory: Callable[..., Any],
        config_model: type[BaseModel] | None = None,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise PluginLoadError(f"{name!r} is not a name", where=f"plugin {plugin}")
        made = _class_made_by(factory)
        kinds = [kind for kind in _HOOKS[hook] if issubclass(made, _KINDS[kind])]
        if not kinds and hook == "fluxmoe_register_codecs":
            raise PluginLoadError(
                f"{name!r} is not a codec class: {factory!r}",
                where=f"plugin {plugin}",
                fix="derive it from fluxmoe.Codec; a function that makes codecs must say so in its "
                "return annotation",
            )
        if not kinds:
            raise PluginLoadError(
                f"{name!r} is not a policy class: {factory!r}",
                where=f"plugin {plugin}",
                fix="derive it from fluxmoe.EvictionPolicy, PrefetchPolicy or ArbitrationPolicy; "
                "a function that makes policies must say which kind in its return annotation",
            )
        if isinstance(factory, type) and kinds[0] == "eviction" and not _decides(factory):
            raise PluginLoadError(
                f"eviction policy {name!r} decides nothing: {factory!r}",
                where=f"plugin {plugin}",
                fix="define score(self, view, pages), score_kernel or select",
            )
        known = self._policies.get((kinds[0], name))
        if known is not None:
            raise PluginLoadError(
                f"{_noun(kinds[0])} {name!r} is already registered by {known.plugin}",
                where=f"plugin {plugin}",
                fix="give it another name",
            )
        self._policies[kinds[0], name] = Registration(kinds[0], name, factory, config_model, plugin)

    def names(self, kind: str) -> list[str]:
        return [name for k, name in sorted(self._policies) if k == kind]

    def get(self, kind: str, name: str) -> Registration:
        """Raises UnknownPolicyError or UnknownCodecError, which list the known names."""
        try:
            return self._policies[kind, name]
        except KeyError:
            if kind == "codec":
                raise UnknownCodecError(name, self.names(kind)) from None
            raise UnknownPolicyError(kind, name, self.names(kind)) from None

    def create(self, kind: str, spec: PolicySpec) -> Any:
        """A new policy or codec from ``name`` or ``{kind: name, option: value}``.

        Raises:
            UnknownPolicyError: Nobody registered the name.
            ConfigError: An option is unknown or has a bad value.
        """
        options = {"kind": spec} if isinstance(spec, str) else dict(spec)
        name = options.pop("kind", None)
        if not isinstance(name, str):
            raise ConfigError(
                f"{spec!r} names no {'codec' if kind == 'codec' else 'policy'}",
                where=kind,
                fix="write {kind: NAME, …}",
            )
        registration = self.get(kind, name)
        if registration.config_model is not None:
            known = _options(registration.config_model)
            if known is not None and (unknown := sorted(options.keys() - known)):
                raise ConfigError(
                    f"unknown option {unknown[0]!r}",
                    where=f"{kind} {name!r}",
                    fix=f"its options: {', '.join(sorted(known)) or 'none'}",
                )
            try:
                checked = registration.config_model.model_validate(options)
            except ValidationError as error:
                first = error.errors()[0]
                field = "".join(f"{part}: " for part in first["loc"])
                raise ConfigError(
                    f"{field}{first['msg']}, not {first['input']!r}", where=f"{kind} {name!r}"
                ) from error
            options = checked.model_dump()
        elif options:
            raise ConfigError(
                f"unknown option {sorted(options)[0]!r}",
                where=f"{kind} {name!r}",
                fix="it has no options",
            )
        try:
            return registration.factory(**options)
        except MissingDependencyError:
            raise
        except Exception as error:
            raise PluginLoadError(
                f"{_noun(kind)} {name!r} cannot be made: {type(error).__name__}: {error}",
                where=f"plugin {registration.plugin}",
            ) from error

    def serving(self, config: Config) -> tuple[EvictionPolicy, PrefetchPolicy, ArbitrationPolicy]:
        """New policies as a configuration asks for them, for an engine.

        Raises:
            UnknownPolicyError, ConfigError, PluginLoadError: See ``create``.
            NeedsFutureError: An oracle was asked for: no engine can know the future.
        """
        eviction: EvictionPolicy = self.create("eviction", config.eviction)
        if eviction.needs_future:
            raise NeedsFutureError(
                f"eviction policy {config.eviction['kind']!r} needs to know the future",
                where="eviction",
                fix="it works in `fluxmoe simulate` only; choose another one to serve with",
            )
        prefetch = self.create("prefetch", config.prefetch)
        return eviction, prefetch, self.create("arbitration", config.arbitration)


def _noun(kind: str) -> str:
    return kind if kind == "codec" else f"{kind} policy"


def _decides(policy: Any) -> bool:
    """Whether an eviction policy has one of the three ways to choose victims."""
    return policy.score_kernel is not None or any(
        getattr(policy, method) is not getattr(EvictionPolicy, method)
        for method in ("score", "make_kernel", "select")
    )


def _options(model: type[BaseModel]) -> set[str] | None:
    """The options a model knows; None if it takes any. A misspelt one must not be ignored."""
    if model.model_config.get("extra") == "allow":
        return None
    aliases = (field.validation_alias for field in model.model_fields.values())
    return {*model.model_fields, *(alias for alias in aliases if isinstance(alias, str))}


def load(extra: Iterable[str] = ()) -> Registry:
    """The registry of built-in, installed and explicitly named plugins.

    Args:
        extra: Paths of ``.py`` files, or dotted module names.

    Raises:
        PluginLoadError: One of them cannot be loaded; the message names it.
    """
    from fluxmoe import policies
    from fluxmoe.stores import codec

    registry = Registry()
    registry.add(policies, "fluxmoe")
    registry.add(codec, "fluxmoe.stores.codec")
    for entry in _installed():
        try:
            module = entry.load()
        except Exception as error:
            raise PluginLoadError(
                f"cannot import {entry.value}: {type(error).__name__}: {error}",
                where=f"plugin {entry.name}",
                fix=f"uninstall it, or leave it out of {ALLOW_LIST}",
            ) from error
        registry.add(module, entry.name)
    for name in extra:
        registry.add(_import(name), name)
    return registry


def _class_made_by(factory: Callable[..., Any]) -> type:
    """The class a factory makes: itself, or what its return annotation says."""
    if isinstance(factory, type):
        return factory
    try:
        made = get_type_hints(factory).get("return")
    except (TypeError, NameError):
        made = None
    return made if isinstance(made, type) else object


def _installed() -> list[importlib.metadata.EntryPoint]:
    allowed = os.environ.get(ALLOW_LIST)
    entries = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name)
    if allowed is None:
        return entries
    wanted = {name.strip() for name in allowed.split(",") if name.strip()}
    called = {name: [entry for entry in entries if _is_called(entry, name)] for name in wanted}
    if missing := sorted(name for name, found in called.items() if not found):
        raise PluginLoadError(
            f"no installed plugin is called {missing[0]!r}",
            where=ALLOW_LIST,
            fix=f"installed: {', '.join(e.name for e in entries) or 'none'}",
        )
    return [entry for entry in entries if any(entry in found for found in called.values())]


def _is_called(entry: importlib.metadata.EntryPoint, name: str) -> bool:
    """Whether ``name`` is the entry point's, or its distribution's as pip compares them."""
    return name == entry.name or (entry.dist is not None and _same(name, entry.dist.name))


def _same(a: str, b: str) -> bool:
    """Whether two names of distributions are the same name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", a).lower() == re.sub(r"[-_.]+", "-", b).lower()


def _import(name: str) -> ModuleType:
    path = Path(name)
    is_file = path.suffix == ".py" or os.sep in name
    try:
        if not is_file:
            return importlib.import_module(name)
        if not path.is_file():
            raise PluginLoadError("no such file", where=f"plugin {name}")
        # A name of its own per path, so that two files of the same name do not collide.
        digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
        spec = importlib.util.spec_from_file_location(f"fluxmoe_plugin_{path.stem}_{digest}", path)
        if spec is None or spec.loader is None:
            raise PluginLoadError("not a Python file", where=f"plugin {name}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[spec.name]
            raise
        return module
    except PluginLoadError:
        raise
    except Exception as error:
        raise PluginLoadError(
            f"cannot import it: {type(error).__name__}: {error}", where=f"plugin {name}"
        ) from error
