"""Rules for operators that multiply an activation by a parameter and sum: the producers of units."""

from __future__ import annotations

import math
import string
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from hatfn.tracing.labels import agree, all_but, filled
from hatfn.tracing.nodes import shape_of
from hatfn.tracing.rules.combination import are_parameters, combine, dropped, group_name
from hatfn.tracing.rules.registry import registrar
from hatfn.tracing.tracer import Result, Rule, Tracer, Value
from hatfn.wiring import OPEN

RULES: dict[str, Rule] = {}
rule = registrar(RULES)


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
    channels = agree(label, all_but(label, channel)).expand(
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

    fresh = t.fresh(width, group_name(weight, node)).reshape(rows)
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
    channels = agree(label, all_but(label, -1))
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
    fresh = t.fresh(width, group_name(weight, node))
    held = t.bind(weight, fresh, filled(weight.shape, OPEN))
    return agree(t.unions.find(held), (0,))[0].expand(shape_of(node))


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(
    t: Tracer,
    node: Node,
    weight: Value,
    indices: Value,
    offsets: Value,
    scale: bool = False,
    mode: int = 0,
    sparse: bool = False,
    factors: Value | None = None,
    *_: Any,
) -> Tensor:
    """Sums, means or maxima of vectors of a table."""
    if factors is not None:
        t.own(factors)
    return embedding(t, node, weight, indices)


@rule("mm", "bmm", "matmul")
def matmul(t: Tracer, node: Node, a: Value, b: Value) -> Result:
    """The product of two matrices.

    With a parameter it is a linear layer; two parameters make a weight. Of two
    activations, as in attention's ``softmax(q k') v``, column j is zero for a unit that zeroes all of
    column j of b, and row i likewise for a; a label can name one of them.
    """
    shape = shape_of(node)
    dims = a.label.dim()
    if are_parameters(a, b) and dims > 1 and b.label.dim() in (1, dims):
        right = t.label(b).unsqueeze(-1)[(None,) * (dims - 2)] if b.label.dim() == 1 else t.label(b)
        made = combine(t, node, (a, t.label(a).unsqueeze(-1)), (b, right.unsqueeze(-3)), (dims - 1,))
        if made is not None:
            return dropped(made, shape)
    if min(dims, b.label.dim()) > 1:
        weighed = _weighed(t, node, _names(a.shape, b.shape, shape), a, b)
        if weighed is not None:
            return weighed
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
def addmm(t: Tracer, node: Node, bias: Value, x: Value, weight: Value, **_: Any) -> Result:
    """x W + b with the weight the other way round than in a linear layer."""
    product = matmul(t, node, x, weight)
    if not isinstance(product, Tensor):
        t.own(bias)
        return product
    unit = agree(product, (0,)).expand(1, product.shape[1]).reshape(-1)
    if bias.shape != unit.shape:
        t.own(bias)
        return filled(product.shape, OPEN)
    biased = t.bind(bias, unit, filled(unit.shape, OPEN))
    return t.same(unit, biased).expand(product.shape)


@rule("einsum")
def einsum(t: Tracer, node: Node, equation: str, operands: list[Value], *_: Any, **__: Any) -> Result:
    """A sum of products is zero where one factor is zero in every term.

    A parameter times an activation is a layer, two parameters make a weight; others are per task.
    """
    shape = shape_of(node)
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    plain = arrow and "." not in equation and all(len({*term}) == len(term) for term in terms)
    if plain and len(operands) == 2 and are_parameters(*operands):
        made = _product(t, node, (terms[0], terms[1], output), *operands)
        if made is not None:
            return dropped(made, shape)
    if plain and len(operands) == 2:
        weighed = _weighed(t, node, (terms[0], terms[1], output), *operands)
        if weighed is not None:
            return weighed
    for operand in operands:
        t.own(operand)
    result = filled(shape, OPEN)
    for term, operand in zip(terms, operands, strict=True) if plain else ():
        label = _reduced(t.roots(operand), term, output)
        result = torch.where((result < 0) & (label >= 0), label, result)
    return result.expand(shape)


def _aligned(label: Tensor, term: str, order: str) -> Tensor:
    """A label whose dimensions are called ``term``, with those of ``order``, of size one if new."""
    label = label.permute([term.index(letter) for letter in order if letter in term])
    return label[tuple(slice(None) if letter in term else None for letter in order)]


def _reduced(label: Tensor, term: str, order: str) -> Tensor:
    """The label of a sum over the dimensions that ``order`` does not have, with those that it has."""
    summed = tuple(i for i, letter in enumerate(term) if letter not in order)
    kept = "".join(letter for letter in term if letter in order)
    return _aligned(agree(label, summed).squeeze(summed), kept, order)


def _weighed(t: Tracer, node: Node, terms: tuple[str, str, str], a: Value, b: Value) -> Tensor | None:
    """The label of an activation times a parameter: a layer without a bias, written as a product.

    Each entry of the result along the parameter's own dimensions is a new unit. Along a dimension that
    all three have there is a layer for each place, as in a grouped convolution.

    Args:
        t: the trace so far.
        node: the product.
        terms: the names of the dimensions of both operands and of the result, as einsum writes them.
        a: one operand.
        b: the other one.

    Returns:
        The label; None if it is no such product, or if the activation keeps its units.
    """
    left, right, output = terms
    (x, read), (weight, made) = ((a, left), (b, right)) if b.sources else ((b, right), (a, left))
    if x.sources or not weight.sources or weight.param in t.heads:
        return None
    weight, made = _unrepeated(weight, made)
    sizes = dict(zip(made, weight.shape, strict=True))
    rows = [sizes[letter] if letter in output else 1 for letter in made]
    alone = any(sizes[letter] > 1 for letter in made if letter not in read + output)
    if alone or {*read} & {*made} <= {*output} or not {*made} & {*output}:
        return None
    label = t.roots(x)
    into, kept = _reduced(label, read, made), _reduced(label, read, output)
    if bool((kept >= 0).any()) and not bool((into >= 0).any()):
        return None
    fresh = t.fresh(math.prod(rows), group_name(weight, node)).reshape(rows)
    held = t.bind(weight, fresh, into)
    return _reduced(t.unions.find(held), made, output).expand(shape_of(node))


def _unrepeated(value: Value, term: str) -> tuple[Value, str]:
    """A value without the dimensions along which it only repeats, as for each sample; its term."""
    if value.param is not None:
        return value, term
    label, kept = value.label, term
    for dim in reversed(range(label.dim())):
        if label.stride(dim) == 0 and label.shape[dim] > 1:
            label, kept = label.select(dim, 0), kept[:dim] + kept[dim + 1 :]
    return Value(label, sources=value.sources), kept


def _names(a: torch.Size, b: torch.Size, product: torch.Size) -> tuple[str, str, str]:
    """The names of the dimensions of a product of two matrices, or of stacks of them.

    A stack of one is repeated, so that its dimension is not the one of the result.
    """
    output = string.ascii_lowercase[: len(product) - 2]

    def of(operand: torch.Size, spare: str) -> str:
        places = zip(operand[-3::-1], product[-3::-1], output[::-1], spare, strict=False)
        return "".join(name if n == m else other for n, m, name, other in places)[::-1]

    upper = string.ascii_uppercase
    return of(a, upper[:10]) + "XY", of(b, upper[10:20]) + "YZ", output + "XZ"


def _product(t: Tracer, node: Node, terms: tuple[str, str, str], a: Value, b: Value) -> Value | None:
    """The sum of products of two parameters, as einsum writes it."""
    left, right, output = terms
    summed = "".join(dict.fromkeys(letter for letter in left + right if letter not in output))
    labels = (_aligned(t.label(v), term, output + summed) for v, term in ((a, left), (b, right)))
    dims = tuple(range(len(output), len(output + summed)))
    return combine(t, node, (a, next(labels)), (b, next(labels)), dims)


@rule("tensordot")
def tensordot(t: Tracer, node: Node, a: Value, b: Value, of_a: list[int], of_b: list[int]) -> Result:
    """einsum with the dimensions in numbers."""
    names = iter(string.ascii_letters)
    left = [next(names) for _ in a.shape]
    right = [next(names) for _ in b.shape]
    for one, other in zip(of_a, of_b, strict=True):
        right[other] = left[one]
    output = [letter for letter in left + right if not (letter in left and letter in right)]
    equation = f"{''.join(left)},{''.join(right)}->{''.join(output)}"
    return einsum(t, node, equation, [a, b])


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
