"""Deprecated: ``fluxmoe.trace.shipped`` has the names that were published here."""

from fluxmoe.sim.moved import moved

__getattr__ = moved(__name__, "fluxmoe.trace.shipped", ("FOLDER", "NAMES", "path"))
