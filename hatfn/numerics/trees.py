"""Trees of tensors: read and write the slices of tasks, and call a function on all groups at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any
"""Any nesting of dicts, lists and tuples with tensors at the leaves."""


def tree_map(function: Callable[..., Tensor], *trees: Tree) -> Any:
    """Call ``function`` on the leaves of trees that have the same structure.

    Do not pass optree's lists of leaves to torch's own pytrees: only optree sorts the keys of a dict.
    """
    return optree.tree_map(function, *trees)


class Structure(NamedTuple):
    """The structure of a tree, from which :func:`unflatten` builds the tree again.

    Attributes:
        outer: optree's structure.
        inner: {index of a leaf of ``outer``: structure of PyTorch's pytree}, for containers that only
            PyTorch's pytree knows.
        static: {index among all leaves: value}, the leaves that are not tensors, such as None.
    """

    outer: Any
    inner: dict[int, pytree.TreeSpec]
    static: dict[int, Any]


def flatten(tree: Tree) -> tuple[list[Tensor], Structure]:
    """The tensors and the structure of a tree, which may be any output of a module.

    optree treats a container that it does not know, such as a ModelOutput, as a leaf. PyTorch's pytree
    then opens it.
    """
    leaves: list[Any]
    leaves, outer = optree.tree_flatten(tree)
    if all(isinstance(leaf, Tensor) for leaf in leaves):
        return leaves, Structure(outer, {}, {})
    parts = [pytree.tree_flatten(leaf) for leaf in leaves]
    inner = {i: spec for i, (_, spec) in enumerate(parts) if not spec.is_leaf()}
    every = [leaf for part, _ in parts for leaf in part]
    static = {i: leaf for i, leaf in enumerate(every) if not isinstance(leaf, Tensor)}
    return [leaf for leaf in every if isinstance(leaf, Tensor)], Structure(outer, inner, static)


def unflatten(structure: Structure, tensors: Sequence[Any]) -> Any:
    """Build the tree again, from its structure and tensors; see :func:`flatten`."""
    outer, inner, static = structure
    if not inner and not static:
        return optree.tree_unflatten(outer, tensors)
    remaining, sizes = (
        iter(tensors),
        [inner[i].num_leaves if i in inner else 1 for i in range(outer.num_leaves)],
    )
    every = iter([static[i] if i in static else next(remaining) for i in range(sum(sizes))])
    whole = []
    for i, size in enumerate(sizes):
        part = [next(every) for _ in range(size)]
        whole.append(pytree.tree_unflatten(part, inner[i]) if i in inner else part[0])
    return optree.tree_unflatten(outer, whole)


def map_output(function: Callable[..., Any], *outputs: Any) -> Any:
    """Call ``function`` on the tensors of module outputs that have the same structure."""
    leaves, structure = flatten(outputs[0])
    others = [flatten(other)[0] for other in outputs[1:]]
    return unflatten(structure, [function(*parts) for parts in zip(leaves, *others, strict=True)])


def output_leaves(output: Any) -> list[Tensor]:
    """The tensors of a module's output, in order."""
    return flatten(output)[0]


def unstack(tree: Tree, count: int) -> list[Any]:
    """The ``count`` trees that were stacked along the first axis of every leaf."""
    return [tree_map(lambda leaf, i=i: leaf[i], tree) for i in range(count)]


def take(tree: dict[str, Tensor], task: int) -> dict[str, Tensor]:
    """The slice of one task, from a tree whose leaves have T as first axis."""
    return {name: leaf[task] for name, leaf in tree.items()}


def take_rows(tree: Mapping[str, Tensor], rows: Sequence[int], lead: int = 0) -> dict[str, Tensor]:
    """The slices of K tasks, (K, ...), from a tree whose leaves have T as first axis.

    Args:
        tree: {name: (T, ...)}, or stacked, (S, T, ...).
        rows: the tasks.
        lead: number of axes in front of the one that counts tasks.
    """
    if len(rows) == 1:  # a view
        return {name: leaf.narrow(lead, rows[0], 1) for name, leaf in tree.items()}
    return {
        name: torch.stack([leaf.select(lead, row) for row in rows], lead) for name, leaf in tree.items()
    }


def put_rows(
    tree: Mapping[str, Tensor], values: Mapping[str, Tensor], rows: Sequence[int], lead: int = 0
) -> dict[str, Tensor]:
    """A copy of the tree with ``values`` as the slices of some tasks; see :func:`take_rows`."""

    def written(leaf: Tensor, new: Tensor) -> Tensor:
        if len(rows) == 1:
            return leaf.select_scatter(new.select(lead, 0), lead, rows[0])
        parts = dict(zip(rows, new.unbind(lead), strict=True))
        old = leaf.unbind(lead)
        return torch.stack([parts.get(task, one) for task, one in enumerate(old)], lead)

    return {name: written(leaf, values[name]) for name, leaf in tree.items()}


def put(tree: Mapping[str, Tensor], task: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the tree with ``values`` as the slice of one task."""
    return {name: leaf.select_scatter(values[name], 0, task) for name, leaf in tree.items()}


def over_groups(function: Callable[..., Tensor], *trees: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Apply a function to the tensors of all groups in one call.

    Args:
        function: takes tensors (..., units of all groups) and treats every unit by itself.
        trees: {group: (..., U)}, all of the same structure.

    Returns:
        {group: (..., U)}
    """
    groups = list(trees[0])
    if not groups:
        return {}
    sizes = [trees[0][group].shape[-1] for group in groups]
    whole = function(*(torch.cat([tree[group] for group in groups], -1) for tree in trees))
    return dict(zip(groups, whole.split(sizes, -1), strict=True))
