"""Plugins: finding and loading them, and the registry of policies and codecs."""

from fluxmoe.plugins.loading import ALLOW_LIST, GROUP, load
from fluxmoe.plugins.registry import Origin, Plugin, PolicySpec, Registration, Registry

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
