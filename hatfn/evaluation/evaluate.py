"""Accuracy and metrics on all tasks, with the task given and with the task inferred, in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from hatfn.checks.batches import Batch, check_batch
from hatfn.checks.calls import check_state
from hatfn.checks.values import check_count, check_kind, check_learner, check_list
from hatfn.evaluation.task_inference import Method, check_logits, classify, infer_task
from hatfn.method.loss import logits_of
from hatfn.network.network import Output
from hatfn.network.outputs import narrow, predict
from hatfn.numerics.arguments import Inputs
from hatfn.numerics.trees import map_output, unstack
from hatfn.spec import Spec
from hatfn.state import HATState

Row = Float64[np.ndarray, "*S T"]
"""A share of each task's samples, in [0, 1]; NaN where the task is not learned."""


class Metric(Protocol):
    """A measure of outputs and targets, as torchmetrics has them."""

    def clone(self) -> Metric:
        """A copy with a memory of its own."""

    def reset(self) -> None:
        """Forget all batches."""

    def update(self, output: Any, y: Tensor, /) -> None:
        """Take a batch in."""

    def compute(self) -> Tensor:
        """The measure of all batches so far, ()."""


Metrics = Mapping[str, Metric]
"""Metrics by name."""


class Evaluation(NamedTuple):
    """A row of the accuracy matrix, under both protocols.

    With S stacked states, each array is (S, T). It is NaN where a task is not learned, or where its
    targets are no class labels.

    Attributes:
        task_incremental: (T,), the share of samples whose class is right if the task is given.
        class_incremental: (T,), the share of samples whose inferred task and class are both right.
        task_inference: (T,), the share of samples whose inferred task is right.
    """

    task_incremental: Row
    class_incremental: Row
    task_inference: Row

    @property
    def metrics(self) -> Mapping[str, Row]:
        """{name: (T,)}, the metrics that :func:`evaluate` was given, with the task given."""
        return {}


class _Measured(Evaluation):
    """A row that unpacks to three arrays, as any :class:`Evaluation`, and has metrics beside them."""

    metrics: Mapping[str, Row] = MappingProxyType({})


def evaluate(
    hat: Spec,
    state: HATState,
    loaders: Sequence[Iterable[tuple[Tensor, Tensor]]],
    method: Method = "max",
    chunk_size: int | None = None,
    metrics: Metrics | Sequence[Metrics | None] = MappingProxyType({}),
) -> Evaluation:
    """Accuracy on every learned task, with the task given and with the task inferred.

    Each batch is predicted once, for all learned tasks. The row of its own task gives the first
    accuracy; a choice among all rows gives the second.

    A task whose targets are no class labels has metrics alone.

    Args:
        hat: the learner.
        state: any state, or stacked states that have learned the same tasks.
        loaders: the batches of each task, in order: x (B, ...), and y (B,) int64, counted within the
            task. Loaders of tasks that are not learned are not read. If processes train together, each
            passes its share, and their counts are summed.
        method: how :func:`infer_task` chooses among the learned tasks.
        chunk_size: as for :meth:`HAT.predict`.
        metrics: {name: metric} of torchmetrics, or a list with such a dict, or None, for each task. A
            copy of a metric receives the task's output for each batch, or the ``logits`` of the output,
            with the task's classes alone, and the targets. It must give one number. It averages over
            processes by itself.

    Raises:
        TypeError, ValueError: not one loader for each task; an empty loader; a batch that is no pair of
            inputs and labels of the task; for a task without metrics, an output that is not (B, C).

    Example:
        >>> import hatfn.models, torchopt
        >>> net, x = hatfn.models.MLP(2, 2, width=16), torch.randn(4, 2)
        >>> hat = hatfn.build(net, hatfn.trace(net, x), [2, 2], torchopt.sgd(0.1))
        >>> state = hat.consolidate(hat.init(0), 0)
        >>> y = hat.forward(state, x, 0).argmax(-1)
        >>> evaluate(hat, state, [[(x, y)], [(x, y)]]).task_incremental
        array([ 1., nan])
    """
    check_learner("evaluate", hat)
    stacked = isinstance(state, HATState) and state.learned.dim() == 2
    states = unstack(state, len(state.learned)) if stacked else [state]
    for one in states:
        check_state("evaluate", one, hat.wiring, hat.tasks)
    _check_loaders(loaders, hat.tasks)
    by_task = _check_metrics(metrics, hat.tasks)
    if chunk_size is not None:
        check_count("evaluate", "chunk_size", chunk_size)
    learned = states[0].learned.nonzero().flatten().tolist()
    shares, device = np.full((3, len(states), hat.tasks), np.nan), states[0].learned.device
    names = dict.fromkeys(name for own in by_task for name in own)
    measured = {name: np.full((len(states), hat.tasks), np.nan) for name in names}
    for row, task in enumerate(learned):
        hits, count = torch.zeros(3, len(states), dtype=torch.int64, device=device), 0
        copies = [_copies(by_task[task], device) for _ in states]
        for batch in loaders[task]:
            x, y = _check_labelled(batch, task, hat, by_task[task])
            x = Inputs(*(tuple(value.to(device) for value in part) for part in x))
            y = y.to(device)
            for i, one in enumerate(states):
                outputs = predict(hat.network, one, x, learned, chunk_size)
                hits[:, i] += _hits(logits_of(outputs), y, row, method) if _are_labels(y) else 0
                _measure(copies[i], hat, outputs, row, task, y)
            count += len(y)
        labelled = count if count and _are_labels(y) else 0
        hits, counts = hat.ranks.total((hits, torch.tensor([count, labelled], device=device)))
        if not counts[0]:
            raise ValueError(
                f"evaluate: loader {task} gave no batch. Expected at least one: a list of batches, or "
                f"a DataLoader; a generator can be read only once."
            )
        shares[..., task] = hits.cpu().numpy() / int(counts[1]) if counts[1] else np.nan
        for i, own in enumerate(copies):
            for name, metric in own.items():
                measured[name][i, task] = _number(name, metric.compute())
    if not stacked:
        shares, measured = shares[:, 0], {name: values[0] for name, values in measured.items()}
    evaluation = _Measured(shares[0], shares[1], shares[2])
    evaluation.metrics = measured
    return evaluation


def _hits(logits: Tensor, y: Tensor, row: int, method: Method) -> Tensor:
    """(3,) int64, how many samples of a task are right by each array of :class:`Evaluation`.

    Args:
        logits: (T, B, C), of all learned tasks.
        y: (B,) int64.
        row: the place of the task among the learned ones.
        method: how the task is inferred.
    """
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


def _are_labels(y: Tensor) -> bool:
    return y.dim() == 1 and y.dtype == torch.int64


def _check_labelled(batch: Any, task: int, hat: Spec, metrics: Metrics) -> Batch:
    """A batch; its targets must be class labels if the task has no metrics."""
    where = f"evaluate, loader {task}"
    x, y = check_batch(where, batch, hat.wiring, hat.labels(task))
    if not metrics and not _are_labels(y):
        raise TypeError(
            f"{where}: y has shape {tuple(y.shape)} and type {y.dtype}. Expected a class for each "
            f"sample, counted within the task: shape ({x.samples},) and type torch.int64. For other "
            f"targets give the task a metric: evaluate(..., metrics=[...])."
        )
    return x, y


def _check_metrics(metrics: Any, tasks: int) -> list[Metrics]:
    """The metrics of each task, from those of all tasks or from a list."""
    every = [metrics] * tasks if isinstance(metrics, Mapping) else metrics
    check_list("evaluate", "metrics", every, "{name: metric}, or a list of one such dict for each task")
    by_task = [one or {} for one in every]
    if len(by_task) != tasks:
        raise ValueError(
            f"evaluate: {len(by_task)} metrics for {tasks} tasks. Expected one dict for all tasks, or "
            f"one for each; for a task without metrics write None."
        )
    needs = ("clone", "reset", "update", "compute")
    for task, own in enumerate(by_task):
        check_kind("evaluate", f"metrics[{task}]", own, Mapping, "a dict {name: metric}")
        for name, metric in own.items():
            if isinstance(metric, type) or not all(hasattr(metric, need) for need in needs):
                raise TypeError(
                    f"evaluate: the metric {name!r} of task {task} is {metric!r}. Expected a metric of "
                    f"torchmetrics, such as torchmetrics.classification.MulticlassF1Score(3)."
                )
    return by_task


def _copies(metrics: Metrics, device: torch.device) -> dict[str, Metric]:
    """Copies of metrics that know no batch, on a device."""
    copies = {name: metric.clone() for name, metric in metrics.items()}
    for metric in copies.values():
        metric.reset()
        if hasattr(metric, "to"):
            metric.to(device)
    return copies


def _measure(metrics: Metrics, hat: Spec, outputs: Output, row: int, task: int, y: Tensor) -> None:
    """Give metrics a batch: a task's own output, which is one row of the outputs, and its targets."""
    if metrics:
        output = narrow(hat.network, map_output(itemgetter(row), outputs), task)
        for metric in metrics.values():
            metric.update(logits_of(output), y)


def _number(name: str, value: Any) -> float:
    """The value of a metric, which must be one number."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"evaluate: the metric {name!r} gives a tensor of shape {tuple(value.shape)}. Expected one "
            f"number: let the metric average, as with average='macro'."
        )
    return float(value)
