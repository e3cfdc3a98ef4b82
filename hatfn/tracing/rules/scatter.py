"""Rules for operators that write or add elements to places that an index names, as graphs do."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from hatfn.tracing.labels import ZERO, agree, filled
from hatfn.tracing.nodes import shape_of
from hatfn.tracing.rules.registry import registrar
from hatfn.tracing.tracer import Rule, Tracer, Value
from hatfn.wiring import OPEN

RULES: dict[str, Rule] = {}
rule = registrar(RULES)


@rule(
    "scatter", "scatter_add", "scatter_reduce", "index_add", "index_reduce", "index_copy", "index_fill"
)
def scatter(
    t: Tracer, node: Node, x: Value, dim: int, index: Value, source: Any, *_: Any, **__: Any
) -> Tensor:
    """What is sent along edges is added to what nodes have, or takes its place.

    An element may go to any place of one dimension. So a unit zeroes the result if it zeroes all that
    lies along that dimension, of both: their units become one, as in a sum.
    """
    shape = shape_of(node)
    if not isinstance(source, Value):
        sent = filled((1,) * len(shape), OPEN if source else ZERO)
    elif source.shape[:dim] + source.shape[dim:][1:] != shape[:dim] + shape[dim:][1:] and source.shape:
        return filled(shape, OPEN)  # a part of what there is
    else:
        sent = agree(t.roots(source), (dim,)) if source.shape else t.roots(source)
    merged = t.merge(agree(t.roots(x), (dim,)), sent)
    return filled(shape, OPEN) if merged is None else merged.expand(shape)
