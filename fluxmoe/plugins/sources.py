"""Where plugins come from: entry points of installed distributions, files, and modules."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from fluxmoe.errors import PluginLoadError
from fluxmoe.plugins.attempt import attempt

GROUP = "fluxmoe"
ALLOW_LIST = "FLUXMOE_PLUGINS"


@dataclass(frozen=True, slots=True)
class Installed:
    """An entry point of the group ``fluxmoe``, and whether the allow-list has it."""

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
    """All entry points, by name. Raises PluginLoadError if the allow-list has one that is not."""
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
    """The installed plugins whose entry point or distribution is called that."""
    return [found for found in installed() if _is_called(found.entry, name)]


def named(name: str) -> ModuleType:
    """Import what a command line or a configuration names: a file or a module.

    Raises:
        PluginLoadError: It is not there, or cannot be imported.
    """
    path, where = Path(name), f"plugin {name}"
    if path.suffix != ".py" and os.sep not in name:
        return attempt(lambda: importlib.import_module(name), "cannot import it: ", where=where)
    if not path.is_file():
        raise PluginLoadError("no such file", where=where)
    # A name of its own per path, so that two files of the same name do not collide.
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
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
    """Whether ``name`` is the entry point's, or its distribution's as pip compares them."""
    return name == entry.name or (entry.dist is not None and _same(name, entry.dist.name))


def _same(a: str, b: str) -> bool:
    """Whether two names of distributions are the same name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", a).lower() == re.sub(r"[-_.]+", "-", b).lower()
