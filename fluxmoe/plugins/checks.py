"""Validation of plugins: API version, registrations and options; failures become errors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ValidationError

from fluxmoe.arguments import reason
from fluxmoe.core.policy.arbitration import ArbitrationPolicy
from fluxmoe.core.policy.paging import EvictionPolicy, PrefetchPolicy
from fluxmoe.core.policy.watchdog import HardLimitExceeded, Limits, TimeLimiter
from fluxmoe.errors import ConfigError, FluxMoEError, PluginLoadError, join, meant, together
from fluxmoe.hookspecs import OLDEST_PLUGIN_API, PLUGIN_API
from fluxmoe.stores.codec.base import Codec
from fluxmoe.words import interrupts, line, raised

T = TypeVar("T")

#: Limits that allow slow imports, but end infinite loops.
LIMITS = Limits(hard_s=30.0)

logger = logging.getLogger("fluxmoe")

#: Attribute of a plugin's module that contains the API version; 1 if absent.
DECLARATION = "fluxmoe_plugin_api"

_KINDS: dict[str, type] = {
    "eviction": EvictionPolicy,
    "prefetch": PrefetchPolicy,
    "arbitration": ArbitrationPolicy,
    "codec": Codec,
}

#: Hook → kinds that it may register.
HOOKS: dict[str, tuple[str, ...]] = {
    "fluxmoe_register_policies": ("eviction", "prefetch", "arbitration"),
    "fluxmoe_register_codecs": ("codec",),
}

#: Class attributes that the host reads, with their required types.
_DECLARED: dict[str, dict[str, type]] = {
    "eviction": {"stable_score": bool, "needs_future": bool},
    "prefetch": {"lead": int, "predictions": bool, "waste": float},
    "arbitration": {"fixed": bool},
    "codec": {},
}


def noun(kind: str) -> str:
    """Return the noun that messages use for a kind."""
    return kind if kind == "codec" else f"{kind} policy"


def kind_of(factory: Callable[..., Any], name: str, hook: str, plugin: str) -> str:
    """Determine the kind of policy or codec that a factory makes; raise PluginLoadError if none."""
    made = class_made_by(factory)
    kinds = [kind for kind in HOOKS[hook] if issubclass(made, _KINDS[kind])]
    if not kinds and hook == "fluxmoe_register_codecs":
        raise PluginLoadError(
            f"{name!r} is not a codec class: {line(factory, repr)}",
            where=f"plugin {plugin}",
            fix="derive it from fluxmoe.Codec; a function that makes codecs needs a return "
            "annotation",
        )
    if not kinds:
        raise PluginLoadError(
            f"{name!r} is not a policy class: {line(factory, repr)}",
            where=f"plugin {plugin}",
            fix="derive it from fluxmoe.EvictionPolicy, PrefetchPolicy or ArbitrationPolicy; "
            "a function that makes policies needs the kind as its return annotation",
        )
    if isinstance(factory, type) and kinds[0] == "eviction" and not _decides(factory):
        raise PluginLoadError(
            f"eviction policy {name!r} cannot choose victims: {line(factory, repr)}",
            where=f"plugin {plugin}",
            fix="define score(self, view, pages), score_kernel or select",
        )
    return kinds[0]


def require_declared(made: Any, kind: str) -> None:
    """Raise TypeError unless the attributes that the host reads have the required types."""
    for attribute, wanted in _DECLARED[kind].items():
        value: object = getattr(made, attribute)
        if type(value) is not wanted and (wanted, type(value)) != (float, int):
            raise TypeError(f"{attribute} is {line(value, repr)}, not {wanted.__name__}")


def _decides(policy: Any) -> bool:
    """Return True if an eviction policy implements one of the ways to choose victims."""
    return policy.score_kernel is not None or any(
        getattr(policy, method) is not getattr(EvictionPolicy, method)
        for method in ("score", "make_kernel", "select")
    )


def is_policy(made: type, kind: str) -> bool:
    """Return True if a class is a policy of this kind and, for eviction, can choose victims."""
    return issubclass(made, _KINDS[kind]) and (kind != "eviction" or _decides(made))


def class_made_by(factory: Callable[..., Any]) -> type:
    """Return the class that a factory makes: the factory itself, or its return annotation."""
    if isinstance(factory, type):
        return factory
    try:
        made = get_type_hints(factory).get("return")
    except (TypeError, NameError):
        made = None
    return made if isinstance(made, type) else object


def checked_options(
    model: type[BaseModel] | None, options: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Validate options against a model and fill in defaults; without a model, no option is valid.

    Raises:
        ConfigError: An option is unknown or invalid.
    """
    known = set() if model is None else _options(model)
    if known is not None and (unknown := sorted(options.keys() - known)):
        valid = f"valid options: {', '.join(sorted(known))}" if known else "there are no options"
        raise together(
            [
                ConfigError(
                    f"unknown option {name!r}",
                    where=where,
                    fix=join(meant(name, known), valid),
                )
                for name in unknown
            ]
        )
    if model is None:
        return {}
    try:
        return model.model_validate(options).model_dump()
    except ValidationError as error:
        raise together(
            [
                ConfigError(
                    line(
                        "".join(f"{part}: " for part in each["loc"])
                        + f"{reason(each)}, not {line(each['input'], repr)}"
                    ),
                    where=where,
                )
                for each in error.errors()
            ]
        ) from error
    except Exception as error:  # from a validator, which may raise anything
        raise ConfigError(f"the options cannot be checked: {raised(error)}", where=where) from error


def _options(model: type[BaseModel]) -> set[str] | None:
    """Return the options that a model defines; None if the model accepts any option."""
    if model.model_config.get("extra") == "allow":
        return None
    aliases = (field.validation_alias for field in model.model_fields.values())
    return {*model.model_fields, *(alias for alias in aliases if isinstance(alias, str))}


def attempt(
    function: Callable[[], T],
    what: str,
    *,
    where: str,
    fix: str = "",
    passed: type[FluxMoEError] = PluginLoadError,
) -> T:
    """Call ``function``; report a failure as ``what`` followed by the reason.

    ``SystemExit`` counts as a failure, and so does a call that exceeds ``LIMITS``; such a call is
    interrupted between two Python instructions.

    Raises:
        PluginLoadError: The call failed.
        FluxMoEError: The call raised an error of the class ``passed``, which is not wrapped.
    """

    def call() -> T:
        try:
            return function()
        except (passed, HardLimitExceeded):
            raise
        except BaseException as error:
            if interrupts(error):
                raise
            # Formatted within the time limit, because an exception's text comes from plugin code.
            raise PluginLoadError(f"{what}{raised(error)}", where=where, fix=fix) from error

    try:
        return TimeLimiter(LIMITS).call(call, ())
    except HardLimitExceeded:
        reason = f"it took more than {LIMITS.hard_s:g} s"
        raise PluginLoadError(f"{what}TimeoutError: {reason}", where=where, fix=fix) from None


def check_api(
    plugin: object, name: str, *, current: int = PLUGIN_API, oldest: int = OLDEST_PLUGIN_API
) -> None:
    """Reject plugins for unsupported API versions; warn about outdated plugins.

    Args:
        plugin: The plugin's module or object.
        name: Name of the plugin.
        current, oldest: Newest and oldest supported API versions.

    Raises:
        PluginLoadError: The declared version is too new, no longer supported, or invalid.
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
            f"written for plugin API {declared}; this version of FluxMoE has {current}",
            where=where,
            fix="upgrade fluxmoe or use an older version of the plugin",
        )
    if declared < oldest:
        raise PluginLoadError(
            f"written for plugin API {declared}; the oldest supported is {oldest}",
            where=where,
            fix="use a newer version of the plugin or an older fluxmoe",
        )
    if declared < current:
        _warn(name, declared, current)


@cache
def _warn(name: str, declared: int, current: int) -> None:
    logger.warning(
        "plugin %s was written for plugin API %d; %d is current, and support for %d will end",
        *(name, declared, current, declared),
    )
