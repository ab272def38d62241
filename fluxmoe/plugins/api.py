"""Whether a plugin was written for this version of the plugin API."""

from __future__ import annotations

import logging
from functools import cache

from fluxmoe.core.words import line
from fluxmoe.errors import PluginLoadError
from fluxmoe.hookspecs import OLDEST_PLUGIN_API, PLUGIN_API

logger = logging.getLogger("fluxmoe")

#: How a plugin's module says what it was written for; who does not say means 1.
DECLARATION = "fluxmoe_plugin_api"


def check_api(
    plugin: object, name: str, *, current: int = PLUGIN_API, oldest: int = OLDEST_PLUGIN_API
) -> None:
    """Refuse a plugin of another API, warn of one that will not work for long.

    Args:
        plugin: Its module or object.
        name: Of the plugin.
        current, oldest: Which APIs there are.

    Raises:
        PluginLoadError: It declares a newer API, one that is no longer there, or nonsense.
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
            fix="upgrade fluxmoe, or take an older version of the plugin",
        )
    if declared < oldest:
        raise PluginLoadError(
            f"it was written for plugin API {declared}, the oldest that works is {oldest}",
            where=where,
            fix="take a newer version of the plugin, or an older fluxmoe",
        )
    if declared < current:
        _warn(name, declared, current)


@cache
def _warn(name: str, declared: int, current: int) -> None:
    logger.warning(
        "plugin %s was written for plugin API %d; %d is current, and %d will not work for ever",
        *(name, declared, current, declared),
    )
