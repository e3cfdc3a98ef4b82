"""Rules for data movement: the operator itself, run on the labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from hatfn.tracing.labels import ZERO, agree, shrink
from hatfn.tracing.nodes import operator_name, shape_of
from hatfn.tracing.rules.registry import registrar
from hatfn.tracing.tracer import Result, Rule, Tracer, Value
from hatfn.wiring import OPEN

RULES: dict[str, Rule] = {}
rule = registrar(RULES)


@rule(
    "permute", "transpose", "t", "numpy_T", "mT", "expand", "expand_as", "squeeze", "unsqueeze",
    "select", "slice", "narrow", "split", "split_with_sizes", "chunk", "unbind", "unflatten", "flatten",
    "roll", "flip", "repeat", "repeat_interleave", "movedim", "swapaxes", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "diagonal", "unfold", "index",
    "index_select", "gather", "stack", "tile",
)  # fmt: skip
def move(t: Tracer, node: Node, *args: Any, **kwargs: Any) -> Result:
    """Operators that place elements without changing them, run on labels instead of numbers.

    Indices keep their numbers; an index that depends on the input can choose any element along its
    dimension.
    """
    moved, *rest = args
    if any(_is_computed(leaf) for leaf in pytree.tree_leaves(rest)):
        masked = any(i is not None and i.meta["val"].dtype == torch.bool for i in _indices(node))
        if operator_name(node) in ("index", "index_select", "gather") and not masked:
            return _chosen(t, node, moved, *rest)
        if node.target is not torch.ops.aten.expand_as.default:
            return _anywhere(t, node, moved)
        rest = [arg.label if isinstance(arg, Value) else arg for arg in rest]

    def label(arg: Any) -> Any:
        return t.label(arg) if isinstance(arg, Value) else arg

    def number(arg: Any) -> Any:
        return arg.data if isinstance(arg, Value) else arg

    result = node.target(  # type: ignore[operator]
        pytree.tree_map(label, moved), *pytree.tree_map(number, rest), **kwargs
    )
    return result if isinstance(result, Tensor) else tuple(result)


def _indices(node: Node) -> list[Node | None]:
    """What elements are chosen by, each along a dimension of its own."""
    return node.args[1] if operator_name(node) == "index" else []  # type: ignore[return-value]


def _is_computed(index: Any) -> bool:
    """Whether the numbers of an index depend on the input."""
    return isinstance(index, Value) and index.data is None


def _chosen(t: Tracer, node: Node, x: Value, *place: Any) -> Tensor:
    """The label of a choice along some dimensions, as of the nodes at the ends of edges.

    It keeps the unit that zeroes all that lies along them.
    """
    shape, label = shape_of(node), t.roots(x)
    if operator_name(node) == "index":
        indices: list[Value | None] = place[0]
        label = agree(label, tuple(d for d, index in enumerate(indices) if index is not None))
        dims = max(index.label.dim() for index in indices if index is not None)
        first = torch.zeros((1,) * dims, dtype=torch.long)
        chosen = [None if index is None else first for index in indices]
        return torch.ops.aten.index(label, chosen).expand(shape)  # type: ignore[no-any-return]
    dim, index = place[:2]
    label = agree(label, (dim,))
    if index.label.dim() == label.dim():  # gather may leave out the last elements of other dimensions
        sizes = [min(known, wanted) for known, wanted in zip(label.shape, shape, strict=True)]
        label = label[tuple(slice(size) for size in sizes)]
    return label.expand(shape)


def _anywhere(t: Tracer, node: Node, moved: Value) -> Tensor:
    """The label of a choice among all elements of one value."""
    entries = shrink(t.roots(moved)).unique()
    return entries.expand(shape_of(node)) if len(entries) == 1 else _open(node)


def _open(node: Node) -> Tensor:
    return torch.full((), OPEN).expand(shape_of(node))


@rule("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "_reshape_alias")
def reshape(t: Tracer, node: Node, x: Value, *_: Any) -> Tensor:
    """An expanded label often has no view of the new shape, hence reshape."""
    return t.label(x).reshape(shape_of(node))


@rule(
    "alias", "clone", "contiguous", "detach", "to", "_to_copy", "type_as", "dropout", "feature_dropout",
    "alpha_dropout", "lift_fresh_copy", "lift_fresh", "native_dropout",
)  # fmt: skip
def same(t: Tracer, node: Node, x: Value, *_: Any, **__: Any) -> Tensor:
    """The same elements, elsewhere or in another type; a dropped element is zero."""
    return t.label(x)


@rule("copy")
def copy(t: Tracer, node: Node, onto: Value, x: Value, *_: Any) -> Tensor:
    """What is copied, whatever was there."""
    return t.label(x).expand(shape_of(node))


@rule("slice_scatter", "select_scatter", "diagonal_scatter")
def scatter(t: Tracer, node: Node, x: Value, part: Value, *place: Any, **kwargs: Any) -> Tensor:
    """One value written into a part of another."""
    result: Tensor = node.target(t.label(x), t.label(part), *place, **kwargs)  # type: ignore[operator]
    return result


@rule(
    "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "empty_like", "zero",
    "fill",
)  # fmt: skip
def constant(t: Tracer, node: Node, x: Value, *args: Any, **__: Any) -> Tensor:
    """Numbers that no unit has a part in."""
    name = operator_name(node)
    value = args[-1] if "full" in name or name == "fill" else float("zero" not in name)
    value = value.data if isinstance(value, Value) else value  # None: a number from the input
    return torch.full((), ZERO if value is not None and value == 0 else OPEN).expand(shape_of(node))


@rule("cat", "concat")
def cat(t: Tracer, node: Node, tensors: list[Value], dim: int = 0) -> Tensor:
    """Concatenation; dimensions along which no operand varies stay expanded."""
    shape = shape_of(node)
    labels = [t.label(value) for value in tensors if value.label.dim() == len(shape)]
    dim = dim % len(shape)
    for other in range(len(shape)):
        if other != dim and all(label.stride(other) == 0 for label in labels):
            labels = [label.narrow(other, 0, min(1, label.shape[other])) for label in labels]
    return torch.cat(labels, dim).expand(shape)


@rule("pad", "constant_pad_nd")
def pad(t: Tracer, node: Node, x: Value, pad: list[int], *mode: Any, **kwargs: Any) -> Tensor:
    """Padding with zeros adds elements that are always zero; other modes repeat elements.

    What is padded with -inf only to be pooled by a maximum is never seen.
    """
    label = t.label(x)
    if "constant_pad_nd" in str(node.target):
        kind, value = "constant", (*mode, 0)[0]
    else:
        kind, value = (*mode, "constant")[0], (*mode, "constant", None)[1]
    if kind == "constant":
        pooled = value == -torch.inf and all("max_pool" in str(user.target) for user in node.users)
        edge = ZERO if not value or pooled else OPEN
        return torch.nn.functional.pad(label, pad, value=edge)
    # Reflection and its kin are defined for floats; 53 bits hold any label.
    return torch.nn.functional.pad(label.double(), pad, mode=kind).long()
