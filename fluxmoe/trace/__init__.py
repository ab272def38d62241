"""Traces: the experts that a model routed tokens to, in one Parquet file that is streamed.

``format`` defines the file's contents; ``writer`` and ``reader`` never hold more than a few row
groups in memory. The package imports the core, ``draw`` and ``errors``.
"""

from __future__ import annotations

from fluxmoe.trace.format import OPTIONAL, Rows, StepRows, TraceMeta
from fluxmoe.trace.reader import TraceReader
from fluxmoe.trace.writer import TraceWriter

__all__ = ["OPTIONAL", "Rows", "StepRows", "TraceMeta", "TraceReader", "TraceWriter"]
