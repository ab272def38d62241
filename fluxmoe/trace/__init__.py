"""Traces: which experts a model routed to, as one Parquet file, written and read in a stream.

``format`` says what is in a file, ``writer`` and ``reader`` never hold more of it than a few row
groups.
"""

from __future__ import annotations

from fluxmoe.trace.format import OPTIONAL, EventBlock, Rows, StepRows, TraceMeta
from fluxmoe.trace.reader import TraceReader
from fluxmoe.trace.writer import TraceWriter

__all__ = ["OPTIONAL", "EventBlock", "Rows", "StepRows", "TraceMeta", "TraceReader", "TraceWriter"]
