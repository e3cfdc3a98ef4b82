"""The whole state of a continual learner: one immutable tree of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from hatfn.gates import hard_gate

Tree = Any
"""Any nesting of dicts, lists and tuples with tensors at the leaves."""


class HATState(NamedTuple):
    """Everything that learning changes. Every leaf is a tensor; nothing is ever changed in place.

    T tasks, U units of a group. One task is ``leaf[t]`` of the leaves that lead with T, every task at
    once is ``vmap`` over them, and many seeds are one more axis in front of every leaf.

    Attributes:
        params: {name: tensor}, the weights that all tasks share.
        task_params: {name: (T, ...)}: norms, heads and whatever else cannot be gated.
        task_buffers: {name: (T, ...)}: running statistics.
        embeddings: {group: (T, U)}, task embeddings e.
        masks: {group: (T, U)} bool, the binary gates of learned tasks; False elsewhere.
        learned: (T,) bool, consolidated tasks.
        locked: (T,) bool, the tasks that ``protection`` keeps unchanged.
        active: (T,) bool, the task that ``begin`` opened; ``update`` writes to no other.
        protection: {name: tensor shaped like the weight}: bool, or in [0, 1] for soft rules.
        hyper: {name: ()}: "lr" (a factor), "s_max", "compensation", and {name: (T,)}: "sparsity" and
            "quota", one for each task; numbers as data, so that replicas can differ.
        seed: () int64, what the initial values were drawn from.
        fresh: () bool, whether the weights were drawn from it as well, or came with the module.
        opt_state: the optimiser's, for {params, this task's parameters, this task's embeddings}.
    """

    params: dict[str, Tensor]
    task_params: dict[str, Tensor]
    task_buffers: dict[str, Tensor]
    embeddings: dict[str, Tensor]
    masks: dict[str, Tensor]
    learned: Tensor
    locked: Tensor
    active: Tensor
    protection: dict[str, Tensor]
    hyper: dict[str, Tensor]
    seed: Tensor
    fresh: Tensor
    opt_state: Tree


class Trainable(NamedTuple):
    """What one step trains: the shared weights and the slices of the K tasks that are open.

    Attributes:
        params: {name: tensor}, shared.
        task_params: {name: (K, ...)}.
        embeddings: {group: (K, U)}.
    """

    params: dict[str, Tensor]
    task_params: dict[str, Tensor]
    embeddings: dict[str, Tensor]


def tree_map(function: Callable[..., Tensor], *trees: Tree) -> Any:
    """``function`` over the leaves of trees of one structure.

    Leaf lists never go from here to torch's own trees: optree sorts the keys of a dict, torch does not.
    """
    return optree.tree_map(function, *trees)


def take(tree: dict[str, Tensor], task: int) -> dict[str, Tensor]:
    """The slice of one task out of a tree whose leaves lead with T."""
    return {name: leaf[task] for name, leaf in tree.items()}


def take_rows(tree: Mapping[str, Tensor], rows: Sequence[int], axis: int = 0) -> dict[str, Tensor]:
    """The slices of some tasks, (K, ...), out of a tree whose leaves lead with T.

    Args:
        tree: {name: (T, ...)}, or stacked, (S, T, ...).
        rows: the tasks.
        axis: that counts tasks.
    """
    if len(rows) == 1:  # a view
        return {name: leaf.narrow(axis, rows[0], 1) for name, leaf in tree.items()}
    return {
        name: torch.stack([leaf.select(axis, row) for row in rows], axis) for name, leaf in tree.items()
    }


def put_rows(
    tree: Mapping[str, Tensor], values: Mapping[str, Tensor], rows: Sequence[int], axis: int = 0
) -> dict[str, Tensor]:
    """A copy of the tree in which the slices of some tasks are ``values``; see :func:`take_rows`."""

    def written(leaf: Tensor, new: Tensor) -> Tensor:
        if len(rows) == 1:
            return leaf.select_scatter(new.select(axis, 0), axis, rows[0])
        parts = dict(zip(rows, new.unbind(axis), strict=True))
        old = leaf.unbind(axis)
        return torch.stack([parts.get(task, one) for task, one in enumerate(old)], axis)

    return {name: written(leaf, values[name]) for name, leaf in tree.items()}


def put(tree: Mapping[str, Tensor], task: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the tree in which one task's slice is ``values``."""
    return {name: leaf.select_scatter(values[name], 0, task) for name, leaf in tree.items()}


def trainable(state: HATState, rows: Sequence[int], axis: int = 0) -> Trainable:
    """What a step of some tasks trains; arguments as in :func:`take_rows`."""
    own, embeddings = (take_rows(t, rows, axis) for t in (state.task_params, state.embeddings))
    return Trainable(state.params, own, embeddings)


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


def binary_gates(state: HATState) -> dict[str, Tensor]:
    """{group: (T, U)} bool: the masks of learned tasks, and what the others' embeddings would give.

    Of stacked states (S, T, U).
    """
    learned = state.learned[..., None]
    return over_groups(
        lambda mask, e: (learned & mask) | (~learned & hard_gate(e)), state.masks, state.embeddings
    )
