"""Rules for operators that combine elements along some dimensions: pooling, means, resizing."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from hatfn.tracing.labels import agree
from hatfn.tracing.nodes import shape_of
from hatfn.tracing.rules.elementwise import pointwise
from hatfn.tracing.rules.registry import registrar
from hatfn.tracing.tracer import Rule, Tracer, Value
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
def reduce(t: Tracer, node: Node, x: Value, *args: Any, **kwargs: Any) -> Tensor:
    """Reductions that take zeros to zero keep the unit that zeroes all they reduce.

    The sum of a few paths laid side by side (selective kernels, split attention) merges their units,
    as in a residual stream.
    """
    label = t.roots(x)
    shape = shape_of(node)
    dims = next((arg for arg in args if isinstance(arg, list | tuple)), kwargs.get("dim"))
    dims = tuple(dim % label.dim() for dim in dims) if dims else tuple(range(label.dim()))
    if len(dims) == 1 and 1 < x.shape[dims[0]] <= PATHS:
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
    return reduce(t, node, x, *dims)


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
