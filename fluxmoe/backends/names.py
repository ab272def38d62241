"""Assertions, made at startup, that an engine's library has the names that FluxMoE uses.

To mypy, the libraries are ``Any``, and an override is never called if the method that it overrides
was renamed. Each part of a backend therefore asserts its names before importing them, and asserts
the attributes of an object from the library on receiving the object.
"""

from __future__ import annotations

import dis
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fluxmoe.errors import UnsupportedVersionError


@dataclass(frozen=True)
class Names:
    """The names that FluxMoE uses or overrides in one library.

    Attributes:
        package: The library's module, which has a ``__version__``.
        fix: Remedy for a missing name.
        table: Part of a backend → ``module:name`` or ``module:Class.name`` → the parameters that
            FluxMoE passes or takes, separated by spaces, in order, without ``self``.
        on: Kind of object made by the library → dotted paths of its attributes that no class
            declares.
    """

    package: str
    fix: str
    table: Mapping[str, Mapping[str, str]]
    on: Mapping[str, tuple[str, ...]]

    def require(self, part: str) -> None:
        """Assert that the library has the names of a part.

        Args:
            part: A key of ``table``.

        Raises:
            UnsupportedVersionError: A module, a name or a parameter is missing.
        """
        for name, parameters in self.table[part].items():
            try:
                found = _found(name)
            except (ImportError, AttributeError) as error:
                raise self._missing(name) from error
            if parameters:
                there = [each for each in inspect.signature(found).parameters if each != "self"]
                wanted = parameters.split()
                if there[: len(wanted)] != wanted:
                    raise self._missing(f"{name}({', '.join(wanted)}); it has ({', '.join(there)})")

    def require_on(self, kind: str, thing: Any) -> None:
        """Assert that an object has the attributes of its kind.

        Args:
            kind: A key of ``on``.
            thing: The object.

        Raises:
            UnsupportedVersionError: An attribute is missing.
        """
        for path in self.on[kind]:
            found = thing
            for name in path.split("."):
                if not hasattr(found, name):
                    raise self._missing(f"{kind}.{path}")
                found = getattr(found, name)

    def _missing(self, name: str) -> UnsupportedVersionError:
        version = importlib.import_module(self.package).__version__
        return UnsupportedVersionError(f"{self.package} {version} has no {name}", fix=self.fix)


def _found(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    *owners, last = path.split(".")
    for owner in owners:
        found = getattr(found, owner)
    # Fields without a default and names assigned by constructors are not attributes of the class.
    fields = getattr(found, "__dataclass_fields__", {})
    if last in fields:
        return fields[last]
    if not hasattr(found, last) and inspect.isclass(found) and last in _assigned(found):
        return None
    return getattr(found, last)


def _assigned(kind: type) -> set[str]:
    """Collect the names of the attributes that a class's constructors assign."""
    constructors = (vars(base).get("__init__") for base in kind.__mro__)
    codes = (getattr(inspect.unwrap(each), "__code__", None) for each in constructors if each)
    return {
        step.argval
        for code in codes
        if code is not None
        for step in dis.get_instructions(code)
        if step.opname == "STORE_ATTR"
    }
