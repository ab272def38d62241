"""``load``: the registry of everything that is built in, installed or named.

A plugin that is *named*, on the command line or in the configuration, must load: if it does not,
that is an error. One that is merely *installed* must not stop a server that does not use it: it is
reported, and an error only for who asks for a policy that nobody has.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache

from fluxmoe import policies
from fluxmoe.core.words import line
from fluxmoe.errors import PluginLoadError
from fluxmoe.plugins import sources
from fluxmoe.plugins.registry import Plugin, Registry
from fluxmoe.stores import codec

logger = logging.getLogger("fluxmoe")


def load(extra: Iterable[str] = ()) -> Registry:
    """The registry of built-in, installed and explicitly named plugins.

    Every call imports and registers anew, so it may be called in any process, any number of times.

    Args:
        extra: Paths of ``.py`` files, or dotted module names.

    Raises:
        PluginLoadError: One of ``extra`` cannot be loaded, or the allow-list has one that is not
            installed; the message names it.
    """
    registry = Registry()
    registry.add(policies, "fluxmoe", origin="built in")
    registry.add(codec, codec.__name__, origin="built in")
    for found in sources.installed():
        try:
            if found.allowed:
                registry.add(found.module(), found.name, origin="installed", version=found.version)
                continue
            plugin = Plugin(
                found.name,
                "installed",
                found.version,
                "left out",
                f"not in {sources.ALLOW_LIST}",
            )
        except PluginLoadError as error:
            problem = line("; ".join(filter(None, (error.what, error.fix))))
            _warn(f"plugin {found.name} {found.version} is broken and left out: {problem}")
            plugin = Plugin(found.name, "installed", found.version, "broken", problem)
        registry.plugins.append(plugin)
    for name in dict.fromkeys(extra):
        module = sources.named(name)
        if not registry.knows(module):  # it may be installed as well
            registry.add(module, name, version=line(getattr(module, "__version__", "")))
    return registry


@cache
def _warn(message: str) -> None:
    """Once per process, however often plugins are loaded in it."""
    logger.warning("%s", message)
