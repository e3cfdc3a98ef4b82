"""Run an exported graph on labels (see labels.py) instead of numbers."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from hatfn.tracing.labels import ZERO, compress, filled, shrink
from hatfn.tracing.nodes import is_pointwise, operator_name, place_of, shape_of
from hatfn.tracing.rules import (
    contraction,
    elementwise,
    movement,
    norms,
    recurrence,
    reduction,
    scatter,
)
from hatfn.tracing.tracer import Result, Rule, Tracer, Value
from hatfn.wiring import OPEN

BINDING = {**contraction.RULES, **norms.RULES, **recurrence.RULES}
"""Rules of operators that can share a parameter between tasks: they record its units themselves."""

SUMMING = {**reduction.RULES, **scatter.RULES}
"""Rules after which labels no longer tell the entries of a parameter apart."""

PASSING = {**elementwise.RULES, **movement.RULES, **SUMMING}
"""Rules under which a parameter that meets an activation is per task.

A parameter that meets parameters alone is folded: whatever is computed from it, an entry that is off is
zero.
"""


def interpret(
    t: Tracer,
    program: torch.export.ExportedProgram,
    names: dict[str, str],
    changed: Collection[str],
    input_gate: bool,
) -> list[Value]:
    """Run the graph on labels.

    Args:
        t: the tracer, which collects the results; it is changed.
        program: the exported module; no operator changes its operands.
        names: {name: first name} of every parameter and buffer.
        changed: the buffers that training changes.
        input_gate: give each feature of the input a unit.

    Returns:
        The values that the module returns.

    Raises:
        UnreadableError: an operator or a shape depends on the numbers in a tensor.
    """
    values: dict[Node, Any] = {}
    signature = program.graph_signature
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    constants = {**program.state_dict, **program.constants}
    for node in program.graph.nodes:
        operands = pytree.tree_map_only(Node, values.get, (node.args, node.kwargs))
        if node.op == "placeholder" and isinstance(node.meta["val"], Tensor):
            spec = specs[node.name]
            kind, target = spec.kind.name, names.get(spec.target, spec.target)
            if kind == "PARAMETER":
                values[node] = _parameter(t, node, target)
            elif kind == "USER_INPUT":
                values[node] = _input(t, node, input_gate)
            elif target in changed:
                values[node] = Value(filled(node.meta["val"].shape, OPEN))
            else:
                values[node] = _constant(constants[spec.target])
                t.constants.add(target)
        elif node.op == "call_function":
            values[node] = _call(t, node, *operands)
        elif node.op == "output":
            kinds = [spec.kind.name for spec in signature.output_specs]
            pairs = zip(kinds, pytree.tree_leaves(operands[0]), strict=True)
            outputs = [v for kind, v in pairs if kind == "USER_OUTPUT" and isinstance(v, Value)]
            for output in outputs:  # no gate can stand before a parameter that is itself returned
                t.own(output)
            return outputs
    raise AssertionError("a graph without an output")


def is_simple(node: Node) -> bool:
    """Whether an operator changes no operand, and either has a rule or returns a constant.

    If all operators are simple, the program is not decomposed, which would take longer than the rest
    of a trace.
    """
    if node.op != "call_function" or node.target is operator.getitem or node.meta.get("val") is None:
        return True
    if getattr(node.target, "_schema", None) is None or node.target._schema.is_mutable:  # type: ignore[union-attr]
        return False
    name = operator_name(node)
    constant = not node.all_input_nodes and _is_deterministic(node)
    return constant or name in BINDING or name in PASSING or is_pointwise(node)


def _parameter(t: Tracer, node: Node, name: str) -> Value:
    t.params[name].readers |= set(node.users)
    return Value(filled(node.meta["val"].shape, OPEN), param=name, sources=frozenset([name]))


def _input(t: Tracer, node: Node, gated: bool) -> Value:
    shape = node.meta["val"].shape
    if not gated:
        return Value(filled(shape, OPEN), dynamic=True)
    t.input = t.fresh(shape[1:].numel(), "input").reshape(shape[1:])
    return Value(t.input.expand(shape), dynamic=True)


def _constant(data: Tensor) -> Value:
    return Value(filled(data.shape, OPEN if bool(data.any()) else ZERO), data=data)


def _call(t: Tracer, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one operator on labels."""
    if node.target is operator.getitem:
        return args[0][args[1]]
    if node.meta.get("val") is None:  # an assertion
        return None
    operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Value)]
    if all(operand.data is not None for operand in operands) and _is_deterministic(node):
        return _fold(node, args, kwargs)
    name, dynamic = operator_name(node), any(operand.dynamic for operand in operands)
    if name in BINDING:
        # A layer's output is an activation, even if its input is a parameter such as a learned query.
        activation = dynamic or name not in norms.RULES
        return _wrap(node, BINDING[name](t, node, *args, **kwargs), operands, activation)
    rule = PASSING.get(name) or (elementwise.pointwise if is_pointwise(node) else None)
    if rule is None:
        place = place_of(node)
        t.fallbacks.append(f"{node.target} in {place}" if place else str(node.target))
        rule = _unknown
    if not _follows(name, rule, operands):
        for operand in operands:
            t.own(operand) if dynamic else t.fold(operand)
    result = _wrap(node, rule(t, node, *args, **kwargs), operands, dynamic)
    for value in pytree.tree_leaves(result):
        if not value.dynamic and bool((shrink(value.label) == OPEN).any()):
            t.fold(value)  # labels cannot follow this arithmetic on parameters
    return result


def _follows(name: str, rule: Rule, operands: list[Value]) -> bool:
    """Whether labels after this operator still identify each entry of a parameter.

    They do if one parameter is moved or changed element by element, or if several are concatenated.
    They do not if a parameter meets an activation, a second parameter or itself, or is summed.
    """
    if rule is _unknown or any(operand.dynamic for operand in operands):
        return False
    alone = sum(bool(operand.sources) for operand in operands) <= 1
    return name in movement.RULES or (alone and name not in SUMMING)


def _unknown(t: Tracer, node: Node, *_: Any, **__: Any) -> Tensor:
    """The label of an operator without a rule: no gate is known to make an element zero."""
    return filled(shape_of(node), OPEN)


def _is_deterministic(node: Node) -> bool:
    tags = getattr(node.target, "tags", None)
    return tags is not None and torch.Tag.nondeterministic_seeded not in tags


def _fold(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute an operator whose operands are the same in every call."""
    numbers = pytree.tree_map_only(Value, lambda value: value.data, (args, kwargs))
    result = node.target(*numbers[0], **numbers[1])  # type: ignore[operator]
    return pytree.tree_map_only(Tensor, _constant, result)


def _wrap(node: Node, result: Result, operands: list[Value], dynamic: bool) -> Any:
    """Values with the labels of a rule; other outputs of the operator, such as indices, are open."""
    if isinstance(result, Value):
        return result
    sources = frozenset() if dynamic else frozenset().union(*(o.sources for o in operands))
    outputs = node.meta["val"]
    shapes = [shape_of(node)]
    if isinstance(outputs, tuple | list):
        shapes = [out.shape for out in outputs if isinstance(out, Tensor)]
    labels = [result] if isinstance(result, Tensor) else list(result)
    labels += [filled(shape, OPEN) for shape in shapes[len(labels) :]]
    for label, shape in zip(labels, shapes, strict=True):
        assert label.shape == shape, f"{node.target}: {label.shape} != {shape}"
    values = tuple(Value(compress(label), dynamic, sources=sources) for label in labels)
    return values if isinstance(outputs, tuple | list) else values[0]
