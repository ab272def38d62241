"""Plugins: finding them, loading them, and the registry of policies that results."""

from fluxmoe.plugins.loading import load
from fluxmoe.plugins.registry import Origin, Plugin, PolicySpec, Registration, Registry
from fluxmoe.plugins.sources import ALLOW_LIST, GROUP

__all__ = [
    "ALLOW_LIST",
    "GROUP",
    "Origin",
    "Plugin",
    "PolicySpec",
    "Registration",
    "Registry",
    "load",
]
