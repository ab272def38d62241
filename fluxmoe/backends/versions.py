"""Versions of installed packages, looked up without importing the packages."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

from fluxmoe.errors import MissingDependencyError, UnsupportedVersionError

#: First supported version of each package that the torch backend needs, as in the extra ``hf``.
TORCH = {"torch": (2, 11), "transformers": (5, 0)}
#: The command that installs these packages.
HF = "pip install 'fluxmoe[hf]'"


def installed(package: str) -> str | None:
    """Return the version of a package; None if the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """Return the major and minor numbers of a version."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def require(least: Mapping[str, tuple[int, ...]], fix: str) -> None:
    """Reject packages that are missing or too old.

    Args:
        least: Package → first supported version.
        fix: The command that installs the packages.

    Raises:
        MissingDependencyError: A package is missing.
        UnsupportedVersionError: A package is too old.
    """
    for name, first in least.items():
        version = installed(name)
        if version is None:
            raise MissingDependencyError(f"{name} is not installed", fix=fix)
        if numbers(version) < first:
            raise UnsupportedVersionError(f"{name} {version} is too old", fix=fix)
