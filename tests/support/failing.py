"""Functions that fail at a chosen call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def failing(function: Callable[..., Any], error: BaseException, nth: int) -> Callable[..., Any]:
    """The function, but its nth call raises an error."""
    calls = iter(range(10**9))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == nth:
            raise error
        return function(*args, **kwargs)

    return call
