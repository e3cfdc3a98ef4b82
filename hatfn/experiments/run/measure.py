"""The measurements when a task is closed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hatfn.checks.batches import check_batch
from hatfn.evaluation.evaluate import evaluate
from hatfn.evaluation.metrics import accuracy, drift
from hatfn.evaluation.usage import free_weights, memory, usage
from hatfn.experiments.run.progress import Run
from hatfn.experiments.run.result import Closing, Learned
from hatfn.experiments.streams import Part
from hatfn.lifecycle.consolidate import readiness, settle
from hatfn.numerics.seeds import mixed
from hatfn.state import HATState

CALIBRATION_IMAGES = 512
"""The most training images that measure a task at its end. Each passes through the network up to five
times, which is more work than a training step on it."""

EVALUATION_BATCH = 256
"""Images per forward pass in measurements. It is fixed, because it changes the bits of logits."""


def _closing(run: Run, index: int, state: HATState, task: int, data: Part) -> HATState:
    """The state of one seed with the batch-norm statistics to serve; adds a Closing to its result.

    Args:
        run: the run in progress.
        index: the index of the seed.
        state: the state of that seed.
        task: the task that is closed.
        data: its training images; some of them are used.
    """
    hat = run.hat
    whole = representative(data, run.config.batch_size, mixed(run.seeds[index], task))
    batches = [(run.prepare(x), y.to(run.config.device)) for x, y in run.ranks.share(whole)]
    if run.config.recalibrate == "measured":
        pairs = [check_batch("run", batch, hat.wiring) for batch in batches]
        settled, ready, changed = settle(hat, state, pairs, task)
    else:
        changed = bool(state.task_buffers) and run.config.recalibrate == "always"
        settled = hat.recalibrate(state, batches, task) if changed else state
        ready = readiness(hat, settled, batches, task)
    undecided = sum(int(units.sum()) for units in ready.undecided.values())
    run.results[index].closings.append(Closing(undecided, ready.gap.item(), changed))
    return settled


def representative(data: Part, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Batches that measure a task at its end, in random order.

    Files and generators often give one class after another, and a batch norm sees less variance in a
    batch of one class than in all classes.

    Args:
        data: the images of the task.
        size: the most images per batch; each has at least two.
        seed: the seed of the choice.
    """
    order = torch.randperm(len(data.y), generator=torch.Generator().manual_seed(seed))
    parts = order[:CALIBRATION_IMAGES].split(size)
    return [(data.x[rows], data.y[rows]) for rows in parts if len(rows) > 1]


def _measure(run: Run, index: int, state: HATState, after: int) -> Learned:
    """Measure accuracy and drift of one seed on every task so far, and the free capacity.

    It takes two passes over the images. Drift needs the exact bits of ``forward``; ``predict``, which
    computes every task for every image, agrees with ``forward`` only up to rounding. The second pass
    adds a few percent to the time of training.

    Args:
        run: the run in progress.
        index: the index of the seed.
        state: the state of that seed.
        after: the last task that was learned.
    """
    result, hat, learned = run.results[index], run.hat, run.logits[index]
    largest = 0.0
    for task in range(after + 1):
        share = [hat.forward(state, x, task).cpu() for x, _ in _loader(run, index, task)]
        logits = torch.cat(run.ranks.collect(share))
        result.accuracy_matrix[after, task] = accuracy(logits, _data(run, index, task).y)
        largest = max(largest, drift(learned.setdefault(task, logits), logits))
    result.drift.append(largest)
    classes: list[float] = []
    tasks: list[float] = []
    if run.config.infer == "always" or after == len(run.stream) - 1:
        loaders = [_loader(run, index, task) for task in range(len(run.stream))]
        row = evaluate(hat, state, loaders)
        result.class_incremental[after] = row.class_incremental
        result.task_inference = row.task_inference
        classes = row.class_incremental[: after + 1].tolist()
        tasks = row.task_inference[: after + 1].tolist()
    result.usage = usage(state, hat.wiring)
    result.memory = memory(state)
    result.free_units.append({str(k): float(v) for k, v in result.usage["free"].items()})
    result.free_weights.append(free_weights(state, hat.wiring))
    closing = result.closings[-1]
    return Learned(
        task=after,
        name=run.stream[after].name,
        accuracies=result.accuracy_matrix[after, : after + 1].tolist(),
        class_incremental=classes,
        task_inference=tasks,
        drift=largest,
        free_capacity=result.free_units[-1],
        free_weights=result.free_weights[-1],
        undecided=closing.undecided,
        gap=closing.gap,
        recalibrated=closing.recalibrated,
    )


def _mean_of(learned: list[Learned]) -> Learned:
    """The mean of the measurements of all seeds; drift is the largest."""
    first = learned[0]

    def over(name: str) -> Any:
        return np.mean([getattr(one, name) for one in learned], axis=0).tolist()

    free = {
        group: float(np.mean([one.free_capacity[group] for one in learned]))
        for group in first.free_capacity
    }
    return first._replace(
        accuracies=over("accuracies"),
        class_incremental=over("class_incremental"),
        task_inference=over("task_inference"),
        drift=max(one.drift for one in learned),
        free_capacity=free,
        free_weights=over("free_weights"),
        undecided=over("undecided"),
        gap=over("gap"),
        recalibrated=over("recalibrated"),
    )


def _data(run: Run, index: int, task: int) -> Part:
    """The images that measure a task of a seed."""
    part: Part = getattr(run.streams[index][task], run.config.evaluate_on)
    return part


def _loader(run: Run, index: int, task: int) -> Iterator[tuple[Tensor, Tensor]]:
    data = _data(run, index, task)
    pairs = zip(data.x.split(EVALUATION_BATCH), data.y.split(EVALUATION_BATCH), strict=True)
    for x, y in run.ranks.share(list(pairs)):
        yield run.prepare(x), y
