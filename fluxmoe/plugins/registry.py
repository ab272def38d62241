"""The registry of policies and codecs, and the status of each plugin."""

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
from fluxmoe.core.policy.paging import EvictionPolicy, Policies, PrefetchPolicy
from fluxmoe.errors import (
    ConfigError,
    FluxMoEError,
    NeedsFutureError,
    PluginLoadError,
    UnknownCodecError,
    UnknownPolicyError,
    join,
    meant,
)
from fluxmoe.findings import Findings
from fluxmoe.plugins import checks
from fluxmoe.words import class_name, line

#: A policy: ``lru`` or ``{kind: lru, option: value}``. In Python, a policy class or an instance can
#: replace the name.
PolicySpec = str | Mapping[str, Any] | type | EvictionPolicy | PrefetchPolicy | ArbitrationPolicy

Origin = Literal["built in", "installed", "named"]


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin and its status.

    Attributes:
        name: Name of the entry point, or the file or module as given.
        origin: Source of the plugin; ``named`` means on the command line or in the configuration.
        version: Version of the distribution, or the module's ``__version__``; may be empty.
        status: ``ok``, ``broken``, or ``left out`` (by the allow-list).
        problem: The reason if the status is not ``ok``.
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
        kind: ``eviction``, ``prefetch``, ``arbitration`` or ``codec``.
        name: Name under which the policy or codec is registered.
        factory: Callable that makes the policy or codec.
        config_model: Model of the options; None if there are no options.
        plugin: Name of the plugin that registered the policy or codec.
        summary: First line of the factory's docstring.
        oracle: True for an eviction policy whose class declares that it needs the future.
    """

    kind: str
    name: str
    factory: Callable[..., Any]
    config_model: type[BaseModel] | None
    plugin: str
    summary: str
    oracle: bool

    def create(self, options: Mapping[str, Any]) -> Any:
        """Create a policy or codec with validated options; raise PluginLoadError if that fails."""

        def made() -> Any:
            policy = self.factory(**options)
            checks.require_declared(policy, self.kind)
            return policy

        return checks.attempt(
            made,
            f"{checks.noun(self.kind)} {self.name!r} cannot be created: ",
            where=f"plugin {self.plugin}",
            passed=FluxMoEError,  # raised, for example, if a package is missing
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
        """Iterate over the policies."""
        return (made for made in self.everything() if made.kind != "codec")

    def everything(self) -> list[Registration]:
        """List policies and codecs."""
        return sorted(self._policies.values(), key=lambda r: (r.kind, r.name))

    def knows(self, plugin: object) -> bool:
        """Return True if the plugin object or module has been added."""
        return self._manager.is_registered(plugin)

    def require(self, name: str) -> None:
        """Raise PluginLoadError if the plugin of this name was found but is not in use."""
        for plugin in self.plugins:
            if plugin.name == name and plugin.status != "ok":
                problem = f"the plugin is {plugin.status}: {plugin.problem}"
                raise PluginLoadError(problem, where=f"plugin {name}")

    def add(
        self, plugin: object, name: str, *, origin: Origin = "named", version: str = ""
    ) -> None:
        """Register a plugin object or module: everything that its hooks register, or nothing.

        Raises:
            PluginLoadError: A hook raised or registered something invalid.
        """
        if self._manager.has_plugin(name) or self.knows(plugin):
            raise PluginLoadError(
                f"a plugin named {name!r} already exists",
                where=f"plugin {name}",
                fix="name the plugin only once, or rename its entry point",
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
                fix=join(meant(unknown[0], checks.HOOKS), known),
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
            raise PluginLoadError(f"not a valid name: {line(name, repr)}", where=f"plugin {plugin}")
        kind = checks.kind_of(factory, name, hook, plugin)
        known = self._policies.get((kind, name))
        if known is not None:
            raise PluginLoadError(
                f"{checks.noun(kind)} {name!r} is already registered by {known.plugin}",
                where=f"plugin {plugin}",
                fix="give it another name",
            )
        self._policies[kind, name] = _registration(
            kind, name, factory, config_model, plugin, checks.class_made_by(factory)
        )

    def names(self, kind: str) -> list[str]:
        return [name for k, name in sorted(self._policies) if k == kind]

    def get(self, kind: str, name: str) -> Registration:
        """Return a registration; raise UnknownPolicyError or UnknownCodecError if there is none."""
        try:
            return self._policies[kind, name]
        except KeyError:
            broken = {p.name: p.problem for p in self.plugins if p.status == "broken"}
            if kind == "codec":
                raise UnknownCodecError(name, self.names(kind), broken) from None
            raise UnknownPolicyError(kind, name, self.names(kind), broken) from None

    def source(self, kind: str, spec: PolicySpec) -> str:
        """Return a policy or codec with its source, such as ``lru (FluxMoE 0.1.0)``.

        The source is the registering package, or the module if the policy is not registered.
        """
        made, _ = self._chosen(kind, spec)
        package = made.plugin
        for plugin in self.plugins:
            if plugin.name == made.plugin:
                name = "FluxMoE" if plugin.origin == "built in" else plugin.name
                package = f"{name} {plugin.version}".strip()
        return f"{made.name} ({package})"

    def create(self, kind: str, spec: PolicySpec) -> Any:
        """Create a policy or codec from ``name`` or ``{kind: name, option: value}``.

        A policy class or an instance can replace the name: a class is called with the options, and
        an instance is reset.

        Raises:
            UnknownPolicyError, UnknownCodecError: The name is not registered.
            ConfigError: An option is unknown or invalid.
            PluginLoadError: The factory failed.
        """
        registration, options = self._chosen(kind, spec)
        return registration.create(options)

    def _chosen(self, kind: str, spec: PolicySpec) -> tuple[Registration, dict[str, Any]]:
        options = dict(spec) if isinstance(spec, Mapping) else {"kind": spec}
        chosen = options.pop("kind", None)
        where = f"{kind} {name_of(spec)!r}"
        if isinstance(chosen, str):
            registration = self.get(kind, chosen)
            return registration, checks.checked_options(registration.config_model, options, where)
        made = chosen if isinstance(chosen, type) else type(chosen)
        if kind == "codec" or not checks.is_policy(made, kind):
            raise ConfigError(
                f"no {'codec' if kind == 'codec' else f'{kind} policy'} in {line(spec, repr)}",
                where=kind,
                fix="write {kind: NAME, …}"
                if kind == "codec"
                else "write {kind: NAME, …}; in Python a class or instance of "
                f"fluxmoe.{kind.capitalize()}Policy also works",
            )
        factory = chosen if made is chosen else partial(_again, chosen)
        if made is not chosen:
            options = checks.checked_options(None, options, where)
        return _registration(kind, name_of(chosen), factory, None, made.__module__, made), options

    def policies(self, config: Config) -> Policies:
        """Create the paging policies of a configuration for an engine.

        Raises:
            UnknownPolicyError, ConfigError, PluginLoadError: See ``create``.
            NeedsFutureError: The eviction policy is an oracle, which an engine cannot run.
        """
        self.check(config)
        eviction: EvictionPolicy = self.create("eviction", config.eviction)
        _refuse_oracle(eviction.needs_future, config)
        prefetch = self.create("prefetch", config.prefetch)
        return Policies(eviction, prefetch, name_of(config.eviction), name_of(config.prefetch))

    def arbitration(self, config: Config) -> ArbitrationPolicy:
        """Create the arbitration policy of a configuration. Raises the errors of ``create``."""
        policy: ArbitrationPolicy = self.create("arbitration", config.arbitration)
        return policy

    def check(self, config: Config) -> None:
        """Validate names and options of a configuration's policies and codecs; create none.

        This is for commands that start an engine, which then creates the policies and codecs.
        The method raises the errors of ``policies``, ``arbitration`` and ``create`` together,
        except those that factories cause.
        """
        specs = [(kind, getattr(config, kind)) for kind in ("eviction", "prefetch", "arbitration")]
        found = Findings()
        for kind, spec in [*specs, *(("codec", store.codec) for store in config.stores)]:
            with found.check():
                registration, _ = self._chosen(kind, spec)
                if kind == "eviction":
                    _refuse_oracle(registration.oracle, config)
        found.require()


def name_of(spec: object) -> str:
    """Return the name of a policy, or of its class, for messages and results."""
    chosen = spec.get("kind") if isinstance(spec, Mapping) else spec
    if isinstance(chosen, str):
        return chosen
    return line(class_name(chosen if isinstance(chosen, type) else type(chosen)))


def _registration(
    kind: str,
    name: str,
    factory: Callable[..., Any],
    config_model: type[BaseModel] | None,
    plugin: str,
    made: type,
) -> Registration:
    # A class may compute its attributes, so they are read here, where a failure is attributed to
    # the plugin.
    doc: object = factory.__doc__
    said = str.__str__(doc).strip().partition("\n")[0] if isinstance(doc, str) else ""
    oracle = getattr(made, "needs_future", False) is True
    return Registration(kind, name, factory, config_model, plugin, line(said), oracle)


def _again(policy: Any) -> Any:
    """Reset and return an instance that may have been used before."""
    policy.reset()
    return policy


def _refuse_oracle(oracle: bool, config: Config) -> None:
    """Reject an eviction policy that needs the future."""
    if oracle:
        raise NeedsFutureError(
            f"eviction policy {name_of(config.eviction)!r} needs to know the future",
            where="eviction",
            fix="use it only with `fluxmoe simulate`; choose another policy for serving",
        )
