"""Tracing: find the wiring of a module."""

from hatfn.tracing.graph import TraceError
from hatfn.tracing.trace import trace

__all__ = ["TraceError", "trace"]
