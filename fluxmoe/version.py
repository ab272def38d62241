"""The version of this package, which can be read without importing the rest of the package."""

__version__ = "0.1.0"
