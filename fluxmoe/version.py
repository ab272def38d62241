"""The version of this package, without an import of the package itself."""

__version__ = "0.1.0"
