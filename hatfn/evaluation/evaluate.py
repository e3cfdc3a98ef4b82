"""How well all tasks are done: with the task given, and with the task inferred, in one pass."""

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

    Of S stacked states each is (S, T).

    Attributes:
        task_incremental: (T,), whose class is right, the task given.
        class_incremental: (T,), whose task was inferred and whose class is right.
        task_inference: (T,), whose task was inferred.
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

    Each batch is predicted once, under all learned tasks: its own task's row gives the first, a choice
    among all rows the second.

    Args:
        hat: the learner.
        state: any state, or stacked ones, which have learned the same tasks.
        loaders: for each task in order its batches: x (B, ...), and y (B,) int64, counted within the
            task. Those of tasks that are not learned are not read. Of processes that train together,
            each one's share: counts are summed.
        method: how :func:`infer_task` chooses among the learned tasks.
        chunk_size: how many tasks at a time; bounds memory.

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
            seen = [
                _hits(hat, one, x, y.to(device), learned, row, method, chunk_size) for one in states
            ]
            hits = hits + torch.stack(seen, 1)
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
    """(3,) int64, of a task's samples how many are right by each row of :class:`Evaluation`."""
    logits = logits_of(predict(hat.network, state, x, learned, chunk_size))
    check_logits("evaluate", logits)
    rows = infer_task(logits, method)
    own, found = classify(logits, torch.full_like(rows, row)) == y, rows == row
    # Where the right task was inferred, the class is the one that its own row gives.
    return torch.stack([own, own & found, found]).sum(1)


def _check_loaders(loaders: Any, tasks: int) -> None:
    if not isinstance(loaders, Sequence) or isinstance(loaders, str):
        raise TypeError(
            f"evaluate: loaders is a {type(loaders).__name__}. Expected a list with one for each "
            f"task: hatfn.evaluate(hat, state, [loader_0, loader_1, ...])."
        )
    if len(loaders) != tasks:
        raise ValueError(
            f"evaluate: {len(loaders)} loaders for {tasks} tasks. Expected one for each, in order; of "
            f"tasks that are not learned they are not read, and may be []."
        )


def _check_labelled(batch: Any, task: int, hat: Spec) -> Batch:
    where = f"evaluate, loader {task}"
    x, y = check_batch(where, batch, hat.wiring, hat.classes[task] if hat.classes else None)
    if y.dim() != 1 or y.dtype != torch.int64:
        raise TypeError(
            f"{where}: y is {tuple(y.shape)} of {y.dtype}. Expected a class for each sample, "
            f"({x.samples},) of torch.int64, counted within the task."
        )
    return x, y
