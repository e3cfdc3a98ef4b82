"""Rules for operators that multiply an activation by a parameter and sum: the producers of units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from hatfn.tracing.labels import agree, filled
from hatfn.tracing.nodes import place_of, shape_of
from hatfn.tracing.rules.registry import registrar
from hatfn.tracing.tracer import Rule, Tracer, Value
from hatfn.wiring import OPEN

RULES: dict[str, Rule] = {}
rule = registrar(RULES)


def _all_but(label: Tensor, dim: int) -> tuple[int, ...]:
    return tuple(d for d in range(label.dim()) if d != dim % label.dim())


def _group_name(weight: Value, node: Node) -> str:
    if not weight.sources:
        return place_of(node) or str(node.name)
    first = min(weight.sources)
    return first.rpartition(".")[0] or first


def _contract(
    t: Tracer,
    node: Node,
    x: Value,
    weight: Value,
    bias: Value | None,
    *,
    channel: int,
    groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    """Linear and convolution: every output channel is a new unit, gated through its own weights.

    Out unit of a weight entry: the unit of its output channel. In unit: the unit that zeroes its
    input channel in every sample and at every place, else open. The bias is gated with its channel.

    The weight is looked at as (groups, out, in, kernel), or (groups, in, out, kernel) if transposed.
    """
    t.own(x)
    label = t.roots(x)
    channels = agree(label, _all_but(label, channel)).expand(
        [size if d == channel % label.dim() else 1 for d, size in enumerate(label.shape)]
    )
    first, second, *kernel = weight.shape
    per_group = channels.reshape(groups, -1)
    ones = [1] * len(kernel)
    if transposed:
        view = [groups, first // groups, second, *kernel]
        rows, into_shape = [groups, 1, second, *ones], [groups, first // groups, 1, *ones]
        summed = (1, *range(3, 3 + len(kernel)))
    else:
        view = [groups, first // groups, second, *kernel]
        rows, into_shape = [groups, first // groups, 1, *ones], [groups, 1, second, *ones]
        summed = (2, *range(3, 3 + len(kernel)))
    width = rows[1] * rows[2] * groups

    if weight.param is not None and weight.param in t.heads:
        t.feed(weight.param, _regroup(per_group.reshape(into_shape), view, weight.shape))
        return filled((width,), OPEN)

    inherited = agree(per_group, (1,)).expand(groups, width // groups).reshape(width)
    if weight.data is not None:
        # A fixed weight, as in a blur: nothing to gate, but a sum of zeros is zero.
        return inherited if bias is None else filled((width,), OPEN)

    fresh = t.fresh(width, _group_name(weight, node)).reshape(rows)
    into = per_group.reshape(into_shape)
    held = t.bind(weight, _regroup(fresh, view, weight.shape), _regroup(into, view, weight.shape))
    unit = agree(t.unions.find(held).reshape(view), summed).expand(rows).reshape(width)
    if bias is None:
        return unit
    biased = t.bind(bias, unit, filled(unit.shape, OPEN))
    return t.same(unit, biased)


def _regroup(label: Tensor, view: list[int], shape: tuple[int, ...]) -> Tensor:
    """A label over (groups, ., ., kernel) in the shape of the weight itself, expanded if it can be."""
    if view[0] == 1:
        return label[0].expand(shape)
    kernel = len(view) - 3
    return (
        label.expand(*view[:3], *[1] * kernel)
        .reshape(view[0] * view[1], view[2], *[1] * kernel)
        .expand(shape)
    )


@rule("linear")
def linear(t: Tracer, node: Node, x: Value, weight: Value, bias: Value | None = None) -> Tensor:
    """y = x W' + b over the last dimension.

    Without a bias, an input whose units lie along another dimension (mixing tokens) keeps them:
    a sum of zeros is zero. Nothing then gates the weight itself, so every task has its own.
    """
    if weight.label.dim() != 2:
        for operand in (x, weight, *([] if bias is None else [bias])):
            t.own(operand)
        return filled(shape_of(node), OPEN)
    label = t.roots(x)
    mixed = agree(label, (-1,))
    channels = agree(label, _all_but(label, -1))
    if bias is None and bool((mixed >= 0).any()) and not bool((channels >= 0).any()):
        t.own(x)
        t.own(weight)
        return mixed.expand(shape_of(node))
    return _contract(t, node, x, weight, bias, channel=-1).expand(shape_of(node))


@rule("conv1d", "conv2d", "conv3d")
def conv(
    t: Tracer,
    node: Node,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = None,
    padding: Any = None,
    dilation: Any = None,
    groups: int = 1,
) -> Tensor:
    """Convolution in any number of dimensions; padding adds zeros, which no unit minds."""
    spatial = weight.label.dim() - 2
    unit = _contract(t, node, x, weight, bias, channel=-spatial - 1, groups=groups)
    return unit.reshape(-1, *[1] * spatial).expand(shape_of(node))


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(
    t: Tracer,
    node: Node,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = None,
    padding: Any = None,
    output_padding: Any = None,
    groups: int = 1,
    dilation: Any = None,
) -> Tensor:
    """Transposed convolution: the weight is (in, out / groups, kernel)."""
    spatial = weight.label.dim() - 2
    unit = _contract(t, node, x, weight, bias, channel=-spatial - 1, groups=groups, transposed=True)
    return unit.reshape(-1, *[1] * spatial).expand(shape_of(node))


@rule("embedding")
def embedding(t: Tracer, node: Node, weight: Value, indices: Value, *_: Any) -> Tensor:
    """A table of vectors: every component is a new unit; which rows are read is not gated."""
    width = weight.shape[1]
    fresh = t.fresh(width, _group_name(weight, node))
    held = t.bind(weight, fresh, filled(weight.shape, OPEN))
    return agree(t.unions.find(held), (0,)).expand(shape_of(node))


@rule("mm", "bmm", "matmul")
def matmul(t: Tracer, node: Node, a: Value, b: Value) -> Tensor:
    """The product of two matrices.

    With a parameter on the right it is a linear layer. Of two activations, as in attention's
    ``softmax(q k') v``, column j is zero for a unit that zeroes all of column j of b, and row i
    likewise for a; a label can name one of them.
    """
    shape = shape_of(node)
    if a.dynamic and not b.dynamic and b.data is None and b.label.dim() == 2:
        label = t.roots(a)
        into = agree(label, _all_but(label, -1)).reshape(-1, 1).expand(label.shape[-1], 1)
        fresh = t.fresh(b.shape[1], _group_name(b, node))
        held = t.bind(b, fresh, into)
        return agree(t.unions.find(held), (0,)).reshape(-1).expand(shape)
    for operand in (a, b):
        t.own(operand)
    if min(a.label.dim(), b.label.dim()) < 2:
        return filled(shape, OPEN)
    column = agree(t.roots(b), (-2,)).expand(shape)
    row = agree(t.roots(a), (-1,)).expand(shape)
    if t.unions.width(row) > t.unions.width(column):  # either will do: keep the finer
        column, row = row, column
    return column.where(column >= 0, row)


@rule("addmm")
def addmm(t: Tracer, node: Node, bias: Value, x: Value, weight: Value, **_: Any) -> Tensor:
    """x W + b with the weight the other way round than in a linear layer."""
    product = matmul(t, node, x, weight)
    unit = agree(product, (0,)).expand(1, product.shape[1]).reshape(-1)
    if bias.shape != unit.shape:
        t.own(bias)
        return filled(product.shape, OPEN)
    biased = t.bind(bias, unit, filled(unit.shape, OPEN))
    return t.same(unit, biased).expand(product.shape)


@rule("einsum")
def einsum(t: Tracer, node: Node, equation: str, operands: list[Value], *_: Any, **__: Any) -> Tensor:
    """A sum of products is zero where one factor is zero in every term; parameters are per task."""
    for operand in operands:
        t.own(operand)
    shape = shape_of(node)
    result = filled(shape, OPEN)
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow or "." in equation or any(len(set(term)) < len(term) for term in inputs.split(",")):
        return result
    for term, operand in zip(inputs.split(","), operands, strict=True):
        summed = tuple(i for i, letter in enumerate(term) if letter not in output)
        label = agree(t.roots(operand), summed)
        kept = [term.index(letter) for letter in output if letter in term]
        places = [slice(None) if letter in term else None for letter in output]
        label = label.permute(*kept, *summed).reshape([label.shape[i] for i in kept])[tuple(places)]
        result = torch.where((result < 0) & (label >= 0), label, result)
    return result.expand(shape)


@rule("scaled_dot_product_attention")
def attention(
    t: Tracer,
    node: Node,
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None = None,
    *_: Any,
    **__: Any,
) -> Tensor:
    """softmax(q k') v keeps v's unit along its last dimension; q and k only weigh the tokens."""
    for operand in (query, key, value, *([] if mask is None else [mask])):
        t.own(operand)
    shape = shape_of(node)
    label = agree(t.roots(value), (-2,))
    if value.shape[:-2] != shape[:-2] and label.shape[-3] > 1:  # several heads of q share one of v
        label = label.repeat_interleave(shape[-3] // label.shape[-3], -3)
    return label.expand(shape)
