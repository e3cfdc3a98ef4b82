"""Accuracy on all tasks, with the task given and with the task inferred, in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from hatfn.checks.batches import Batch, check_batch
from hatfn.checks.calls import check_state
from hatfn.checks.values import check_count, check_learner
from hatfn.evaluation.task_inference import Method, check_logits, classify, infer_task
from hatfn.method.loss import logits_of
from hatfn.network.outputs import predict
from hatfn.numerics.arguments import Inputs
from hatfn.numerics.trees import unstack
from hatfn.spec import Spec
from hatfn.state import HATState

Row = Float64[np.ndarray, "*S T"]
"""A share of each task's samples, in [0, 1]; NaN where the task is not learned."""


class Evaluation(NamedTuple):
    """A row of the accuracy matrix, under both protocols.

    With S stacked states, each field is (S, T).

    Attributes:
        task_incremental: (T,), the share of samples whose class is right if the task is given.
        class_incremental: (T,), the share of samples whose inferred task and class are both right.
        task_inference: (T,), the share of samples whose inferred task is right.
    """

    task_incremental: Row
    class_incremental: Row
    task_inference: Row


def evaluate(
    hat: Spec,
    state: HATState,
    loaders: Sequence[Iterable[tuple[Tensor, Tensor]]],
    method: Method = "max",
    chunk_size: int | None = None,
) -> Evaluation:
    """Accuracy on every learned task, with the task given and with the task inferred.

    Each batch is predicted once, for all learned tasks. The row of its own task gives the first
    accuracy; a choice among all rows gives the second.

    Args:
        hat: the learner.
        state: any state, or stacked states that have learned the same tasks.
        loaders: the batches of each task, in order: x (B, ...), and y (B,) int64, counted within the
            task. Loaders of tasks that are not learned are not read. If processes train together, each
            passes its share, and their counts are summed.
        method: how :func:`infer_task` chooses among the learned tasks.
        chunk_size: how many tasks to compute at a time, which limits memory.

    Raises:
        TypeError, ValueError: not one loader for each task; an empty loader; a batch that is no pair of
            inputs and labels of the task; an output that is not (B, C).

    Example:
        >>> import hatfn, torchopt
        >>> net, x = torch.nn.Linear(2, 2), torch.randn(4, 2)
        >>> hat = hatfn.build(net, hatfn.trace(net, x), None, torchopt.sgd(0.1), num_tasks=2)
        >>> state = hat.consolidate(hat.init(0), 0)
        >>> y = net(x).argmax(-1)
        >>> evaluate(hat, state, [[(x, y)], [(x, y)]]).task_incremental
        array([ 1., nan])
    """
    check_learner("evaluate", hat)
    stacked = isinstance(state, HATState) and state.learned.dim() == 2
    states = unstack(state, len(state.learned)) if stacked else [state]
    for one in states:
        check_state("evaluate", one, hat.wiring, hat.tasks)
    _check_loaders(loaders, hat.tasks)
    if chunk_size is not None:
        check_count("evaluate", "chunk_size", chunk_size)
    learned = states[0].learned.nonzero().flatten().tolist()
    shares, device = np.full((3, len(states), hat.tasks), np.nan), states[0].learned.device
    for row, task in enumerate(learned):
        hits, count = torch.zeros(3, len(states), dtype=torch.int64, device=device), 0
        for batch in loaders[task]:
            x, y = _check_labelled(batch, task, hat)
            x = Inputs(*(tuple(value.to(device) for value in part) for part in x))
            y = y.to(device)
            new = [_hits(hat, one, x, y, learned, row, method, chunk_size) for one in states]
            hits = hits + torch.stack(new, 1)
            count += len(y)
        hits, count = hat.ranks.total((hits, torch.tensor(count, device=hits.device)))
        if not count:
            raise ValueError(
                f"evaluate: loader {task} gave no batch. Expected at least one: a list of batches, or "
                f"a DataLoader; a generator can be read only once."
            )
        shares[..., task] = hits.cpu().numpy() / int(count)
    return Evaluation(*(shares if stacked else shares[:, 0]))


def _hits(
    hat: Spec,
    state: HATState,
    x: Inputs,
    y: Tensor,
    learned: Sequence[int],
    row: int,
    method: Method,
    chunk_size: int | None,
) -> Tensor:
    """(3,) int64, how many samples of a task are right by each field of :class:`Evaluation`."""
    logits = logits_of(predict(hat.network, state, x, learned, chunk_size))
    check_logits("evaluate", logits)
    rows = infer_task(logits, method)
    class_right, task_right = classify(logits, torch.full_like(rows, row)) == y, rows == row
    # If the inferred task is right, the class comes from the same row of logits.
    return torch.stack([class_right, class_right & task_right, task_right]).sum(1)


def _check_loaders(loaders: Any, tasks: int) -> None:
    if not isinstance(loaders, Sequence) or isinstance(loaders, str):
        raise TypeError(
            f"evaluate: loaders is a {type(loaders).__name__}. Expected a list with one for each "
            f"task: hatfn.evaluate(hat, state, [loader_0, loader_1, ...])."
        )
    if len(loaders) != tasks:
        raise ValueError(
            f"evaluate: {len(loaders)} loaders for {tasks} tasks. Expected one loader for each task, "
            f"in order; for a task that is not learned write []."
        )


def _check_labelled(batch: Any, task: int, hat: Spec) -> Batch:
    where = f"evaluate, loader {task}"
    x, y = check_batch(where, batch, hat.wiring, hat.classes[task] if hat.classes else None)
    if y.dim() != 1 or y.dtype != torch.int64:
        raise TypeError(
            f"{where}: y has shape {tuple(y.shape)} and type {y.dtype}. Expected a class for each "
            f"sample, counted within the task: shape ({x.samples},) and type torch.int64."
        )
    return x, y
