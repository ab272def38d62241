"""Deprecated: use ``fluxmoe.trace``."""

from fluxmoe.sim.moved import moved

__getattr__ = moved(
    __name__,
    "fluxmoe.trace",
    ("OPTIONAL", "Rows", "StepRows", "TraceMeta", "TraceReader", "TraceWriter"),
)
