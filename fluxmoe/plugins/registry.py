"""The registry of policies and codecs, and the status of every plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pluggy
from pydantic import BaseModel

from fluxmoe import hookspecs
from fluxmoe.config import Config
from fluxmoe.core.policy.arbitration import ArbitrationPolicy
from fluxmoe.core.policy.paging import EvictionPolicy, Policies
from fluxmoe.errors import (
    ConfigError,
    FluxMoEError,
    NeedsFutureError,
    PluginLoadError,
    UnknownCodecError,
    UnknownPolicyError,
    meant,
    together,
)
from fluxmoe.plugins import checks
from fluxmoe.words import line

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
    """One registered policy or codec.

    Attributes:
        plugin: Name of the registering plugin.
        summary: First line of the factory's docstring.
        oracle: True for an eviction policy that needs the future, as far as its class tells.
    """

    kind: str
    name: str
    factory: Callable[..., Any]
    config_model: type[BaseModel] | None
    plugin: str
    summary: str
    oracle: bool

    def create(self, options: Mapping[str, Any]) -> Any:
        """Create a policy or codec with checked options. Raises PluginLoadError."""

        def made() -> Any:
            policy = self.factory(**options)
            checks.require_declared(policy, self.kind)
            return policy

        return checks.attempt(
            made,
            f"{checks.noun(self.kind)} {self.name!r} cannot be made: ",
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
            checks.check_api(plugin, name)
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
            callers = self._manager.get_hookcallers(plugin) or []
            unknown = [caller.name for caller in callers if not caller.has_spec()]
            if not unknown:
                raise PluginLoadError(line(error), where=where) from error
            known = f"the hooks: {', '.join(checks.HOOKS)}"
            raise PluginLoadError(
                f"unknown hook {unknown[0]!r}",
                where=where,
                fix="; ".join(filter(None, [meant(unknown[0], checks.HOOKS), known])),
            ) from error
        if not self._manager.get_hookcallers(plugin):
            raise PluginLoadError(
                "no hook was found",
                where=where,
                fix=f"decorate {' or '.join(checks.HOOKS)} with @fluxmoe.hookimpl",
            )
        others = [p for p in self._manager.get_plugins() if p is not plugin]
        for hook in checks.HOOKS:
            call = self._manager.subset_hook_caller(hook, others)
            register = partial(self._register, name, hook)
            checks.attempt(partial(call, register=register), f"{hook} raised ", where=where)

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
        kind = checks.kind_of(factory, name, hook, plugin)
        known = self._policies.get((kind, name))
        if known is not None:
            raise PluginLoadError(
                f"{checks.noun(kind)} {name!r} is already registered by {known.plugin}",
                where=f"plugin {plugin}",
                fix="give it another name",
            )
        # Read here, where a failure is the plugin's, for a class may compute its attributes.
        doc: object = factory.__doc__
        said = str.__str__(doc).strip().partition("\n")[0] if isinstance(doc, str) else ""
        oracle = getattr(checks.class_made_by(factory), "needs_future", False) is True
        self._policies[kind, name] = Registration(
            kind, name, factory, config_model, plugin, line(said), oracle
        )

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
            UnknownPolicyError, UnknownCodecError: The name is not registered.
            ConfigError: An option is unknown or has a bad value.
            PluginLoadError: Its factory failed.
        """
        registration, options = self._chosen(kind, spec)
        return registration.create(options)

    def _chosen(self, kind: str, spec: PolicySpec) -> tuple[Registration, dict[str, Any]]:
        options = {"kind": spec} if isinstance(spec, str) else dict(spec)
        name = options.pop("kind", None)
        if not isinstance(name, str):
            raise ConfigError(
                f"{spec!r} names no {'codec' if kind == 'codec' else 'policy'}",
                where=kind,
                fix="write {kind: NAME, …}",
            )
        registration = self.get(kind, name)
        model, where = registration.config_model, f"{kind} {name!r}"
        return registration, checks.checked_options(model, options, where)

    def policies(self, config: Config) -> Policies:
        """Create the paging policies of a configuration, for an engine.

        Raises:
            UnknownPolicyError, ConfigError, PluginLoadError: See ``create``.
            NeedsFutureError: The eviction policy is an oracle: an engine cannot know the future.
        """
        self.check(config)
        eviction: EvictionPolicy = self.create("eviction", config.eviction)
        _refuse_oracle(eviction.needs_future, config)
        prefetch = self.create("prefetch", config.prefetch)
        return Policies(eviction, prefetch, config.eviction["kind"], config.prefetch["kind"])

    def arbitration(self, config: Config) -> ArbitrationPolicy:
        """Create the arbitration policy of a configuration. Raises the errors of ``create``."""
        policy: ArbitrationPolicy = self.create("arbitration", config.arbitration)
        return policy

    def check(self, config: Config) -> None:
        """Raise all ``findings`` together."""
        if found := self.findings(config):
            raise together(found)

    def findings(self, config: Config) -> list[FluxMoEError]:
        """Everything wrong with names and options of policies and codecs; creates none of them.

        For commands that start an engine, which creates them. The errors are those of ``policies``,
        ``arbitration`` and ``create``, except those of factories.
        """
        specs = [(kind, getattr(config, kind)) for kind in ("eviction", "prefetch", "arbitration")]
        specs += [("codec", store.codec) for store in config.stores]
        found: list[FluxMoEError] = []
        for kind, spec in specs:
            try:
                registration, _ = self._chosen(kind, spec)
                if kind == "eviction":
                    _refuse_oracle(registration.oracle, config)
            except FluxMoEError as error:
                found.append(error)
        return found


def _refuse_oracle(oracle: bool, config: Config) -> None:
    """Refuse an eviction policy that needs the future."""
    if oracle:
        raise NeedsFutureError(
            f"eviction policy {config.eviction['kind']!r} needs to know the future",
            where="eviction",
            fix="it works in `fluxmoe simulate` only; choose another one to serve with",
        )
