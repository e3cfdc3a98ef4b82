"""Streams of tasks from real data, the same for the same seed."""

from hatfn.experiments.config import StreamName
from hatfn.experiments.streams.make import make_stream
from hatfn.experiments.streams.parts import Part, Task
from hatfn.experiments.streams.sources import digits

__all__ = ["Part", "StreamName", "Task", "digits", "make_stream"]
