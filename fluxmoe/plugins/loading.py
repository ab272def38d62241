"""``load``, which makes the registry of all built-in, installed and named plugins.

Plugins come from entry points of installed distributions, from files and from modules.

Failure to load a plugin *named* on the command line or in the configuration is an error. A plugin
that is merely *installed* must not stop a server that does not use it: the failure is logged, and
only the use of an unknown policy or codec name leads to an error.
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
from os import PathLike
from pathlib import Path
from types import ModuleType

from fluxmoe import policies
from fluxmoe.arguments import path, wrong
from fluxmoe.config import is_plugin_file
from fluxmoe.errors import PluginLoadError
from fluxmoe.findings import Findings
from fluxmoe.plugins.checks import attempt
from fluxmoe.plugins.registry import Plugin, Registry
from fluxmoe.stores import codec
from fluxmoe.version import __version__
from fluxmoe.words import line

GROUP = "fluxmoe"
ALLOW_LIST = "FLUXMOE_PLUGINS"

logger = logging.getLogger("fluxmoe")


def load(extra: str | PathLike[str] | Iterable[str | PathLike[str]] = ()) -> Registry:
    """Make the registry of built-in, installed and explicitly named plugins.

    Each call makes a new registry, so ``load`` may be called repeatedly and in any process.

    Args:
        extra: Paths of ``.py`` files or dotted module names; a single one or several.

    Raises:
        PluginLoadError: A plugin in ``extra`` cannot be loaded (``others`` has further errors), or
            a plugin on the allow-list is not installed.
    """
    registry = Registry()
    registry.add(policies, "fluxmoe", origin="built in", version=__version__)
    registry.add(codec, codec.__name__, origin="built in", version=__version__)
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
    problems = Findings()
    for name in dict.fromkeys(_names(extra)):
        with problems.check():
            module = named(name)
            if not registry.knows(module):  # a named plugin may be installed as well
                registry.add(module, name, version=line(getattr(module, "__version__", "")))
    problems.require()
    return registry


def _names(extra: object) -> list[str]:
    """Convert files and modules to text; raise ConfigError if ``extra`` is invalid."""
    given = [extra] if isinstance(extra, str | PathLike) else extra
    if not isinstance(given, Iterable):
        raise wrong("extra", "files or modules", extra, "plugins.load")
    return [
        os.fspath(name if isinstance(name, str) else path(name, "a plugin", where="plugins"))
        for name in given
    ]


@cache
def _warn(message: str) -> None:
    """Log a warning, only once per process even if plugins are loaded repeatedly."""
    logger.warning("%s", message)


@dataclass(frozen=True, slots=True)
class Installed:
    """An entry point of the group ``fluxmoe``; ``allowed`` is True if the allow-list permits it."""

    entry: importlib.metadata.EntryPoint
    allowed: bool

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def version(self) -> str:
        return self.entry.dist.version if self.entry.dist else ""

    def module(self) -> object:
        """Import the plugin; raise PluginLoadError if that fails."""
        return attempt(
            self.entry.load,
            f"cannot import {self.entry.value}: ",
            where=f"plugin {self.name}",
            fix=f"uninstall the plugin or omit it from {ALLOW_LIST}",
        )


def installed() -> list[Installed]:
    """List all entry points by name; raise PluginLoadError if an allowed plugin is missing."""
    entries = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name)
    allowed = os.environ.get(ALLOW_LIST)
    if allowed is None:
        return [Installed(entry, True) for entry in entries]
    wanted = {name.strip() for name in allowed.split(",") if name.strip()}
    called = {name: [entry for entry in entries if _is_called(entry, name)] for name in wanted}
    if missing := sorted(name for name, found in called.items() if not found):
        raise PluginLoadError(
            f"no installed plugin is named {missing[0]!r}",
            where=ALLOW_LIST,
            fix=f"installed: {', '.join(e.name for e in entries) or 'none'}",
        )
    return [Installed(entry, any(entry in found for found in called.values())) for entry in entries]


def entries_called(name: str) -> list[Installed]:
    """List the installed plugins whose entry point or distribution has this name."""
    return [found for found in installed() if _is_called(found.entry, name)]


def named(name: str) -> ModuleType:
    """Import a file or module named on the command line or in the configuration.

    Raises:
        PluginLoadError: The plugin does not exist or cannot be imported.
    """
    path, where = Path(name), f"plugin {name}"
    if not is_plugin_file(name) and path.is_file():
        raise PluginLoadError("not a .py file", where=where)
    if not is_plugin_file(name):
        return attempt(
            lambda: importlib.import_module(name), "cannot import the plugin: ", where=where
        )
    if path.is_dir():
        files = ", ".join(sorted(str(file) for file in path.glob("*.py"))[:3])
        raise PluginLoadError(
            "a folder, not a .py file or module",
            where=where,
            fix=f"use {files or 'a .py file in it'}",
        )
    if not path.is_file():
        raise PluginLoadError("no such file", where=where)
    # Each path has its own module name, so that two files with the same name do not collide.
    digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"fluxmoe_plugin_{path.stem}_{digest}", path)
    if spec is None or spec.loader is None:
        raise PluginLoadError("not a Python file", where=where)
    module = importlib.util.module_from_spec(spec)
    loader = spec.loader
    sys.modules[spec.name] = module
    try:
        attempt(lambda: loader.exec_module(module), "cannot import the plugin: ", where=where)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _is_called(entry: importlib.metadata.EntryPoint, name: str) -> bool:
    """Return True if ``name`` names the entry point or, normalised as in pip, its distribution."""
    return name == entry.name or (entry.dist is not None and _same(name, entry.dist.name))


def _same(a: str, b: str) -> bool:
    """Return True if two distribution names are equivalent (PEP 503)."""
    return re.sub(r"[-_.]+", "-", a).lower() == re.sub(r"[-_.]+", "-", b).lower()
