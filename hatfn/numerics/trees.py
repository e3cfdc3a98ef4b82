"""Trees of tensors: taking and putting the slices of tasks, and functions over all groups at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

Tree = Any
"""Any nesting of dicts, lists and tuples with tensors at the leaves."""


def tree_map(function: Callable[..., Tensor], *trees: Tree) -> Any:
    """``function`` over the leaves of trees of one structure.

    Leaf lists never go from here to torch's own trees: optree sorts the keys of a dict, torch does not.
    """
    return optree.tree_map(function, *trees)


def unstack(tree: Tree, count: int) -> list[Any]:
    """The trees that were stacked to one whose leaves lead with an axis over them."""
    return [tree_map(lambda leaf, i=i: leaf[i], tree) for i in range(count)]


def take(tree: dict[str, Tensor], task: int) -> dict[str, Tensor]:
    """The slice of one task out of a tree whose leaves lead with T."""
    return {name: leaf[task] for name, leaf in tree.items()}


def take_rows(tree: Mapping[str, Tensor], rows: Sequence[int], lead: int = 0) -> dict[str, Tensor]:
    """The slices of some tasks, (K, ...), out of a tree whose leaves lead with T.

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
    """A copy of the tree in which the slices of some tasks are ``values``; see :func:`take_rows`."""

    def written(leaf: Tensor, new: Tensor) -> Tensor:
        if len(rows) == 1:
            return leaf.select_scatter(new.select(lead, 0), lead, rows[0])
        parts = dict(zip(rows, new.unbind(lead), strict=True))
        old = leaf.unbind(lead)
        return torch.stack([parts.get(task, one) for task, one in enumerate(old)], lead)

    return {name: written(leaf, values[name]) for name, leaf in tree.items()}


def put(tree: Mapping[str, Tensor], task: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the tree in which one task's slice is ``values``."""
    return {name: leaf.select_scatter(values[name], 0, task) for name, leaf in tree.items()}


def over_groups(function: Callable[..., Tensor], *trees: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``function``, elementwise along units, of every group in one call.

    Args:
        function: of tensors (..., units of all groups).
        trees: {group: (..., U)}, of one structure.

    Returns:
        {group: (..., U)}
    """
    groups = list(trees[0])
    if not groups:
        return {}
    sizes = [trees[0][group].shape[-1] for group in groups]
    whole = function(*(torch.cat([tree[group] for group in groups], -1) for tree in trees))
    return dict(zip(groups, whole.split(sizes, -1), strict=True))
