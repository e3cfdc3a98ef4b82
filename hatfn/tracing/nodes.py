"""What a node of a graph says of itself: its operator, shape, place, and what it makes of zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree


def operator_name(node: Node) -> str:
    """The name of an ATen operator without its overload; empty for anything else."""
    schema = getattr(node.target, "_schema", None)
    namespace, _, name = (schema.name if schema else "").partition("::")
    return name if namespace == "aten" else ""


class UnreadableError(Exception):
    """The graph computes something from a tensor that labels cannot follow."""


def unreadable(node: Node, what: str) -> UnreadableError:
    """The error that names an operator and its place."""
    return UnreadableError(f"{node.target} in {place_of(node) or 'the module'} {what}")


def shape_of(node: Node) -> torch.Size:
    """The shape of a node's (first) output."""
    value = node.meta["val"]
    first = value[0] if isinstance(value, tuple | list) else value
    if not isinstance(first, Tensor) or not all(isinstance(size, int) for size in first.shape):
        raise unreadable(node, "takes a number or a shape from a tensor")
    return first.shape


def place_of(node: Node) -> str:
    """The module a node belongs to, by its path; empty for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    path = [entry[0] for entry in stack.values()]
    return path[-1] if path else ""


def is_pointwise(node: Node) -> bool:
    """Whether PyTorch itself says that the operator works element by element, and by no chance."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def at_zero(node: Node) -> bool:
    """Whether the operator, with its actual constants, takes zeros to zero.

    Every tensor operand is replaced by a zero, of either sign, and the operator is run:
    ``hardtanh(1, 6)``, ``x + 1`` and ``signbit`` do not keep zero, ``gelu`` and ``x * 2`` do.
    """
    operands = list(dict.fromkeys(pytree.tree_leaves((node.args, node.kwargs))))
    operands = [leaf for leaf in operands if isinstance(leaf, Node)]

    def zero(operand: Node) -> Any:
        value = operand.meta["val"]
        if not isinstance(value, Tensor):
            return value
        both = torch.tensor([0.0, -0.0]).to(value.dtype)  # each operand along a dimension of its own
        return both.reshape([2 if other is operand else 1 for other in operands])

    args, kwargs = pytree.tree_map_only(Node, zero, (node.args, node.kwargs))
    result = node.target(*args, **kwargs)  # type: ignore[operator]
    return isinstance(result, Tensor) and bool((result == 0).all())
