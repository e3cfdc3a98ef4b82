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
from hatfn.tracing.nodes import operator_name, place_of, shape_of
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


@rule("gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(
    t: Tracer,
    node: Node,
    x: Value,
    state: Value,
    to_input: Value,
    to_itself: Value,
    *biases: Value | None,
) -> Tensor:
    """One step. What a GRU gives is a mean of its state and what is new, so the state gates it."""
    kind = operator_name(node).removesuffix("_cell")
    started = state if kind == "gru" else None
    units = _step(t, node, x, state, started, [to_input, to_itself, *biases], _ROWS[kind])
    return units.expand(shape_of(node))


@rule("lstm_cell")
def lstm_cell(
    t: Tracer,
    node: Node,
    x: Value,
    states: list[Value],
    to_input: Value,
    to_itself: Value,
    *biases: Value | None,
) -> tuple[Tensor, Tensor]:
    """One step. What a unit gives is a part of its cell, a sum of what is new and the last cell."""
    units = _step(t, node, x, states[0], states[1], [to_input, to_itself, *biases], _ROWS["lstm"])
    return units.expand(shape_of(node)), units.expand(shape_of(node))


def _step(
    t: Tracer,
    node: Node,
    x: Value,
    state: Value,
    kept: Value | None,
    params: list[Value | None],
    rows: int,
) -> Tensor:
    """The units that one step of a recurrent layer gives.

    Args:
        t: the trace so far.
        node: the step.
        x: what the layer reads.
        state: what it gave at the last step.
        kept: what it adds to what is new; None: nothing.
        params: the weights, and the biases or None.
        rows: how many rows of a weight belong to a unit.
    """
    values = [param for param in params if param is not None]
    width = values[1].shape[1]
    for value in (x, state, *([] if kept is None else [kept])):
        t.own(value)
    held = filled((width,), ZERO) if kept is None else _features(t, kept)
    if bool((held == OPEN).any()):
        for value in values:
            t.own(value)
        return filled((width,), OPEN)
    fresh = t.fresh(width, place_of(node) or str(node.name))
    units, last = torch.where(held == ZERO, fresh, held), _features(t, state)
    return _gated(t, values, units, _features(t, x), torch.where(last == ZERO, units, last), rows)


def _features(t: Tracer, value: Value) -> Tensor:
    """The unit of each entry of the last dimension."""
    label = agree(t.roots(value), tuple(range(len(value.shape) - 1)))
    return label.reshape(-1).expand(value.shape[-1])


def _unknown(t: Tracer, node: Node, values: list[Value]) -> tuple[Tensor, ...]:
    for value in values:
        t.own(value)
    return (filled(shape_of(node), OPEN),)


def _direction(t: Tracer, node: Node, params: list[Value], into: Tensor, rows: int) -> Tensor:
    """The units of one direction of one layer."""
    units = t.fresh(params[1].shape[1], place_of(node) or str(node.name))
    return _gated(t, params, units, into, units, rows)


def _gated(
    t: Tracer, params: list[Value], units: Tensor, into: Tensor, state: Tensor, rows: int
) -> Tensor:
    """Gate the rows of all parameters with their units, or none; the units of the result."""
    to_input, to_itself, *biases = params
    out = units.repeat(rows)
    binds = [(to_input, into[None].expand(to_input.shape)), (to_itself, state[None])]
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
