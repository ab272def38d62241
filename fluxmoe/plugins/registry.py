"""The registry of policies and codecs, and the status of every plugin."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, TypeVar, get_type_hints

import pluggy
from pydantic import BaseModel, ValidationError

from fluxmoe import hookspecs
from fluxmoe.config import Config
from fluxmoe.core.policy.arbitration import ArbitrationPolicy
from fluxmoe.core.policy.paging import EvictionPolicy, PrefetchPolicy
from fluxmoe.core.policy.watchdog import HardLimitExceeded, Limits, Stopwatch
from fluxmoe.core.words import from_signal, line, raised
from fluxmoe.errors import (
    ConfigError,
    FluxMoEError,
    NeedsFutureError,
    PluginLoadError,
    UnknownCodecError,
    UnknownPolicyError,
)
from fluxmoe.hookspecs import OLDEST_PLUGIN_API, PLUGIN_API
from fluxmoe.stores.codec.base import Codec

T = TypeVar("T")

#: Imports may take their time; a loop that never ends must not.
LIMITS = Limits(hard_s=30.0)

logger = logging.getLogger("fluxmoe")

#: Attribute in which a plugin's module declares its API version; 1 if absent.
DECLARATION = "fluxmoe_plugin_api"

_KINDS: dict[str, type] = {
    "eviction": EvictionPolicy,
    "prefetch": PrefetchPolicy,
    "arbitration": ArbitrationPolicy,
    "codec": Codec,
}

#: Hook → kinds that it may register.
_HOOKS: dict[str, tuple[str, ...]] = {
    "fluxmoe_register_policies": ("eviction", "prefetch", "arbitration"),
    "fluxmoe_register_codecs": ("codec",),
}

#: Class attributes that the host reads, with their required types.
_DECLARED: dict[str, dict[str, type]] = {
    "eviction": {"stable_score": bool, "needs_future": bool},
    "prefetch": {"lead": int},
    "arbitration": {"fixed": bool},
    "codec": {},
}

#: A policy in a configuration or a command line: ``lru`` or ``{kind: lru, option: value}``.
PolicySpec = str | Mapping[str, Any]

Origin = Literal["built in", "installed", "named"]


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin and its status.

    Attributes:
        name: Name of its entry point, or the file or module as given.
        origin: Source of the plugin; ``named``: on the command line or in the configuration.
        version: Version of its distribution, or its module's ``__version__``; may be empty.
        status: ``ok``, ``broken``, or ``left out`` by the allow-list.
        problem: The reason if it is not ``ok``.
    """

    name: str
    origin: Origin
    version: str = ""
    status: Literal["ok", "broken", "left out"] = "ok"
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Registration:
    """One registered policy or codec. ``plugin`` is the name of the registering plugin."""

    kind: str
    name: str
    factory: Callable[..., Any]
    config_model: type[BaseModel] | None
    plugin: str

    @property
    def summary(self) -> str:
        """First line of the factory's docstring."""
        doc: object = self.factory.__doc__
        return line(doc.strip().partition("\n")[0]) if isinstance(doc, str) else ""

    def create(self, options: Mapping[str, Any]) -> Any:
        """Create a policy or codec with checked options. Raises PluginLoadError."""

        def made() -> Any:
            policy = self.factory(**options)
            for attribute, kind in _DECLARED[self.kind].items():
                value: object = getattr(policy, attribute)
                if type(value) is not kind:
                    raise TypeError(f"{attribute} is {line(value, repr)}, not {kind.__name__}")
            return policy

        return attempt(
            made,
            f"{_noun(self.kind)} {self.name!r} cannot be made: ",
            where=f"plugin {self.plugin}",
            passed=FluxMoEError,  # such as a missing package
        )


class Registry:
    """All known policies and codecs, by kind and name.

    Attributes:
        plugins: Every plugin found, including broken ones.
    """

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("fluxmoe")
        self._manager.add_hookspecs(hookspecs)
        self._policies: dict[tuple[str, str], Registration] = {}
        self.plugins: list[Plugin] = []

    def __iter__(self) -> Iterator[Registration]:
        """The policies."""
        return (made for made in self.everything() if made.kind != "codec")

    def everything(self) -> list[Registration]:
        """Policies and codecs."""
        return sorted(self._policies.values(), key=lambda r: (r.kind, r.name))

    def knows(self, plugin: object) -> bool:
        """True if a plugin object or module has been added."""
        return self._manager.is_registered(plugin)

    def require(self, name: str) -> None:
        """Raise PluginLoadError if the plugin of that name was found but is not in use."""
        for plugin in self.plugins:
            if plugin.name == name and plugin.status != "ok":
                problem = f"it is {plugin.status}: {plugin.problem}"
                raise PluginLoadError(problem, where=f"plugin {name}")

    def add(
        self, plugin: object, name: str, *, origin: Origin = "named", version: str = ""
    ) -> None:
        """Register a plugin object or module with everything its hooks register, or nothing.

        Raises:
            PluginLoadError: Its hooks raised, or registered something unusable.
        """
        if self._manager.has_plugin(name) or self.knows(plugin):
            raise PluginLoadError(
                f"a plugin called {name!r} already exists",
                where=f"plugin {name}",
                fix="name it once, or give its entry point another name",
            )
        before = dict(self._policies)
        try:
            check_api(plugin, name)
            self._register_hooks(plugin, name)
        except BaseException:
            self._manager.unregister(name=name)
            self._policies = before
            raise
        self.plugins.append(Plugin(name, origin, version))

    def _register_hooks(self, plugin: object, name: str) -> None:
        where = f"plugin {name}"
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except (ValueError, pluggy.PluginValidationError) as error:
            raise PluginLoadError(line(error), where=where) from error
        if not self._manager.get_hookcallers(plugin):
            raise PluginLoadError(
                "no hook was found",
                where=where,
                fix=f"decorate {' or '.join(_HOOKS)} with @fluxmoe.hookimpl",
            )
        others = [p for p in self._manager.get_plugins() if p is not plugin]
        for hook in _HOOKS:
            call = self._manager.subset_hook_caller(hook, others)
            register = partial(self._register, name, hook)
            attempt(partial(call, register=register), f"{hook} raised ", where=where)

    def _register(
        self,
        plugin: str,
        hook: str,
        name: object,
        factory: Callable[..., Any],
        config_model: type[BaseModel] | None = None,
    ) -> None:
        if type(name) is not str or not name or line(name) != name:
            raise PluginLoadError(f"{line(name, repr)} is not a name", where=f"plugin {plugin}")
        made = _class_made_by(factory)
        kinds = [kind for kind in _HOOKS[hook] if issubclass(made, _KINDS[kind])]
        if not kinds and hook == "fluxmoe_register_codecs":
            raise PluginLoadError(
                f"{name!r} is not a codec class: {line(factory, repr)}",
                where=f"plugin {plugin}",
                fix="derive it from fluxmoe.Codec; a function that makes codecs must say so in its "
                "return annotation",
            )
        if not kinds:
            raise PluginLoadError(
                f"{name!r} is not a policy class: {line(factory, repr)}",
                where=f"plugin {plugin}",
                fix="derive it from fluxmoe.EvictionPolicy, PrefetchPolicy or ArbitrationPolicy; "
                "a function that makes policies must say which kind in its return annotation",
            )
        if isinstance(factory, type) and kinds[0] == "eviction" and not _decides(factory):
            raise PluginLoadError(
                f"eviction policy {name!r} decides nothing: {line(factory, repr)}",
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
            broken = {p.name: p.problem for p in self.plugins if p.status == "broken"}
            if kind == "codec":
                raise UnknownCodecError(name, self.names(kind), broken) from None
            raise UnknownPolicyError(kind, name, self.names(kind), broken) from None

    def create(self, kind: str, spec: PolicySpec) -> Any:
        """Create a policy or codec from ``name`` or ``{kind: name, option: value}``.

        Raises:
            UnknownPolicyError: The name is not registered.
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
                    line(f"{field}{first['msg']}, not {line(first['input'], repr)}"),
                    where=f"{kind} {name!r}",
                ) from error
            except Exception as error:  # of a validator, which may raise anything
                raise ConfigError(
                    f"its options cannot be checked: {raised(error)}", where=f"{kind} {name!r}"
                ) from error
            options = checked.model_dump()
        elif options:
            raise ConfigError(
                f"unknown option {sorted(options)[0]!r}",
                where=f"{kind} {name!r}",
                fix="it has no options",
            )
        return registration.create(options)

    def serving(self, config: Config) -> tuple[EvictionPolicy, PrefetchPolicy, ArbitrationPolicy]:
        """Create the policies of a configuration, for an engine.

        Raises:
            UnknownPolicyError, ConfigError, PluginLoadError: See ``create``.
            NeedsFutureError: The eviction policy is an oracle: an engine cannot know the future.
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
    """True if an eviction policy has one of the three ways to choose victims."""
    return policy.score_kernel is not None or any(
        getattr(policy, method) is not getattr(EvictionPolicy, method)
        for method in ("score", "make_kernel", "select")
    )


def _options(model: type[BaseModel]) -> set[str] | None:
    """The options a model knows; None if it accepts any. A misspelt one must not be ignored."""
    if model.model_config.get("extra") == "allow":
        return None
    aliases = (field.validation_alias for field in model.model_fields.values())
    return {*model.model_fields, *(alias for alias in aliases if isinstance(alias, str))}


def _class_made_by(factory: Callable[..., Any]) -> type:
    """The class a factory makes: itself, or its return annotation."""
    if isinstance(factory, type):
        return factory
    try:
        made = get_type_hints(factory).get("return")
    except (TypeError, NameError):
        made = None
    return made if isinstance(made, type) else object


def attempt(
    function: Callable[[], T],
    what: str,
    *,
    where: str,
    fix: str = "",
    passed: type[FluxMoEError] = PluginLoadError,
) -> T:
    """Call ``function``; a failure is reported as ``what`` followed by the reason.

    An exit is a failure like any other, and so is a call that takes longer than ``LIMITS``: it is
    interrupted between two instructions of Python.

    Raises:
        PluginLoadError: It failed.
        FluxMoEError: It raised an error of the class ``passed``, which is not wrapped.
    """
    try:
        return Stopwatch(LIMITS).call(function, ())
    except HardLimitExceeded:
        reason = f"it took more than {LIMITS.hard_s:g} s"
        raise PluginLoadError(f"{what}TimeoutError: {reason}", where=where, fix=fix) from None
    except (passed, KeyboardInterrupt):
        raise
    except BaseException as error:
        if from_signal(error):
            raise
        raise PluginLoadError(f"{what}{raised(error)}", where=where, fix=fix) from error


def check_api(
    plugin: object, name: str, *, current: int = PLUGIN_API, oldest: int = OLDEST_PLUGIN_API
) -> None:
    """Refuse a plugin for an unsupported API version, warn about an outdated one.

    Args:
        plugin: The plugin's module or object.
        name: Name of the plugin.
        current, oldest: Newest and oldest supported API versions.

    Raises:
        PluginLoadError: It declares a newer API, one no longer supported, or an invalid version.
    """
    declared: object = getattr(plugin, DECLARATION, 1)
    where = f"plugin {name}"
    if isinstance(declared, bool) or not isinstance(declared, int) or declared < 1:
        raise PluginLoadError(
            f"{DECLARATION} is {line(declared, repr)}",
            where=where,
            fix=f"write {DECLARATION} = {current}",
        )
    if declared > current:
        raise PluginLoadError(
            f"it was written for plugin API {declared}, this is {current}",
            where=where,
            fix="upgrade fluxmoe, or use an older version of the plugin",
        )
    if declared < oldest:
        raise PluginLoadError(
            f"it was written for plugin API {declared}, the oldest that works is {oldest}",
            where=where,
            fix="use a newer version of the plugin, or an older fluxmoe",
        )
    if declared < current:
        _warn(name, declared, current)


@cache
def _warn(name: str, declared: int, current: int) -> None:
    logger.warning(
        "plugin %s was written for plugin API %d; %d is current, and support for %d will end",
        *(name, declared, current, declared),
    )
