"""Tracing: from a module to its wiring."""

from hatfn.tracing.graph import TraceError
from hatfn.tracing.trace import trace

__all__ = ["TraceError", "trace"]
