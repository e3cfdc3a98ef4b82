"""The whole state of a continual learner: one immutable tree of tensors."""

from __future__ import annotations

from collections.abc import Callable
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
        hyper: {name: ()}: "lr" (a factor), "sparsity", "s_max", "compensation"; numbers as data, so
            that replicas can differ.
        seed: () int64, what the initial values were drawn from.
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
    opt_state: Tree


class Trainable(NamedTuple):
    """What one step of one task trains: the shared weights and the task's own slice.

    Attributes:
        params: {name: tensor}, shared.
        task_params: {name: tensor}, this task's.
        embeddings: {group: (U,)}, this task's.
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


def put(tree: dict[str, Tensor], task: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the tree in which one task's slice is ``values``."""
    return {name: leaf.select_scatter(values[name], 0, task) for name, leaf in tree.items()}


def trainable(state: HATState, task: int) -> Trainable:
    """What a step of ``task`` trains."""
    return Trainable(state.params, take(state.task_params, task), take(state.embeddings, task))


def binary_gates(state: HATState) -> dict[str, Tensor]:
    """{group: (T, U)} bool: the masks of learned tasks, and what the others' embeddings would give."""
    learned = state.learned[:, None]
    return {g: torch.where(learned, state.masks[g], hard_gate(e)) for g, e in state.embeddings.items()}
