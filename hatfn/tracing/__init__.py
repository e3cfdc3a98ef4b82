"""Tracing: from a module to its wiring."""

from hatfn.tracing.trace import TraceError, trace

__all__ = ["TraceError", "trace"]
