"""Rules for recurrent layers: a hidden unit is switched off by the rows of all its gates.

With its rows at zero, a unit of an LSTM has i = f = o = 1/2 and g = tanh(0) = 0, so that its cell and
its output stay at the zero they start from; likewise for a GRU and a plain recurrent layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from hatfn.tracing.labels import ZERO, agree, filled
from hatfn.tracing.nodes import place_of, shape_of
from hatfn.tracing.rules.registry import registrar
from hatfn.tracing.tracer import Rule, Tracer, Value
from hatfn.wiring import OPEN

RULES: dict[str, Rule] = {}
rule = registrar(RULES)

_ROWS = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""How many rows of its matrices belong to one hidden unit."""


@rule(*_ROWS)
def recurrent(
    t: Tracer,
    node: Node,
    x: Value,
    start: Value | list[Value],
    params: list[Value],
    biased: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    *_: bool,
) -> tuple[Tensor, ...]:
    """Layers and directions one after the other; what starts from anything but zero is left open."""
    kind, overload = str(node.target).split(".")[1:]
    values = [v for v in pytree.tree_leaves((x, start, params, biased)) if isinstance(v, Value)]
    packed = overload != "input"  # sequences of different length, in another order of arguments
    starts = start if isinstance(start, list | tuple) else [start]
    if packed or not all(bool((t.roots(value) == ZERO).all()) for value in starts):
        return _unknown(t, node, values)
    directions = 1 + bidirectional
    each = len(params) // (layers * directions)
    if each != 2 + 2 * biased:  # projections
        return _unknown(t, node, values)
    t.own(x)
    into = agree(t.roots(x), tuple(range(len(x.shape) - 1))).reshape(-1)
    states = []
    for layer in range(layers):
        first = layer * directions * each
        parts = [params[first + d * each :][:each] for d in range(directions)]
        units = [_direction(t, node, part, into, _ROWS[kind]) for part in parts]
        into = torch.cat(units)
        states += units
    last = torch.stack(states)[:, None]  # of every layer and direction: what the loops end with
    shapes = [out.shape for out in node.meta["val"]]
    return into.expand(shapes[0]), *(last.expand(shape) for shape in shapes[1:])


def _unknown(t: Tracer, node: Node, values: list[Value]) -> tuple[Tensor, ...]:
    for value in values:
        t.own(value)
    return (filled(shape_of(node), OPEN),)


def _direction(t: Tracer, node: Node, params: list[Value], into: Tensor, rows: int) -> Tensor:
    """The units of one direction of one layer."""
    to_input, to_itself, *biases = params
    units = t.fresh(to_itself.shape[1], place_of(node) or str(node.name))
    out = units.repeat(rows)
    binds = [(to_input, into[None].expand(to_input.shape)), (to_itself, units[None])]
    kept = True
    for value, feeding in [*binds, *((bias, None) for bias in biases)]:
        wanted = out.reshape(-1, *[1] * (len(value.shape) - 1)).expand(value.shape)
        held = t.bind(value, wanted, feeding)
        kept = kept and torch.equal(t.unions.find(held), t.unions.find(wanted))
    if kept:
        return units
    for value in params:  # another use of these parameters decided otherwise
        t.own(value)
    return torch.full_like(units, OPEN)
