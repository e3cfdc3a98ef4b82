"""Copies of functions that hold parts of a module: in closures, in default arguments, in partials."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor, nn


def held(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value holds, each behind the words that say where.

    Args:
        value: a function, a method, a partial, a container, a module or another object.
    """
    if isinstance(value, types.FunctionType):
        yield from _held_by_function(value)
    elif isinstance(value, types.MethodType):
        yield from (("", part) for part in (value.__func__, value.__self__))
    elif isinstance(value, partial):
        parts = (value.func, *value.args, *value.keywords.values())
        yield from ((" (partial)", part) for part in parts)
    elif isinstance(value, dict):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"[{i}]", part) for i, part in enumerate(value))
    elif hasattr(value, "__dict__") and not isinstance(value, type | types.ModuleType | Tensor):
        yield from ((f".{name}", part) for name, part in vars(value).items())


def _held_by_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What closure and default arguments of a function hold."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # a variable that is not set yet
            yield f" (closure over {name})", cell.cell_contents
    for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield " (default argument)", default


def reached(value: Any) -> Iterator[tuple[str, Any]]:
    """All that a value leads to, each once, behind the words that say where it is."""
    seen, stack = set(), [("", value)]
    while stack:
        where, one = stack.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield where, one
        stack.extend((where + step, part) for step, part in held(one))


def copy_functions(module: nn.Module, memo: dict[int, Any]) -> Callable[[], None]:
    """Prepare copies of the functions that a module leads to and that hold modules or tensors.

    ``copy.deepcopy`` takes a function as it is; what its closure holds would stay the original.

    Args:
        module: the module that is about to be copied with ``copy.deepcopy(module, memo)``.
        memo: receives the copies, {id of the original: copy}.

    Returns:
        A function to call after ``deepcopy``: it fills the copies' closures and default arguments.
    """
    copies = []
    for _, function in reached(module):
        if isinstance(function, types.FunctionType) and _holds_state(function):
            cells = tuple(types.CellType() for _ in function.__closure__ or ())
            new = types.FunctionType(
                function.__code__, function.__globals__, function.__name__, None, cells
            )
            new.__dict__.update(function.__dict__)
            memo[id(function)] = new
            copies.append((function, new))

    def fill() -> None:
        for function, new in copies:
            new.__defaults__ = _copied(function.__defaults__, memo)
            new.__kwdefaults__ = _copied(function.__kwdefaults__, memo)
            for old, cell in zip(function.__closure__ or (), new.__closure__ or (), strict=True):
                try:
                    cell.cell_contents = _copied(old.cell_contents, memo)
                except ValueError:  # a variable that is not set yet
                    continue

    return fill


def _holds_state(function: types.FunctionType) -> bool:
    """Whether a function leads to a module or a tensor by more than its global names."""
    return any(isinstance(value, nn.Module | Tensor) for _, value in reached(function))


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy, or the value itself if it cannot be copied, such as an open file."""
    try:
        return copy.deepcopy(value, memo)
    except (TypeError, RuntimeError, copy.Error):
        return value
