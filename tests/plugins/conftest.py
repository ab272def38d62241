"""A fixture for a folder like site-packages, without the machine's plugins."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def no_installed_plugins(monkeypatch):
    monkeypatch.setenv("FLUXMOE_PLUGINS", "")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Make a folder on ``sys.path``, like ``site-packages``."""
    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(str(path))
    before = set(sys.modules)
    yield path
    for name in set(sys.modules) - before:
        if str(path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
