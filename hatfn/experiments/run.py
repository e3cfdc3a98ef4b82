"""The main job: learn a stream of tasks, measure what is kept after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import optree
import pandas as pd
import torch
from torch import Tensor

from hatfn.evaluation import evaluate
from hatfn.experiments.config import RunConfig
from hatfn.experiments.setup import (
    batches,
    make_learner,
    make_module,
    make_schedule,
    training_part,
)
from hatfn.experiments.streams import Part, Task, make_stream
from hatfn.learner import HAT
from hatfn.metrics import (
    accuracy,
    average_accuracy,
    backward_transfer,
    drift,
    forgetting,
    free_weights,
    memory,
    usage,
)
from hatfn.seeds import mixed, seeded
from hatfn.state import HATState

EVALUATION_BATCH = 256
"""Images per forward pass when measuring. Fixed: another batch size changes the bits of logits."""


class Step(NamedTuple):
    """One training step, as it is shown and logged."""

    task: int
    epoch: int
    step: int
    steps: int
    loss: float
    penalty: float
    scale: float
    accuracy: float


class Learned(NamedTuple):
    """What was measured once a task was learned, as it is shown and logged."""

    task: int
    name: str
    accuracies: list[float]
    class_incremental: list[float]
    task_inference: list[float]
    drift: float
    free_capacity: dict[str, float]
    free_weights: float


@dataclass
class Result:
    """What a run has measured so far.

    Attributes:
        names: of the tasks.
        accuracy_matrix: row i: after task i; column j: accuracy on task j, NaN for j > i.
        class_incremental: the same with the task inferred among those learned so far.
        task_inference: after the last task, on each task the share whose task is inferred.
        drift: after each task, the largest change of any logit of any earlier task since it was
            learned.
        usage: after the last task: per group, the share of units that each task uses, and free.
        memory: bytes of each part of the state after the last task.
        free_units: after each task, {group: share of units that no task uses}.
        free_weights: after each task, the share of shared weights that no task depends on.
        seconds: wall time of training and measuring.
    """

    names: list[str]
    accuracy_matrix: np.ndarray
    class_incremental: np.ndarray
    task_inference: np.ndarray
    drift: list[float] = field(default_factory=list)
    usage: pd.DataFrame = field(default_factory=pd.DataFrame)
    memory: pd.Series[int] = field(default_factory=lambda: pd.Series(dtype=int))
    free_units: list[dict[str, float]] = field(default_factory=list)
    free_weights: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def acc(self) -> float:
        """Mean accuracy on all tasks at the end."""
        return average_accuracy(self.accuracy_matrix)

    @property
    def class_acc(self) -> float:
        """Mean accuracy at the end with the task inferred."""
        return average_accuracy(self.class_incremental)

    @property
    def bwt(self) -> float:
        """Backward transfer."""
        return backward_transfer(self.accuracy_matrix)

    @property
    def forgetting(self) -> float:
        """Mean loss of accuracy since each task's best."""
        return forgetting(self.accuracy_matrix)

    @property
    def max_drift(self) -> float:
        """The largest drift after any task."""
        return max(self.drift)


class NonFiniteStepError(RuntimeError):
    """A step gave a loss or weights that are not finite; the state before it is intact."""


@dataclass
class Run:
    """A run in progress.

    Attributes:
        config: its settings.
        stream: its tasks.
        prepare: from images of the stream to inputs of the module, on its device.
        hat: the learner.
        state: after the last step.
        result: what was measured so far.
    """

    config: RunConfig
    stream: list[Task]
    prepare: Callable[[Tensor], Tensor]
    hat: HAT
    state: HATState
    result: Result


def start(config: RunConfig) -> Run:
    """Everything before the first step: data, module, wiring, learner, state."""
    stream = make_stream(config.stream, config.tasks, config.seed)
    module, resize = make_module(config, stream[0])
    device = torch.device(config.device)

    def prepare(x: Tensor) -> Tensor:
        return resize(x.to(device))

    hat = make_learner(config, module.to(device), prepare(stream[0].train.x[:1]), stream)
    nothing = np.full((len(stream),) * 2, np.nan)
    result = Result([task.name for task in stream], nothing, nothing.copy(), nothing[0].copy())
    return Run(config, stream, prepare, hat, hat.init(config.seed), result)


def learn(run: Run) -> Iterator[Step | Learned]:
    """Learn every task in turn; ``run.state`` and ``run.result`` keep up with what is yielded.

    Raises:
        NonFiniteStepError: a step was refused; ``run.state`` is the state before it.
    """
    began = time.perf_counter()
    learned_logits: list[Tensor] = []
    for index in range(len(run.stream)):
        yield from _learn_task(run, index)
        learned = _measure(run, index, learned_logits)
        run.result.seconds = time.perf_counter() - began
        yield learned


def _learn_task(run: Run, index: int) -> Iterator[Step]:
    config, hat = run.config, run.hat
    data = training_part(config, run.stream[index])
    schedule = make_schedule(config)
    per_epoch = -(-len(data.y) // config.batch_size)
    steps = per_epoch * config.epochs
    locked: list[int] | None = None if config.method == "hat" else []
    run.state = hat.begin(run.state, index, locked=locked, carry=config.carry)
    step = 0
    for epoch in range(config.epochs):
        order = torch.Generator().manual_seed(mixed(config.seed, index, epoch))
        for position, batch in enumerate(batches(data, config.batch_size, order)):
            progress = position / per_epoch if config.period == "epoch" else step / steps
            scale = schedule(progress)
            x, y = run.prepare(batch.x), batch.y.to(config.device)
            with seeded(config.device, mixed(config.seed, index, epoch, position)):
                run.state, info = hat.update(run.state, (x, y), index, scale)
            if not info.ok:
                raise NonFiniteStepError(
                    f"run: step {step} of task {index} ({run.stream[index].name}) gave loss "
                    f"{info.loss.item()} and was refused. Lower lr ({config.lr}), or set max_norm."
                )
            step += 1
            train_accuracy = accuracy(optree.tree_leaves(info.logits)[0], y)
            loss, penalty = info.loss.item(), info.penalty.item()
            yield Step(index, epoch, step, steps, loss, penalty, scale, train_accuracy)
    if config.recalibrate:
        parts = data.x.split(config.batch_size)
        inputs = (run.prepare(x) for x in parts if len(x) > 1)
        run.state = hat.recalibrate(run.state, inputs, index)
    run.state = hat.consolidate(run.state, index)


def _measure(run: Run, index: int, learned_logits: list[Tensor]) -> Learned:
    """Accuracy and drift on every task so far, and what is left.

    Two passes: drift needs the bits of ``forward``, and ``predict``, which shows every image to every
    task at once, agrees with it to rounding only. The second adds a few percent to training.
    """
    result, hat = run.result, run.hat
    moved = 0.0
    for task in range(index + 1):
        logits = torch.cat([hat.forward(run.state, x, task).cpu() for x, _ in _loader(run, task)])
        result.accuracy_matrix[index, task] = accuracy(logits, _data(run, task).y)
        if task == index:
            learned_logits.append(logits)
        moved = max(moved, drift(learned_logits[task], logits))
    result.drift.append(moved)
    loaders = [_loader(run, task) for task in range(len(run.stream))]
    row = evaluate(hat, run.state, loaders, chunk_size=1)  # no more memory than one task takes
    result.class_incremental[index], result.task_inference = row.class_incremental, row.task_inference
    result.usage = usage(run.state, hat.wiring)
    result.memory = memory(run.state)
    result.free_units.append({str(k): float(v) for k, v in result.usage["free"].items()})
    result.free_weights.append(free_weights(run.state, hat.wiring))
    return Learned(
        index,
        run.stream[index].name,
        result.accuracy_matrix[index, : index + 1].tolist(),
        row.class_incremental[: index + 1].tolist(),
        row.task_inference[: index + 1].tolist(),
        moved,
        result.free_units[-1],
        result.free_weights[-1],
    )


def _data(run: Run, task: int) -> Part:
    """What a task is judged by."""
    part: Part = getattr(run.stream[task], run.config.evaluate_on)
    return part


def _loader(run: Run, task: int) -> Iterator[tuple[Tensor, Tensor]]:
    data = _data(run, task)
    for x, y in zip(data.x.split(EVALUATION_BATCH), data.y.split(EVALUATION_BATCH), strict=True):
        yield run.prepare(x), y
