"""What is measured when a task is closed."""

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
"""Training images by which a task's end is judged, at most. Each passes up to five times, which is more
work than a step of training on it."""

EVALUATION_BATCH = 256
"""Images per forward pass when measuring. Fixed: another batch size changes the bits of logits."""


def _closing(run: Run, index: int, state: HATState, task: int, data: Part) -> HATState:
    """One seed's state with the batch-norm statistics that serve the task better; results keep why.

    Args:
        run: in progress.
        index: of the seed.
        state: of that seed.
        task: which.
        data: its training images, of which as many are used as tell enough.
    """
    hat = run.hat
    whole = representative(data, run.config.batch_size, mixed(run.seeds[index], task))
    batches = [(run.prepare(x), y.to(run.config.device)) for x, y in run.ranks.share(whole)]
    if run.config.recalibrate == "measured":
        pairs = [check_batch("run", batch, hat.wiring) for batch in batches]
        kept, seen, taken = settle(hat, state, pairs, task)
    else:
        taken = bool(state.task_buffers) and run.config.recalibrate == "always"
        kept = hat.recalibrate(state, batches, task) if taken else state
        seen = readiness(hat, kept, batches, task)
    undecided = sum(int(units.sum()) for units in seen.undecided.values())
    run.results[index].closings.append(Closing(undecided, seen.gap.item(), taken))
    return kept


def representative(data: Part, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Batches by which a task's end is judged.

    In random order: files and generators give class after class, and in a batch of one class a batch
    norm sees less variance than among all.

    Args:
        data: of the task.
        size: images per batch, at most, and at least two.
        seed: of the choice.
    """
    order = torch.randperm(len(data.y), generator=torch.Generator().manual_seed(seed))
    rows = order[:CALIBRATION_IMAGES].split(size)
    return [(data.x[some], data.y[some]) for some in rows if len(some) > 1]


def _measure(run: Run, index: int, state: HATState, after: int) -> Learned:
    """Accuracy and drift of one seed on every task so far, and what is left.

    Two passes: drift needs the bits of ``forward``, and ``predict``, which shows every image to every
    task at once, agrees with it to rounding only. The second adds a few percent to training.

    Args:
        run: in progress.
        index: of the seed.
        state: of that seed.
        after: the last task that was learned.
    """
    result, hat, learned = run.results[index], run.hat, run.logits[index]
    moved = 0.0
    for task in range(after + 1):
        own = [hat.forward(state, x, task).cpu() for x, _ in _loader(run, index, task)]
        logits = torch.cat(run.ranks.collect(own))
        result.accuracy_matrix[after, task] = accuracy(logits, _data(run, index, task).y)
        moved = max(moved, drift(learned.setdefault(task, logits), logits))
    result.drift.append(moved)
    classes: list[float] = []
    tasks: list[float] = []
    if run.config.infer == "always" or after == len(run.stream) - 1:
        loaders = [_loader(run, index, task) for task in range(len(run.stream))]
        row = evaluate(hat, state, loaders, chunk_size=1)  # no more memory than one task takes
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
        drift=moved,
        free_capacity=result.free_units[-1],
        free_weights=result.free_weights[-1],
        undecided=closing.undecided,
        gap=closing.gap,
        recalibrated=closing.recalibrated,
    )


def _mean_of(seen: list[Learned]) -> Learned:
    """What was measured, over seeds: means, and the largest drift."""
    first = seen[0]

    def over(name: str) -> Any:
        return np.mean([getattr(one, name) for one in seen], axis=0).tolist()

    free = {
        group: float(np.mean([one.free_capacity[group] for one in seen]))
        for group in first.free_capacity
    }
    return first._replace(
        accuracies=over("accuracies"),
        class_incremental=over("class_incremental"),
        task_inference=over("task_inference"),
        drift=max(one.drift for one in seen),
        free_capacity=free,
        free_weights=over("free_weights"),
        undecided=over("undecided"),
        gap=over("gap"),
        recalibrated=over("recalibrated"),
    )


def _data(run: Run, index: int, task: int) -> Part:
    """What a task of a seed is judged by."""
    part: Part = getattr(run.streams[index][task], run.config.evaluate_on)
    return part


def _loader(run: Run, index: int, task: int) -> Iterator[tuple[Tensor, Tensor]]:
    data = _data(run, index, task)
    pairs = zip(data.x.split(EVALUATION_BATCH), data.y.split(EVALUATION_BATCH), strict=True)
    for x, y in run.ranks.share(list(pairs)):
        yield run.prepare(x), y
