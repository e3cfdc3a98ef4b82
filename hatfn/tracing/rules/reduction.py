"""Rules for operators that combine elements along some dimensions: pooling, means, resizing."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from hatfn.tracing.labels import agree, filled
from hatfn.tracing.nodes import operator_name, shape_of
from hatfn.tracing.rules.combination import are_parameters, combine, dropped
from hatfn.tracing.rules.elementwise import pointwise
from hatfn.tracing.rules.registry import registrar
from hatfn.tracing.tracer import Result, Rule, Tracer, Value
from hatfn.wiring import OPEN

RULES: dict[str, Rule] = {}
rule = registrar(RULES)


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices",
    "max_pool1d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "lp_pool2d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d",
    "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa", "_upsample_nearest_exact2d",
)  # fmt: skip
def window(t: Tracer, node: Node, x: Value, *_: Any, **__: Any) -> Tensor:
    """Each result is a mean, maximum or weighted sum over places of one channel.

    A channel keeps the unit that zeroes it at every place. The padding that pooling adds itself
    does not count: a mean counts zeros, a maximum ignores what is outside.
    """
    return t.combined(x, tuple(range(-_spatial(node), 0))).expand(shape_of(node))


def _spatial(node: Node) -> int:
    """How many of the last dimensions the operator works on: the digit in its name."""
    return int(next(char for char in reversed(str(node.target)) if char.isdigit()))


@rule("im2col")
def unfold(t: Tracer, node: Node, x: Value, *args: Any) -> Tensor:
    """Patches laid out as columns: each channel as often as the window has places."""
    label = agree(t.roots(x), (-2, -1))
    label = label.expand(*label.shape[:-3], *x.shape[-3:-2], 1, 1)
    places = shape_of(node)[-2] // x.shape[-3]
    return label[..., 0].repeat_interleave(places, -2).expand(shape_of(node))


@rule("col2im")
def fold(t: Tracer, node: Node, x: Value, *args: Any) -> Tensor:
    """Columns summed back into an image: a channel is zero where all its rows are."""
    shape = shape_of(node)
    rows = agree(t.roots(x), (-1,)).unflatten(-2, (shape[-3], -1))
    return agree(rows, (-2,)).reshape(*rows.shape[:-3], shape[-3], 1, 1).expand(shape)


PATHS = 8
"""The most slices whose sum is taken for a sum of paths."""


@rule("mean", "sum", "amax", "amin", "nansum", "linalg_vector_norm", "norm")
def reduce(t: Tracer, node: Node, x: Value, *args: Any, **kwargs: Any) -> Result:
    """Reductions that take zeros to zero keep the unit that zeroes all they reduce.

    The sum of a few paths laid side by side (selective kernels, split attention) merges their units,
    as in a residual stream. What is reduced of a parameter gets one gate together. The sum of a product
    of two parameters is a weight.
    """
    shape = shape_of(node)
    dims = next((arg for arg in args if isinstance(arg, list | tuple)), kwargs.get("dim"))
    dims = (dims,) if isinstance(dims, int) else dims
    dims = tuple(dim % x.label.dim() for dim in dims) if dims else tuple(range(x.label.dim()))
    sums = operator_name(node) in ("sum", "mean")
    factors = t.products.get(node.all_input_nodes[0]) if sums else None
    if factors is not None:
        spread = [(v, t.label(v)[(None,) * (x.label.dim() - v.label.dim())]) for v in factors]
        made = combine(t, node, spread[0], spread[1], dims)
        if made is not None:
            return dropped(made, shape)
    label = t.roots(x)
    whole = are_parameters(x) and operator_name(node) == "sum" and 0 not in x.shape
    together = t.together(t.label(x), dims) if whole else None
    if together is not None:
        reduced = together
    elif len(dims) == 1 and 1 < x.shape[dims[0]] <= PATHS:
        reduced = _sum_of_paths(t, label, dims[0])
    else:
        reduced = agree(label, dims)
    if len(shape) == label.dim():
        return reduced.expand(shape)
    index = tuple(0 if d in dims else slice(None) for d in range(label.dim()))
    return reduced[index].expand(shape)


@rule("max", "min")
def extreme(t: Tracer, node: Node, x: Value, *args: Any, **kwargs: Any) -> Tensor:
    """The largest element along a dimension, or of two values, as a residual sum."""
    if any(isinstance(arg, Value) for arg in (*args, *kwargs.values())):
        return pointwise(t, node, x, *args, **kwargs)
    dims = [[arg] if isinstance(arg, int) else arg for arg in args[:1]]
    result: Tensor = reduce(t, node, x, *dims)  # type: ignore[assignment]
    return result


@rule("var", "std", "var_mean", "std_mean")
def deviation(t: Tracer, node: Node, x: Value, *args: Any, **kwargs: Any) -> Result:
    """The deviation of zeros is zero, and so is their mean."""
    result = reduce(t, node, x, *args, **kwargs)
    return (result, result) if "_mean" in operator_name(node) else result  # type: ignore[return-value]


@rule("prod")
def product(t: Tracer, node: Node, x: Value, dim: int | None = None, *_: Any, **__: Any) -> Result:
    """The product of zeros is zero; of a dimension that has none, it is one."""
    empty = 0 in x.shape
    return filled(shape_of(node), OPEN) if empty else reduce(t, node, x, [] if dim is None else [dim])


@rule("cumsum", "cumprod", "cummax", "cummin", "sort", "topk", "kthvalue", "median")
def along(t: Tracer, node: Node, x: Value, *args: Any, dim: int = -1, **__: Any) -> Tensor:
    """Each result is made of, or chosen from, the elements along one dimension.

    It keeps the unit that zeroes all of them.
    """
    name = operator_name(node)
    given = args[1:2] if name in ("topk", "kthvalue") else args[:1]
    label = t.roots(x)
    dims = tuple(range(label.dim()))
    if name != "median" or given or "dim" in str(node.target):
        dims = (int(given[0]) if given and not isinstance(given[0], bool) else dim,)
    agreed = agree(label, dims)
    shape = shape_of(node)
    if len(shape) < label.dim():  # a choice of one, not kept
        agreed = agreed.squeeze(dims)
    return agreed.expand(shape)


@rule("_fft_c2c", "_fft_r2c", "_fft_c2r")
def spectrum(t: Tracer, node: Node, x: Value, dims: list[int], *_: Any) -> Tensor:
    """Each result is a sum of all elements along some dimensions."""
    return agree(t.roots(x), tuple(dims)).expand(shape_of(node))


@rule("view_as_real")
def as_pairs(t: Tracer, node: Node, x: Value) -> Tensor:
    """Two numbers for each complex one."""
    return t.label(x)[..., None].expand(shape_of(node))


@rule("view_as_complex")
def as_complex(t: Tracer, node: Node, x: Value) -> Tensor:
    """A complex number is zero where both of its parts are."""
    return agree(t.roots(x), (-1,))[..., 0].expand(shape_of(node))


@rule("renorm")
def renorm(t: Tracer, node: Node, x: Value, *_: Any) -> Tensor:
    """Rows that are longer than a number are made as long as it; zeros stay zeros."""
    return t.label(x)


@rule("mv", "dot", "vdot")
def number(t: Tracer, node: Node, *_: Value) -> Tensor:
    """Products with vectors, as in a spectral norm: no unit is looked for in them."""
    return filled(shape_of(node), OPEN)


def _sum_of_paths(t: Tracer, label: Tensor, dim: int) -> Tensor:
    agreed = agree(label, (dim,))
    first, *others = (label.narrow(dim, i, 1) for i in range(label.shape[dim]))
    if bool((agreed != OPEN).any()) or any(t.unions.width(path) < 2 for path in (first, *others)):
        return agreed
    for other in others:
        merged = t.merge(first, other)
        if merged is None:
            return agreed
        first = merged
    return first
