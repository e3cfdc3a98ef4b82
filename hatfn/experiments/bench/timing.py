"""The measurements of a benchmark: ratios of times from interleaved runs, and peak memory."""

from __future__ import annotations

import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

if sys.platform != "win32":
    import resource

_SECOND = "the step that is measured"


def _nothing() -> None:
    return None


class Contender(NamedTuple):
    """One way to do the work of a comparison.

    Attributes:
        name: its name in the table.
        step: does the work once; its result is dropped.
        clear: frees memory that the last step left and that the next step would free first, such as
            gradients. It is called before memory is measured, never while time is measured.
    """

    name: str
    step: Callable[[], object]
    clear: Callable[[], object] = _nothing


class Ratio(NamedTuple):
    """A ratio measured many times.

    Attributes:
        median: the median over the rounds.
        low: the first quartile.
        high: the third quartile.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def paired(times: Sequence[float], against: Sequence[float]) -> Ratio:
    """Median and quartiles of the ratios of single rounds.

    A slow spell of the machine lasts longer than a round, so it cancels in the ratio of one round. In
    a ratio of two medians it would not cancel.

    Args:
        times: seconds, one per round.
        against: seconds of the other contender in the same rounds.

    Example:
        >>> paired([2.0, 20.0, 3.0], [1.0, 10.0, 1.0])
        Ratio(median=2.0, low=2.0, high=2.5)
    """
    low, median, high = np.percentile(np.divide(times, against), [25, 50, 75])
    return Ratio(float(median), float(low), float(high))


def interleaved(
    contenders: Sequence[Contender],
    rounds: int,
    warmup: int = 3,
    shortest: float = 0.25,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[], object] | None = None,
) -> Iterator[dict[str, float]]:
    """Time every contender in every round, and yield the seconds per step, one round at a time.

    The order is reversed from round to round, so that no contender always runs in the caches that
    another one left.

    Args:
        contenders: at least one.
        rounds: the number of rounds to yield, >= 1.
        warmup: the number of rounds that run first and are not yielded, >= 1. The time of the last one
            decides how often a round repeats each step.
        shortest: the shortest time of a round, in seconds.
        clock: reads seconds.
        wait: returns when the device has done its work; None: it is done when a step returns.

    Yields:
        {name: seconds per step}.
    """
    settle = wait or _nothing

    def timed(contender: Contender, repeats: int) -> float:
        settle()
        start = clock()
        for _ in range(repeats):
            contender.step()
        settle()
        return (clock() - start) / repeats

    with _no_collection():
        for _ in range(warmup):
            once = sum(timed(contender, 1) for contender in contenders)
        repeats = max(1, math.ceil(shortest / max(once, 1e-9)))
        for index in range(rounds):
            order = contenders if index % 2 == 0 else contenders[::-1]
            seconds = {contender.name: timed(contender, repeats) for contender in order}
            yield {contender.name: seconds[contender.name] for contender in contenders}


@contextmanager
def _no_collection() -> Iterator[None]:
    """Turn off garbage collection, which runs at unknown times; timeit does the same."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def peak_memory(contender: Contender, device: torch.device | str = "cpu") -> int:
    """The peak memory of a step in bytes, on top of the memory before it.

    On a GPU the allocator counts bytes; on the CPU a profiler records every allocation. Both give the
    same number every time, unlike the size of the process.

    Args:
        contender: its step is called twice; the second call starts with the memory that the first left.
        device: where it computes.
    """
    device = torch.device(device)
    if device.type == "cuda":
        contender.step()
        contender.clear()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        contender.step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _silence(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        contender.step()  # in the profile, which does not see older allocations being freed
        contender.clear()
        with record_function(_SECOND):
            contender.step()
    events = recorded.profiler.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == _SECOND)
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return highest([change for change in changes if change[0] >= start])


def page_faults(contender: Contender, steps: int = 5) -> float:
    """The pages of memory that the system hands out per step, in a loop of steps; nan on Windows."""
    if sys.platform == "win32":
        return math.nan

    def so_far() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    with _no_collection():
        for _ in range(3):  # until the C library has grown its heap
            contender.step()
        start = so_far()
        for _ in range(steps):
            contender.step()
        return (so_far() - start) / steps


def highest(changes: Sequence[tuple[int, int]]) -> int:
    """The largest running sum of changes in order of time, starting from 0.

    Args:
        changes: (time, bytes); bytes are negative when memory is freed.

    Example:
        >>> highest([(0, 5), (2, -5), (3, 4), (1, 2)])
        7
    """
    return max(accumulate((size for _, size in sorted(changes, key=itemgetter(0))), initial=0))


@contextmanager
def _silence() -> Iterator[None]:
    """Hide the log of the profiler, which bypasses Python's stderr and would split tables."""
    stderr = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
