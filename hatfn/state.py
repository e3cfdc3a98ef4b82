"""The whole state of a continual learner: one immutable tree of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import optree
from torch import Tensor

from hatfn.numerics.concrete import is_concrete
from hatfn.numerics.ownership import EMPTY
from hatfn.numerics.trees import Tree, take_rows


class HATState(NamedTuple):
    """Everything that learning changes. Every leaf is a tensor; nothing is ever changed in place.

    The one exception is a state that its owner hands over, with ``hat.update(..., donate=True)``: its
    leaves are empty afterwards, and every function refuses it.

    T is the number of tasks, U the number of units of a group. In leaves whose first axis is T,
    ``leaf[t]`` belongs to task t, and ``vmap`` over that axis computes all tasks at once. The stacked
    state of many seeds has one more axis in front of every leaf.

    Attributes:
        params: {name: tensor}, the weights that all tasks share.
        task_params: {name: (T, ...)}: norms, heads and other parameters that cannot be gated.
        task_buffers: {name: (T, ...)}: running statistics.
        embeddings: {group: (T, U)}, task embeddings e.
        masks: {group: (T, U)} bool, the binary gates of learned tasks; False elsewhere.
        learned: (T,) bool, the consolidated tasks.
        locked: (T,) bool, the tasks that ``protection`` protects.
        active: (T,) bool, the tasks that ``begin`` opened; ``update`` writes to no other.
        protection: {name: tensor shaped like the weight}: bool, or in [0, 1] for soft rules.
        used: {group: (U,)}, the cumulative mask: the units that the tasks of ``locked`` use: bool, or
            in [0, 1] for rules that read soft gates.
        hyper: {name: ()}: "lr" (a factor), "s_max", "compensation", and {name: (T,)}: "sparsity" and
            "quota", one for each task. They are tensors of the state so that replicas can differ.
        seed: () int64, the seed of the initial values.
        fresh: () bool, whether the weights were drawn from the seed; False: they came with the module.
        opt_state: the optimizer state, for the shared weights and for the parameters and embeddings of
            the open tasks.
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
    used: dict[str, Tensor]
    hyper: dict[str, Tensor]
    seed: Tensor
    fresh: Tensor
    opt_state: Tree

    def __repr__(self) -> str:
        """One line: the number of tasks, the learned and the open ones, the size."""
        if is_spent(self):
            return "HATState(spent: its memory was given away by donate=True)"
        if not is_concrete(self.learned):
            return f"HATState(inside a transform, learned {tuple(self.learned.shape)})"
        many = f"{len(self.learned)} replicas of " if self.learned.dim() > 1 else ""
        learned, opened = (
            flags.reshape(-1, *flags.shape[-1:]).any(0).nonzero().flatten().tolist()
            for flags in (self.learned, self.active)
        )
        tasks = self.learned.shape[-1]
        leaves: list[Tensor] = optree.tree_leaves(self)  # type: ignore[arg-type]
        size = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        return (
            f"HATState({many}{tasks} tasks, learned {learned}, open {opened}, {size / 1e6:.1f} MB on "
            f"{self.learned.device})"
        )


def is_spent(state: HATState) -> bool:
    """Whether the state was donated, so that its leaves are empty."""
    return EMPTY in (state.learned.shape, state.locked.shape, state.active.shape, state.seed.shape)


class Trainable(NamedTuple):
    """What one step trains: the shared weights and the slices of the K open tasks.

    Attributes:
        params: {name: tensor}, shared.
        task_params: {name: (K, ...)}.
        embeddings: {group: (K, U)}.
    """

    params: dict[str, Tensor]
    task_params: dict[str, Tensor]
    embeddings: dict[str, Tensor]


def trainable(state: HATState, rows: Sequence[int], lead: int = 0) -> Trainable:
    """What a step of the tasks ``rows`` trains; for ``lead`` see :func:`take_rows`."""
    task_params, embeddings = (take_rows(t, rows, lead) for t in (state.task_params, state.embeddings))
    return Trainable(state.params, task_params, embeddings)
