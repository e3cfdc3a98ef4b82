"""Measures of continual learning, as papers report them, from an accuracy matrix or a state."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hatfn.evaluation.usage import free_weights, memory, overlap, usage

__all__ = [
    "accuracy",
    "average_accuracy",
    "backward_transfer",
    "drift",
    "forgetting",
    "forgetting_ratio",
    "forward_transfer",
    "free_weights",
    "memory",
    "overlap",
    "usage",
]

Matrix = Float[np.ndarray, "T T"]
"""Row i: after task i; column j: accuracy on task j, in [0, 1]; NaN where j was not yet learned."""


def accuracy(logits: Float[Tensor, "*batch C"], labels: Int64[Tensor, "*batch"]) -> float:
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
    """BWT: how later tasks change earlier ones, the mean of R[-1, j] - R[j, j]; 0 for one task.

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
    """FWT: how earlier tasks help later ones, the mean of R[j, j] - reference[j] over j >= 1.

    The source measures the accuracy on a task before it is trained. That says nothing here, because
    every task has a new head. So the accuracy of the learned task is used, and compared with that of a
    network that learns the task from scratch.

    Args:
        matrix: R.
        reference: accuracy on each task of a network that learns only this task (``hatfn run --method
            isolated``).

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
        accuracies: A, the accuracy on each task learned so far, after the last one.
        chance: A_R, the accuracy of a classifier that guesses in proportion to the classes.
        joint: A_J, the accuracy of a network that is trained on all of these tasks together.

    Example:
        >>> forgetting_ratio(np.array([0.75, 1.0]), np.array([0.5, 0.5]), np.array([1.0, 1.0]))
        -0.25

    Source:
        Serrà et al. 2018, equation 6.
    """
    for name, other in (("chance", chance), ("joint", joint)):
        _check_shape("forgetting_ratio", name, other, accuracies.shape)
    return float(np.mean((accuracies - chance) / (joint - chance) - 1))


def drift(before: Tensor, after: Tensor) -> float:
    """The largest change of any logit; 0.0 exactly if none changed.

    Args:
        before: logits of a task when it was learned.
        after: its logits on the same inputs now.
    """
    _check_shape("drift", "after", after, before.shape)
    return (after - before).abs().max().item() if not torch.equal(before, after) else 0.0


def _check_shape(where: str, name: str, value: Tensor | np.ndarray, shape: tuple[int, ...]) -> None:
    """Refuse a shape that would broadcast to a number without meaning."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{where}: {name} has shape {tuple(value.shape)}. Expected {tuple(shape)}, to match the "
            f"first argument."
        )


def _check_square(where: str, matrix: np.ndarray) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(
            f"{where}: matrix has shape {matrix.shape}. Expected (T, T): a row after each task, a "
            f"column for each task."
        )
