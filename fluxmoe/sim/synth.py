"""Deprecated: ``fluxmoe.trace.synth`` has the name that was published here."""

from fluxmoe.sim.moved import moved

__getattr__ = moved(__name__, "fluxmoe.trace.synth", ("Workload",))
