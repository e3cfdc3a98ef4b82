"""Properties of a node of a graph: its operator, its shape, its module, and whether it keeps zeros."""

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
    """The graph reads numbers out of a tensor, so labels cannot follow it."""


def unreadable(node: Node, what: str) -> UnreadableError:
    """An error with the operator, its module and what it does."""
    return UnreadableError(f"{node.target} in {place_of(node) or 'the module'} {what}")


def shape_of(node: Node) -> torch.Size:
    """The shape of a node's (first) output."""
    value = node.meta["val"]
    first = value[0] if isinstance(value, tuple | list) else value
    if not isinstance(first, Tensor) or not all(isinstance(size, int) for size in first.shape):
        raise unreadable(node, "takes a number or a shape from a tensor")
    return first.shape


def place_of(node: Node) -> str:
    """The path of the module that a node belongs to; empty for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    path = [entry[0] for entry in stack.values()]
    return path[-1] if path else ""


def is_pointwise(node: Node) -> bool:
    """Whether PyTorch tags the operator as elementwise, and not as random."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def at_zero(node: Node) -> bool:
    """Whether the operator, with its actual constants, maps zeros to zero.

    The operator is run with each tensor operand replaced by 0.0 and by -0.0. ``gelu`` and ``x * 2`` map
    zeros to zero; ``hardtanh(1, 6)``, ``x + 1`` and ``signbit`` do not.
    """
    operands = list(dict.fromkeys(pytree.tree_leaves((node.args, node.kwargs))))
    operands = [leaf for leaf in operands if isinstance(leaf, Node)]

    def zero(operand: Node) -> Any:
        value = operand.meta["val"]
        if not isinstance(value, Tensor):
            return value
        both = torch.tensor([0.0, -0.0]).to(value.dtype)
        # Each operand varies along its own dimension, so that all combinations of signs are run.
        return both.reshape([2 if other is operand else 1 for other in operands])

    args, kwargs = pytree.tree_map_only(Node, zero, (node.args, node.kwargs))
    result = node.target(*args, **kwargs)  # type: ignore[operator]
    return isinstance(result, Tensor) and bool((result == 0).all())
