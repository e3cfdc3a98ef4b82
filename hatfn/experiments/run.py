"""The main job: learn a stream of tasks, measure what is kept after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import optree
import torch
from torch import Tensor

from hatfn.calibration import readiness
from hatfn.evaluation import evaluate
from hatfn.experiments.config import RunConfig, check_run
from hatfn.experiments.result import Closing, Learned, Result, mean
from hatfn.experiments.setup import batches, make_learner, make_module, make_schedule, training_part
from hatfn.experiments.streams import Part, Task, make_stream
from hatfn.learner import HAT
from hatfn.metrics import accuracy, drift, free_weights, memory, usage
from hatfn.ranks import ALONE, Ranks
from hatfn.replicas import Replicas, replica, replicate, stack
from hatfn.seeds import mixed, seeded
from hatfn.state import HATState

CALIBRATION_IMAGES = 512
"""Training images by which a task's end is judged, at most. Each passes up to five times, which is more
work than a step of training on it."""

EVALUATION_BATCH = 256
"""Images per forward pass when measuring. Fixed: another batch size changes the bits of logits."""


class Step(NamedTuple):
    """One training step, as it is shown and logged; of several seeds and tasks the mean."""

    task: int
    epoch: int
    step: int
    steps: int
    loss: float
    penalty: float
    scale: float
    accuracy: float


class Place(NamedTuple):
    """How far a run is: it goes on with this batch of this epoch of this phase.

    Attributes:
        phase: which of its phases, each the training of one task or of several together.
        epoch: in the phase.
        batch: in the epoch; at the first one of the first epoch, the phase has not begun.
    """

    phase: int
    epoch: int
    batch: int


class NonFiniteStepError(RuntimeError):
    """A step gave a loss or weights that are not finite; the state before it is intact."""


@dataclass
class Run:
    """A run in progress, of one seed or of several at once.

    Attributes:
        config: its settings.
        seeds: of its replicas.
        streams: the tasks of each seed.
        prepare: from images of a stream to inputs of the module, on its device.
        hat: the learner.
        state: after the last step; of several seeds stacked.
        results: what was measured so far, of each seed.
        logits: of each seed, {task: its logits when it was learned}, by which drift is measured.
        place: how far it is.
        ranks: the processes that train it together, each on its share of every batch.
        seconds: that it took until it was saved, if it was cut off since.
    """

    config: RunConfig
    seeds: list[int]
    streams: list[list[Task]]
    prepare: Callable[[Tensor], Tensor]
    hat: HAT
    state: HATState
    results: list[Result]
    logits: list[dict[int, Tensor]]
    place: Place
    ranks: Ranks = ALONE
    seconds: float = 0.0

    @property
    def batch_size(self) -> int:
        """Images per step, of all processes."""
        return self.config.batch_size * (self.config.processes or 1)

    @property
    def phases(self) -> list[list[int]]:
        """The tasks that are trained together, one phase after another."""
        tasks = list(range(len(self.stream)))
        return [tasks] if self.config.method == "joint" else [[task] for task in tasks]

    @property
    def stream(self) -> list[Task]:
        """The tasks of the first seed."""
        return self.streams[0]

    @property
    def result(self) -> Result:
        """What was measured, of several seeds the mean."""
        return mean(self.results)

    @property
    def learner(self) -> HAT | Replicas:
        """What the state is given to."""
        return self.hat if len(self.seeds) == 1 else Replicas(self.hat)

    @property
    def states(self) -> list[HATState]:
        """The state of each seed."""
        if len(self.seeds) == 1:
            return [self.state]
        return [replica(self.state, index) for index in range(len(self.seeds))]


def start(config: RunConfig, ranks: Ranks = ALONE) -> Run:
    """Everything before the first step: data, module, wiring, learner, state."""
    check_run(config)
    device = _device(config.device)
    seeds = list(range(config.seed, config.seed + config.seeds))
    streams = [
        make_stream(config.stream, config.tasks, seed, config.data_dir, config.image_size)
        for seed in seeds
    ]
    module, resize = make_module(config, streams[0][0])

    def prepare(x: Tensor) -> Tensor:
        return resize(x.to(device))

    example = prepare(streams[0][0].train.x[:1])
    hat = make_learner(config, module.to(device), example, streams[0], ranks)
    state = hat.init(seeds[0], fresh=True) if len(seeds) == 1 else replicate(hat, seeds)
    results = [Result.of([task.name for task in stream]) for stream in streams]
    logits: list[dict[int, Tensor]] = [{} for _ in seeds]
    return Run(config, seeds, streams, prepare, hat, state, results, logits, Place(0, 0, 0), ranks)


def _device(name: str) -> torch.device:
    """One that numbers can be computed on and read from."""
    try:
        torch.zeros(1, device=name).tolist()
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch was built without it
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"run: device={name!r} cannot be used: {reason} Expected cpu or cuda."
        ) from error
    return torch.device(name)


def opened(run: Run, place: Place) -> HATState:
    """A state of the structure that the run's has at a place: moments are of the tasks last opened."""
    phase = place.phase if place.epoch or place.batch else place.phase - 1
    rows = run.phases[max(phase, 0)]
    return run.learner.begin(run.state, rows[0] if len(rows) == 1 else rows, locked=[])


def learn(run: Run) -> Iterator[Step | Learned]:
    """Learn every task in turn, from where the run is; it keeps up with what is yielded.

    Raises:
        NonFiniteStepError: a step was refused; ``run.state`` is the state before it.
    """
    began = time.perf_counter() - run.seconds
    for phase in range(run.place.phase, len(run.phases)):
        rows = run.phases[phase]
        for step in _learn_tasks(run, rows):
            run.seconds = time.perf_counter() - began
            yield step
        run.ranks.check_same(run.state, f"run: after task {rows[-1]}")
        seen = [_measure(run, i, state, rows[-1]) for i, state in enumerate(run.states)]
        run.place, run.seconds = Place(phase + 1, 0, 0), time.perf_counter() - began
        for result in run.results:
            result.seconds = run.seconds
        yield _mean_of(seen)


def _learn_tasks(run: Run, rows: list[int]) -> Iterator[Step]:
    """Train one task, or several in the same steps, to the end."""
    config, learner = run.config, run.learner
    # One task is not a list of one, and one seed has no axis: these are what users write.
    task: int | list[int] = rows[0] if len(rows) == 1 else rows
    schedule = make_schedule(config)
    data = [[training_part(config, stream[row]) for row in rows] for stream in run.streams]
    count = max(len(part.y) for part in data[0])
    per_epoch = -(-count // run.batch_size)
    if count // per_epoch < run.ranks.size:
        raise ValueError(
            f"run: batches of {count // per_epoch} images for {run.ranks.size} processes. Expected one "
            f"for each at least: raise --batch-size ({config.batch_size})."
        )
    steps = per_epoch * config.epochs
    phase, begun, done = run.place
    if not begun and not done:
        locked: list[int] | None = None if config.method in ("hat", "frozen") else []
        first = next(_epoch(run, data, rows, 0)) if config.init_from and len(rows) == 1 else None
        source = None if first is None else config.init_from
        run.state = learner.begin(run.state, task, locked, config.carry, source, first)
    step = begun * per_epoch + done
    for epoch in range(begun, config.epochs):
        skipped = done if epoch == begun else 0
        rest = islice(enumerate(_epoch(run, data, rows, epoch)), skipped, None)
        for position, (x, y) in rest:
            progress = position / per_epoch if config.period == "epoch" else step / steps
            scale = schedule(progress)
            if config.anneal == "linear":
                falling = torch.full_like(run.state.hyper["lr"], 1 - step / steps)
                run.state = run.state._replace(hyper=run.state.hyper | {"lr": falling})
            with seeded(config.device, mixed(config.seed, rows[-1], epoch, position, run.ranks.rank)):
                run.state, info = learner.update(run.state, (x, y), task, scale)
            if not info.ok.all():
                raise NonFiniteStepError(
                    f"run: step {step} of task {task} ({run.stream[rows[-1]].name}) gave loss "
                    f"{info.loss.tolist()} and was refused. Lower lr ({config.lr}), or set max_norm."
                )
            step += 1
            run.place = Place(phase, epoch, position + 1)
            outputs = [info.logits] if len(rows) == 1 else info.logits
            labels = [y] if len(rows) == 1 else y.unbind(-2)
            right = [
                accuracy(optree.tree_leaves(output)[0], label)
                for output, label in zip(outputs, labels, strict=True)
            ]
            loss, penalty = info.loss.mean().item(), info.penalty.mean().item()
            yield Step(rows[-1], epoch, step, steps, loss, penalty, scale, float(np.mean(right)))
    for row, parts in zip(rows, zip(*data, strict=True), strict=True):
        states = [_closing(run, i, state, row, parts[i]) for i, state in enumerate(run.states)]
        run.state = learner.consolidate(states[0] if len(states) == 1 else stack(states), row)


def _epoch(
    run: Run, data: list[list[Part]], rows: list[int], epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch; in front an axis over seeds, then over tasks, where there are several.

    Args:
        run: in progress.
        data: of each seed the training images of each task; an epoch is as long as the largest.
        rows: the tasks.
        epoch: which.
    """
    count = max(len(part.y) for part in data[0])

    def of_task(seed: int, row: int, part: Part) -> Iterator[Part]:
        order = torch.Generator().manual_seed(mixed(seed, row, epoch))
        for batch in batches(part, run.batch_size, order, count):
            x, y = map(run.ranks.share, batch)
            yield Part(run.prepare(x), y.to(run.config.device))

    every = [
        [of_task(seed, row, part) for row, part in zip(rows, parts, strict=True)]
        for seed, parts in zip(run.seeds, data, strict=True)
    ]
    for step in zip(*(zip(*tasks, strict=True) for tasks in every), strict=True):
        seeds = [Part(*map(_together, zip(*tasks, strict=True))) for tasks in step]
        x, y = map(_together, zip(*seeds, strict=True))
        yield x, y


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
    kept, seen, taken = state, readiness(hat, state, batches, task), False
    if state.task_buffers and run.config.recalibrate != "never":
        new = hat.recalibrate(state, [x for x, _ in batches], task)
        then = readiness(hat, new, batches, task)
        if run.config.recalibrate == "always" or then.binary < seen.binary:
            kept, seen, taken = new, then, True
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


def _together(tensors: Sequence[Tensor]) -> Tensor:
    """Stacked, or one alone as it is."""
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors))


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
    inferred: tuple[list[float], list[float]] = ([], [])
    if run.config.infer == "always" or after == len(run.stream) - 1:
        loaders = [_loader(run, index, task) for task in range(len(run.stream))]
        row = evaluate(hat, state, loaders, chunk_size=1)  # no more memory than one task takes
        result.class_incremental[after], result.task_inference = row[1:]
        inferred = (row[1][: after + 1].tolist(), row[2][: after + 1].tolist())
    result.usage = usage(state, hat.wiring)
    result.memory = memory(state)
    result.free_units.append({str(k): float(v) for k, v in result.usage["free"].items()})
    result.free_weights.append(free_weights(state, hat.wiring))
    return Learned(
        after,
        run.stream[after].name,
        result.accuracy_matrix[after, : after + 1].tolist(),
        *inferred,
        moved,
        result.free_units[-1],
        result.free_weights[-1],
        *result.closings[-1],
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
