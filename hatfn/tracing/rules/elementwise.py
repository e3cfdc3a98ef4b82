"""Rules for operators that compute each element from the elements at the same place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from hatfn.tracing.labels import ZERO, compress, filled, shrink
from hatfn.tracing.nodes import at_zero, place_of, shape_of, unreadable
from hatfn.tracing.rules.combination import are_parameters
from hatfn.tracing.rules.registry import registrar
from hatfn.tracing.tracer import Rule, Tracer, Value
from hatfn.wiring import OPEN

RULES: dict[str, Rule] = {}
rule = registrar(RULES)


def pointwise(t: Tracer, node: Node, *args: Any, **kwargs: Any) -> Tensor:
    """Any elementwise operator: zero where all its operands are, if it takes zeros to zero.

    The units of several operands become one unit, as in a residual stream: ``x + f(x)`` can be
    switched off only as a whole.
    """
    operands = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Value)]
    shape = shape_of(node)
    if not operands or not at_zero(node):
        return filled(shape, OPEN)
    label = t.label(operands[0])
    for operand in operands[1:]:
        merged = t.merge(label, t.label(operand))
        if merged is None:
            return filled(shape, OPEN)
        label = merged
    return label.expand(shape)


@rule("add")
def add(t: Tracer, node: Node, a: Any, b: Any, **kwargs: Any) -> Tensor:
    """A sum. One learnable number added to all channels (StarReLU) is gated channel by channel."""
    for value, other in ((a, b), (b, a)):
        if isinstance(value, Value) and isinstance(other, Value) and value.dynamic:
            label = t.label(value).expand(shape_of(node))
            if t.spread(other, label):
                return label
    return pointwise(t, node, a, b, **kwargs)


@rule("hardswish", "prelu", "_prelu_kernel", "rrelu", "rrelu_with_noise")
def preserving(t: Tracer, node: Node, x: Value, *_: Any) -> Tensor:
    """Activations that keep zero, and that PyTorch does not tag as elementwise, or as random."""
    return t.label(x)


@rule("log_sigmoid")
def moving(t: Tracer, node: Node, *_: Any) -> Tensor:
    """Activations that do not keep zero."""
    return filled(shape_of(node), OPEN)


@rule("signbit", "copysign", "atan2")
def sign(t: Tracer, node: Node, *_: Any) -> Tensor:
    """Operators that tell +0 from -0: a unit that is off gives either, as weights have it."""
    raise unreadable(node, "reads the sign of a zero")


@rule("mul")
def mul(t: Tracer, node: Node, a: Value, b: Any) -> Tensor:
    """A product is zero where either factor is; the units of two activations become one.

    A parameter that scales an ungated value (a layer scale) gates it with units of its own. Of two
    parameters the larger is taken for the weight that the other one scales.
    """
    shape = shape_of(node)
    if not isinstance(b, Value):
        return t.label(a)
    turn = b.dynamic and not a.dynamic
    if are_parameters(a, b):
        t.products[node] = a, b
        turn = b.shape.numel() > a.shape.numel()
    if turn:
        a, b = b, a
    left, right = t.label(a).expand(shape), t.label(b).expand(shape)
    if a.dynamic and b.dynamic:
        t.merge(left, right)
    elif a.dynamic and b.sources and bool((left == OPEN).all()) and _is_vector(right):
        t.promote(right, place_of(node) or str(node.name))
    return torch.where(left != OPEN, left, right)


def _is_vector(label: Tensor) -> bool:
    """Whether a label varies along one dimension; a scalar would switch a task off as a whole."""
    return sum(size > 1 for size in shrink(compress(label)).shape) == 1


@rule("__and__", "logical_and", "bitwise_and")
def both(t: Tracer, node: Node, a: Any, b: Any) -> Tensor:
    """True where both are: zero where either is."""
    operands = [t.label(x).expand(shape_of(node)) for x in (a, b) if isinstance(x, Value)]
    return torch.where(operands[0] != OPEN, operands[0], operands[-1])


@rule("__or__", "__xor__")
def either(t: Tracer, node: Node, a: Any, b: Any) -> Tensor:
    """True where one is, which PyTorch does not tag as elementwise."""
    return pointwise(t, node, a, b)


@rule("div", "true_divide")
def div(t: Tracer, node: Node, a: Any, b: Any, **_: Any) -> Tensor:
    """A quotient is zero where its numerator is."""
    shape = shape_of(node)
    return t.label(a).expand(shape) if isinstance(a, Value) else filled(shape, OPEN)


@rule("where")
def where(t: Tracer, node: Node, condition: Value, a: Any, b: Any) -> Tensor:
    """Zero where both alternatives are, whatever the condition."""
    shape = shape_of(node)
    left, right = (
        t.label(side) if isinstance(side, Value) else filled(shape, OPEN if side else ZERO)
        for side in (a, b)
    )
    merged = t.merge(left, right)
    return filled(shape, OPEN) if merged is None else merged.expand(shape)


@rule("masked_fill")
def masked_fill(t: Tracer, node: Node, x: Value, mask: Value, value: Any) -> Tensor:
    """Filling with zero keeps every label."""
    shape = shape_of(node)
    return t.label(x).expand(shape) if value == 0 else filled(shape, OPEN)


@rule("glu")
def glu(t: Tracer, node: Node, x: Value, dim: int = -1) -> Tensor:
    """a * sigmoid(b) for the two halves of x: zero where a is."""
    return t.label(x).chunk(2, dim)[0]


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "logsumexp", "argmax", "argmin")
def softmax(t: Tracer, node: Node, *_: Any, **__: Any) -> Tensor:
    """A softmax of zeros is not zero, and a place is no activation."""
    return filled(shape_of(node), OPEN)
