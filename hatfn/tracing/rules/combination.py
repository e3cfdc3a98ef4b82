"""Two parameters that are multiplied and summed before use: a hidden layer within a weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from hatfn.tracing.labels import agree, compress, filled
from hatfn.tracing.nodes import place_of
from hatfn.tracing.tracer import Tracer, Value
from hatfn.wiring import OPEN


def group_name(weight: Value, node: Node) -> str:
    """The name of a group, after the layer whose parameter produces it."""
    if not weight.sources:
        return place_of(node) or str(node.name)
    first = min(weight.sources)
    return (first.rpartition(".")[0] or first).partition(".parametrizations.")[0]


def are_parameters(*values: object) -> bool:
    """Whether all of these were computed from parameters alone."""
    return all(isinstance(v, Value) and v.sources and not v.dynamic for v in values)


def combine(
    t: Tracer, node: Node, a: tuple[Value, Tensor], b: tuple[Value, Tensor], summed: tuple[int, ...]
) -> Value | None:
    """sum of a b over some dimensions: every place that is summed is a new unit.

    As in two layers without a function in between: of W = V U, row i of U produces unit i, and column i
    of V reads it. V is the one that has the first dimension of the result, as the weights of layers
    lead with what they produce.

    Args:
        t: the trace so far.
        node: the sum.
        a: the first parameter, and its label with as many dimensions as the product has: of size one
            where it has none.
        b: the second one.
        summed: dimensions of the product.

    Returns:
        The result with these dimensions kept, size one. None if it is no such product.
    """
    places = [max(sizes) for sizes in zip(a[1].shape, b[1].shape, strict=True)]
    lead = next((d for d, size in enumerate(places) if size > 1 and d not in summed), None)
    if lead is None or (a[1].shape[lead] > 1) == (b[1].shape[lead] > 1):
        return None
    (outer, rows), (inner, columns) = (a, b) if a[1].shape[lead] > 1 else (b, a)
    if not any(a[1].shape[d] == b[1].shape[d] > 1 for d in summed):
        return None
    rows, columns = _alone(t, outer, rows, columns, summed), _alone(t, inner, columns, rows, summed)
    if bool((rows < 0).any()) or bool((columns < 0).any()):
        return None
    kept = tuple(d for d in range(len(places)) if d not in summed)
    known = agree(t.feeds(rows), kept).clone()
    fresh = t.fresh(int((known < 0).sum()), group_name(inner, node))
    units = known.masked_scatter(known < 0, fresh)
    ends = t.cells([1 if d in summed else size for d, size in enumerate(rows.shape)])
    if not (t.gate(columns, units, filled((), OPEN)) and t.gate(rows, ends, units)):
        return None
    shape = [1 if d in summed else size for d, size in enumerate(places)]
    return Value(compress(ends.expand(shape)), sources=outer.sources | inner.sources)


def _alone(t: Tracer, value: Value, label: Tensor, other: Tensor, summed: tuple[int, ...]) -> Tensor:
    """The label of one factor, summed first over the dimensions that the other one does not have."""
    dims = tuple(d for d in summed if other.shape[d] < label.shape[d])
    if not dims:
        return label
    t.fold(value)
    whole = t.together(label, dims)
    return agree(label, dims) if whole is None else whole


def dropped(value: Value, shape: torch.Size) -> Value:
    """The same in the shape of the operator's result, without the dimensions that were summed."""
    return Value(compress(value.label.reshape(shape)), sources=value.sources)
