"""Deprecated: use ``fluxmoe.trace.shipped``."""

from fluxmoe.sim.moved import moved

__getattr__ = moved(__name__, "fluxmoe.trace.shipped", ("FOLDER", "NAMES", "path"))
