"""Ratios of times from interleaved runs, and peak memory: what a benchmark measures with."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

_SECOND = "the step that is measured"


def _nothing() -> None:
    return None


class Contender(NamedTuple):
    """One way to do the work of a comparison.

    Attributes:
        name: as the table shows it.
        step: does the work once; what it returns is dropped.
        clear: drops what the last step left behind and the next would drop first, as gradients are;
            called before memory is measured, never while time is.
    """

    name: str
    step: Callable[[], object]
    clear: Callable[[], object] = _nothing


class Ratio(NamedTuple):
    """A ratio measured many times.

    Attributes:
        median: over the rounds.
        low: the first quartile.
        high: the third.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def paired(times: Sequence[float], against: Sequence[float]) -> Ratio:
    """Median and quartiles of the ratios round by round.

    A slow spell of the machine lasts longer than a round, so it cancels in the round's own ratio;
    in a ratio of two medians it would not.

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
    """Seconds per step of every contender, a round at a time; each round runs all of them.

    The order turns round from one round to the next, so that none always runs in the caches that
    another left.

    Args:
        contenders: at least one.
        rounds: how many to yield, >= 1.
        warmup: rounds that are run first and not yielded, >= 1; the last of them is timed to set how
            often a round repeats each step.
        shortest: seconds that a round lasts at least.
        clock: reads seconds.
        wait: returns once the device has done its work; None: it is done when a step returns.

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
    """Without the collector of garbage, which runs when it likes; as timeit does."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def peak_memory(contender: Contender, device: torch.device | str = "cpu") -> int:
    """Bytes that a step holds at most, above what was held before it.

    On a GPU by the allocator's own counter; on the CPU by its every allocation, which a profiler
    records: both repeat to the byte, where the size of the process would not.

    Args:
        contender: its step is called twice; what the first one leaves is what the second starts from.
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
        contender.step()  # inside: the profiler sees no end of what began before it
        contender.clear()
        with record_function(_SECOND):
            contender.step()
    events = recorded.profiler.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == _SECOND)
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return highest([change for change in changes if change[0] >= start])


def highest(changes: Sequence[tuple[int, int]]) -> int:
    """The largest running sum of changes in order of time; 0 before the first.

    Args:
        changes: (time, bytes), negative for what is given back.

    Example:
        >>> highest([(0, 5), (2, -5), (3, 4), (1, 2)])
        7
    """
    return max(accumulate((size for _, size in sorted(changes, key=itemgetter(0))), initial=0))


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the profiler's own log, which it writes past Python, out of the middle of a table."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
