"""Measures of continual learning: from an accuracy matrix and a state to the numbers of a paper."""

from __future__ import annotations

import numpy as np
import optree
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hatfn.checks import check_state
from hatfn.kinds import check_kind
from hatfn.locks import exact_protection
from hatfn.state import HATState
from hatfn.wiring import Wiring

Matrix = Float[np.ndarray, "T T"]
"""Row i: after task i; column j: accuracy on task j, in [0, 1]; NaN where j was not yet learned."""


def accuracy(logits: Float[Tensor, "B C"], labels: Tensor) -> float:
    """The share of samples whose largest logit is that of their label, in [0, 1]."""
    _check_shape("accuracy", "labels", labels, logits.shape[:-1])
    return (logits.argmax(-1) == labels).double().mean().item()


def average_accuracy(matrix: Matrix) -> float:
    """ACC: the mean accuracy on all tasks after the last.

    Example:
        >>> average_accuracy(np.array([[1.0, np.nan], [0.5, 0.75]]))
        0.625

    Source:
        Lopez-Paz and Ranzato 2017 (arXiv 1706.08840), equation 2.
    """
    _check_square("average_accuracy", matrix)
    return float(np.mean(matrix[-1]))


def backward_transfer(matrix: Matrix) -> float:
    """BWT: what learning later tasks did to earlier ones, mean of R[-1, j] - R[j, j]; 0 for one task.

    Source:
        Lopez-Paz and Ranzato 2017 (arXiv 1706.08840), equation 3.
    """
    _check_square("backward_transfer", matrix)
    change = (matrix[-1] - np.diag(matrix))[:-1]
    return float(change.mean()) if len(change) else 0.0


def forgetting(matrix: Matrix) -> float:
    """The mean loss of accuracy on earlier tasks since each was at its best, >= 0; 0 for one task.

    Source:
        Chaudhry et al. 2018 (arXiv 1801.10112), equations 3 and 4.
    """
    _check_square("forgetting", matrix)
    loss = (np.nanmax(matrix, axis=0) - matrix[-1])[:-1]
    return float(loss.mean()) if len(loss) else 0.0


def forward_transfer(matrix: Matrix, reference: Float[np.ndarray, " T"]) -> float:
    """FWT: what earlier tasks did for later ones, mean of R[j, j] - reference[j] over j >= 1.

    Heads are drawn anew for every task, so that an accuracy before any training, as the source has it,
    says nothing; the accuracy once the task is learned is compared instead, with that of learning it
    from scratch.

    Args:
        matrix: R.
        reference: accuracy on each task of a network of its own (``hatfn run --method isolated``).

    Source:
        After Lopez-Paz and Ranzato 2017 (arXiv 1706.08840), equation 4.
    """
    _check_square("forward_transfer", matrix)
    _check_shape("forward_transfer", "reference", reference, matrix.shape[:1])
    change = (np.diag(matrix) - reference)[1:]
    return float(change.mean()) if len(change) else 0.0


def forgetting_ratio(
    accuracies: Float[np.ndarray, " T"], chance: Float[np.ndarray, " T"], joint: Float[np.ndarray, " T"]
) -> float:
    """The mean over tasks of (A - A_R) / (A_J - A_R) - 1: about -1 at chance, 0 at joint training.

    Args:
        accuracies: A, of each task learned so far, after the last.
        chance: A_R, of a classifier that guesses in proportion to the classes.
        joint: A_J, of a network trained on all of these tasks together.

    Example:
        >>> forgetting_ratio(np.array([0.75, 1.0]), np.array([0.5, 0.5]), np.array([1.0, 1.0]))
        -0.25

    Source:
        Serrà et al. 2018, equation 6.
    """
    for name, other in (("chance", chance), ("joint", joint)):
        _check_shape("forgetting_ratio", name, other, accuracies.shape)
    return float(np.mean((accuracies - chance) / (joint - chance) - 1))


def usage(state: HATState, wiring: Wiring) -> pd.DataFrame:
    """How much of each group each learned task uses, and how much is free.

    Args:
        state: any state.
        wiring: of the learner.

    Returns:
        A row per group: a column per learned task with the share of its units that are on, "free" the
        share that no learned task uses, and "units", their number.
    """
    _check_owned("usage", state, wiring)
    tasks = state.learned.nonzero().flatten().tolist()
    rows = {}
    for group, units in wiring.groups.items():
        masks = state.masks[group]
        shares = {task: masks[task].double().mean().item() for task in tasks}
        free = 1 - masks.any(0).double().mean().item()
        rows[group] = {**shares, "free": free, "units": units}
    return pd.DataFrame.from_dict(rows, orient="index")


def overlap(state: HATState, wiring: Wiring) -> pd.DataFrame:
    """How many units of each group two learned tasks have in common: what later ones reuse.

    Args:
        state: any state.
        wiring: of the learner.

    Returns:
        A row for each (group, task), a column for each task, in units; where a task meets itself: all
        units that it uses. ``overlap(...).groupby("task").sum()`` is over all groups.

    Example:
        >>> import hatfn, torchopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> hat = hatfn.build(
        ...     net, wiring := hatfn.trace(net, torch.zeros(1, 4), head="2"), [2, 2], torchopt.sgd(0.1)
        ... )
        >>> overlap(hat.consolidate(hat.consolidate(hat.init(0), 0), 1), wiring).shape
        (2, 2)
    """
    _check_owned("overlap", state, wiring)
    tasks = state.learned.nonzero().flatten().tolist()
    rows: list[list[int]] = []
    for group in wiring.groups:
        on = state.masks[group][tasks].long()
        rows += (on @ on.T).tolist()
    index = pd.MultiIndex.from_product([[*wiring.groups], tasks], names=["group", "task"])
    return pd.DataFrame(rows, index=index, columns=tasks)


def memory(state: HATState) -> pd.Series[int]:
    """The bytes of each part of a state.

    One copy of the weights, one byte per shared weight for its (exact) protection, and T of everything
    that every task has for itself.

    Args:
        state: any state.

    Returns:
        Bytes of "params", "protection", "task_params", "task_buffers", "embeddings", "masks",
        "opt_state" and "rest" (numbers and flags); their sum is all that the state holds.
    """
    check_kind("memory", "state", state, HATState, "a HATState, or stacked ones")
    parts = {
        name: sum(leaf.numel() * leaf.element_size() for leaf in optree.tree_leaves(part))
        for name, part in state._asdict().items()
    }
    named = {name: parts.pop(name) for name in _PARTS}
    return pd.Series({**named, "rest": sum(parts.values())})


_PARTS = (
    "params", "protection", "task_params", "task_buffers", "embeddings", "masks", "opt_state",
)  # fmt: skip


def free_weights(state: HATState, wiring: Wiring) -> float:
    """The share of shared weight entries that no learned task depends on, in [0, 1]."""
    _check_owned("free_weights", state, wiring)
    held = exact_protection(wiring, state.masks, state.learned)
    total = sum(entries.numel() for entries in held.values())
    return 1 - sum(int(entries.sum()) for entries in held.values()) / max(total, 1)


def drift(before: Tensor, after: Tensor) -> float:
    """The largest change of any logit; 0.0 exactly if none changed.

    Args:
        before: logits of a task when it was learned.
        after: its logits on the same inputs now.
    """
    _check_shape("drift", "after", after, before.shape)
    return (after - before).abs().max().item() if not torch.equal(before, after) else 0.0


def _check_owned(where: str, state: HATState, wiring: Wiring) -> None:
    check_kind(where, "wiring", wiring, Wiring, "that of the learner: hat.wiring")
    check_state(where, state, wiring)


def _check_shape(where: str, name: str, value: Tensor | np.ndarray, shape: tuple[int, ...]) -> None:
    """What would broadcast, and give a number that means nothing."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{where}: {name} has shape {tuple(value.shape)}. Expected {tuple(shape)}, one for each."
        )


def _check_square(where: str, matrix: np.ndarray) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(
            f"{where}: matrix has shape {matrix.shape}. Expected (T, T): a row after each task, a "
            f"column for each task."
        )
