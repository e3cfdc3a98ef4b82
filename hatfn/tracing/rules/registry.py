"""How a rule is attached to the operators that it explains."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hatfn.tracing.tracer import Rule

F = TypeVar("F", bound=Rule)


def registrar(table: dict[str, Rule]) -> Callable[..., Callable[[F], F]]:
    """A decorator that enters a rule into ``table`` under the names of ATen operators.

    A name stands for all overloads: "add" for add.Tensor and add.Scalar. A rule is called as
    ``rule(tracer, node, *args, **kwargs)`` with the operator's own arguments, each tensor replaced
    by its :class:`~hatfn.tracing.tracer.Value`; it returns a label of the result's shape, or a
    Value, or a tuple of Values.
    """

    def rule(*operators: str) -> Callable[[F], F]:
        def enter(function: F) -> F:
            for operator in operators:
                table[operator] = function
            return function

        return enter

    return rule
