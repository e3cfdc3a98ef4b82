"""Checks of the type and range of one argument; they do not depend on states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from hatfn.numerics.concrete import integer, is_at_hand


def shortened(items: Sequence[object], most: int = 8) -> str:
    """The items as text; a list of more than ``most`` items is cut."""
    shown = ", ".join(map(str, items[:most]))
    return f"[{shown}, ... {len(items)} in all]" if len(items) > most else f"[{shown}]"


def check_kind(where: str, name: str, value: Any, kind: Any, right: str) -> None:
    """Check that a value is an instance of a class, or of one of several (``a | b``)."""
    if not isinstance(value, kind):
        raise TypeError(f"{where}: {name} is a {type(value).__name__}. Expected {right}.")


def check_learner(where: str, hat: Any) -> None:
    """Check that ``hat`` is a learner: what build() returns, or an object like it."""
    if not (hasattr(hat, "wiring") and hasattr(hat, "tasks")):
        raise TypeError(
            f"{where}: hat is a {type(hat).__name__}. Expected the learner that build() made: hat = "
            f"hatfn.build(module, wiring, classes, optimizer)."
        )


def check_callable(where: str, name: str, value: Any, right: str) -> None:
    """Check that a value is a function."""
    if not callable(value):
        raise TypeError(f"{where}: {name}={value!r}. Expected a function {right}.")


def check_list(where: str, name: str, value: Any, right: str) -> None:
    """Check that a value is a list or another iterable, but not a tensor or a string."""
    if isinstance(value, Tensor | str) or not hasattr(value, "__iter__"):
        got = f" is a {type(value).__name__}" if isinstance(value, Tensor) else f"={value!r}"
        raise TypeError(f"{where}: {name}{got}. Expected {right}.")


def check_integer(where: str, name: str, value: Any, such_as: int = 1) -> int:
    """The value as an int, after a check that it is an integer."""
    number = integer(value)
    if number is None:
        raise TypeError(
            f"{where}: {name}={value!r} is a {type(value).__name__}. Expected an int: {name}={such_as}."
        )
    return number


def check_count(where: str, name: str, value: Any) -> int:
    """The value as an int, after a check that it is at least 1."""
    number = check_integer(where, name, value)
    if number < 1:
        raise ValueError(f"{where}: {name}={number}. Expected at least 1.")
    return number


def check_seed(where: str, seed: Any) -> int:
    """The seed as an int, after a check that a generator accepts it."""
    number = check_integer(where, "seed", seed, such_as=0)
    if not 0 <= number < 2**63:
        raise ValueError(
            f"{where}: seed={number}. Expected an int of at least 0 and below 2**63: seed="
            f"{abs(number) % 2**31}."
        )
    return number


def check_real(
    where: str, name: str, value: Any, right: Callable[[float], bool], expected: str
) -> None:
    """Check that a number, or every number of a tensor, is in a range.

    Tensors inside ``vmap`` and on a GPU are not checked, because they would have to be read.
    """
    numbers = [value]
    if isinstance(value, Tensor):
        known = value.numel() and is_at_hand(value)
        numbers = [end.item() for end in value.aminmax()] if known else []
    for number in numbers:
        if not isinstance(number, Real):
            raise TypeError(f"{where}: {name}={number!r}. Expected a number {expected}.")
        if not right(float(number)):
            raise ValueError(f"{where}: {name}={number!r}. Expected a number {expected}.")


def check_alike(where: str, name: str, tree: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Check that ``other`` has a tensor of the same shape for every name of ``tree``."""
    for kind, each in (("the first argument", tree), (name, other)):
        check_kind(where, kind, each, Mapping, "{name: tensor}, a dict")
    for key, leaf in tree.items():
        shape = tuple(other[key].shape) if key in other else None
        if shape != leaf.shape:
            raise ValueError(
                f"{where}: {name}[{key!r}] has shape {shape}, but the first argument's {key!r} has "
                f"{tuple(leaf.shape)}. Expected a tensor of the same shape for every name."
            )
