"""Trees of tensors: read and write the slices of tasks, and call a function on all groups at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

Tree = Any
"""Any nesting of dicts, lists and tuples with tensors at the leaves."""


def tree_map(function: Callable[..., Tensor], *trees: Tree) -> Any:
    """Call ``function`` on the leaves of trees that have the same structure.

    Do not pass optree's lists of leaves to torch's own pytrees: only optree sorts the keys of a dict.
    """
    return optree.tree_map(function, *trees)


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
