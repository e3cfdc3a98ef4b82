"""Rules for operators that combine elements along some dimensions: pooling, means, resizing."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from hatfn.tracing.labels import agree
from hatfn.tracing.registry import registrar
from hatfn.tracing.tracer import Rule, Tracer, Value, shape_of

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


@rule("mean", "sum", "amax", "amin", "nansum", "linalg_vector_norm", "norm")
def reduce(t: Tracer, node: Node, x: Value, *args: Any, **kwargs: Any) -> Tensor:
    """Reductions that take zeros to zero keep the unit that zeroes all they reduce."""
    label = t.roots(x)
    shape = shape_of(node)
    dims = next((arg for arg in args if isinstance(arg, list | tuple)), kwargs.get("dim"))
    dims = tuple(dims) if dims else tuple(range(label.dim()))
    reduced = agree(label, dims)
    if len(shape) == label.dim():
        return reduced.expand(shape)
    kept = [d for d in range(label.dim()) if d not in {dim % label.dim() for dim in dims}]
    index = tuple(slice(None) if d in kept else 0 for d in range(label.dim()))
    return reduced[index].expand(shape)
