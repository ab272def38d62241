"""Deprecated: use ``fluxmoe.trace.synth``."""

from fluxmoe.sim.moved import moved

__getattr__ = moved(__name__, "fluxmoe.trace.synth", ("Workload",))
