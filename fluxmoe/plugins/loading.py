"""``load``: the registry of everything that is built in, installed or named.

Plugins come from entry points of installed distributions, from files and from modules.

A plugin that is *named*, on the command line or in the configuration, must load: if it does not,
that is an error. One that is merely *installed* must not stop a server that does not use it: it is
reported, and only an unknown policy name turns that into an error.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from fluxmoe import policies
from fluxmoe.config import is_plugin_file
from fluxmoe.errors import PluginLoadError, together
from fluxmoe.plugins.checks import attempt
from fluxmoe.plugins.registry import Plugin, Registry
from fluxmoe.stores import codec
from fluxmoe.words import line

GROUP = "fluxmoe"
ALLOW_LIST = "FLUXMOE_PLUGINS"

logger = logging.getLogger("fluxmoe")


def load(extra: str | Iterable[str] = ()) -> Registry:
    """The registry of built-in, installed and explicitly named plugins.

    Every call imports and registers again, so it may be called in any process, any number of times.

    Args:
        extra: Paths of ``.py`` files, or dotted module names; one may be given without a list.

    Raises:
        PluginLoadError: One of ``extra`` cannot be loaded (``others``: further ones), or the
            allow-list has one that is not installed; the message names it.
    """
    registry = Registry()
    registry.add(policies, "fluxmoe", origin="built in")
    registry.add(codec, codec.__name__, origin="built in")
    for found in installed():
        try:
            if found.allowed:
                registry.add(found.module(), found.name, origin="installed", version=found.version)
                continue
            plugin = Plugin(
                found.name,
                "installed",
                found.version,
                "left out",
                f"not in {ALLOW_LIST}",
            )
        except PluginLoadError as error:
            problem = line("; ".join(filter(None, (error.what, error.fix))))
            _warn(f"plugin {found.name} {found.version} is broken and left out: {problem}")
            plugin = Plugin(found.name, "installed", found.version, "broken", problem)
        registry.plugins.append(plugin)
    problems = []
    for name in dict.fromkeys([extra] if isinstance(extra, str) else extra):
        try:
            module = named(name)
            if not registry.knows(module):  # it may be installed as well
                registry.add(module, name, version=line(getattr(module, "__version__", "")))
        except PluginLoadError as error:
            problems.append(error)
    if problems:
        raise together(problems)
    return registry


@cache
def _warn(message: str) -> None:
    """Warn once per process, however often plugins are loaded."""
    logger.warning("%s", message)


@dataclass(frozen=True, slots=True)
class Installed:
    """An entry point of the group ``fluxmoe``; ``allowed``: the allow-list permits it."""

    entry: importlib.metadata.EntryPoint
    allowed: bool

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def version(self) -> str:
        return self.entry.dist.version if self.entry.dist else ""

    def module(self) -> object:
        """Import it. Raises PluginLoadError."""
        return attempt(
            self.entry.load,
            f"cannot import {self.entry.value}: ",
            where=f"plugin {self.name}",
            fix=f"uninstall it, or leave it out of {ALLOW_LIST}",
        )


def installed() -> list[Installed]:
    """All entry points by name. Raises PluginLoadError if one on the allow-list is missing."""
    entries = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name)
    allowed = os.environ.get(ALLOW_LIST)
    if allowed is None:
        return [Installed(entry, True) for entry in entries]
    wanted = {name.strip() for name in allowed.split(",") if name.strip()}
    called = {name: [entry for entry in entries if _is_called(entry, name)] for name in wanted}
    if missing := sorted(name for name, found in called.items() if not found):
        raise PluginLoadError(
            f"no installed plugin is called {missing[0]!r}",
            where=ALLOW_LIST,
            fix=f"installed: {', '.join(e.name for e in entries) or 'none'}",
        )
    return [Installed(entry, any(entry in found for found in called.values())) for entry in entries]


def entries_called(name: str) -> list[Installed]:
    """The installed plugins whose entry point or distribution has this name."""
    return [found for found in installed() if _is_called(found.entry, name)]


def named(name: str) -> ModuleType:
    """Import a file or module named in a command line or configuration.

    Raises:
        PluginLoadError: It does not exist, or cannot be imported.
    """
    path, where = Path(name), f"plugin {name}"
    if not is_plugin_file(name):
        return attempt(lambda: importlib.import_module(name), "cannot import it: ", where=where)
    if not path.is_file():
        raise PluginLoadError("no such file", where=where)
    # A name of its own per path, so that two files of the same name do not collide.
    digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"fluxmoe_plugin_{path.stem}_{digest}", path)
    if spec is None or spec.loader is None:
        raise PluginLoadError("not a Python file", where=where)
    module = importlib.util.module_from_spec(spec)
    loader = spec.loader
    sys.modules[spec.name] = module
    try:
        attempt(lambda: loader.exec_module(module), "cannot import it: ", where=where)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _is_called(entry: importlib.metadata.EntryPoint, name: str) -> bool:
    """True if ``name`` is the entry point's, or its distribution's as pip compares names."""
    return name == entry.name or (entry.dist is not None and _same(name, entry.dist.name))


def _same(a: str, b: str) -> bool:
    """True if two distribution names are equivalent (PEP 503)."""
    return re.sub(r"[-_.]+", "-", a).lower() == re.sub(r"[-_.]+", "-", b).lower()
