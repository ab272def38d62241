"""Traces: the experts that a model routed to, as one Parquet file, written and read in a stream.

``format`` defines the contents of a file; ``writer`` and ``reader`` never hold more than a few row
groups of it. Imports the core, ``draw`` and ``errors``.
"""

from __future__ import annotations

from fluxmoe.trace.format import OPTIONAL, Rows, StepRows, TraceMeta
from fluxmoe.trace.reader import TraceReader
from fluxmoe.trace.writer import TraceWriter

__all__ = ["OPTIONAL", "Rows", "StepRows", "TraceMeta", "TraceReader", "TraceWriter"]
