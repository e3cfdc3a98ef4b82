"""Mask scale schedules: from progress through training to the scale s of the gates.

Each function takes its settings and returns a function ``progress -> s``. Progress is in [0, 1]; for
other values all schedules but :func:`constant` raise a ValueError. A small s lets embeddings move; a
large s makes gates binary.

Example:
    >>> schedule = linear(400.0)
    >>> [round(schedule(i / 4), 2) for i in range(5)]
    [0.0, 100.0, 200.0, 300.0, 400.0]
"""

from __future__ import annotations

import math
from collections.abc import Callable

from hatfn.checks.values import check_real

__all__ = ["Schedule", "constant", "cosine", "exponential", "linear"]

Schedule = Callable[[float], float]
"""A function from progress, the share of training that is done in [0, 1], to the mask scale s > 0."""


def linear(s_max: float) -> Schedule:
    """s = 1/s_max + (s_max - 1/s_max) * progress: the first paper's annealing.

    The paper's progress is (b - 1) / (B - 1) at batch b of the B batches of an epoch; it ends at 1.
    In the paper's code it is the share of the epoch's samples before the batch; it stays below 1.

    Args:
        s_max: the largest scale, > 1.

    Raises:
        ValueError: ``s_max`` is not above 1.

    Source:
        Serrà et al. 2018, equation 3.
    """
    low = 1 / _checked(s_max)
    return lambda progress: low + (s_max - low) * _within(progress)


def exponential(s_max: float, r: float = 0.8) -> Schedule:
    """s = b ** (progress - 1 + r) with b = s_max ** (1/r): s stays low longer and ends at s_max.

    Args:
        s_max: the largest scale, > 1.
        r: in (0, 1]; s starts at s_max ** ((r - 1) / r), which is below 1.

    Raises:
        ValueError: ``s_max`` is not above 1, or ``r`` not in (0, 1].

    Source:
        Duan 2023, section 3.
    """
    check_real("schedule", "r", r, lambda r: 0 < r <= 1, "in (0, 1], such as 0.8")
    base = _checked(s_max) ** (1 / r)
    return lambda progress: min(base ** (_within(progress) - 1 + r), s_max)


def cosine(s_max: float, s_min: float | None = None) -> Schedule:
    """s = max(s_min, s_max/2 * (1 + cos(2 pi progress))): high, low in the middle, high again.

    Args:
        s_max: the largest scale, > 1.
        s_min: the smallest scale, > 0; default 1/s_max.

    Raises:
        ValueError: ``s_max`` is not above 1, or ``s_min`` not in (0, s_max].

    Source:
        Duan 2023, section 3.
    """
    low = 1 / _checked(s_max) if s_min is None else s_min
    check_real("schedule", "s_min", low, lambda s: 0 < s <= s_max, f"in (0, s_max={s_max}]")
    return lambda progress: max(low, s_max / 2 * (1 + math.cos(2 * math.pi * _within(progress))))


def constant(s_max: float) -> Schedule:
    """s = s_max throughout.

    Args:
        s_max: the scale, > 1.

    Raises:
        ValueError: ``s_max`` is not above 1.
    """
    _checked(s_max)
    return lambda progress: s_max


def _checked(s_max: float) -> float:
    def right(s: float) -> bool:
        return math.isfinite(s) and s > 1

    check_real("schedule", "s_max", s_max, right, "that is finite and above 1, such as 400.0")
    return s_max


def _within(progress: float) -> float:
    def right(share: float) -> bool:
        return 0 <= share <= 1 + 1e-6  # a progress that is added up step by step may pass 1 a little

    check_real("schedule", "progress", progress, right, "from 0 to 1, such as step / steps")
    return progress
