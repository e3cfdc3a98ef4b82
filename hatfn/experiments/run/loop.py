"""The main job: learn a stream of tasks, and measure all learned tasks after each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from hatfn.engine.ranks import ALONE, Ranks
from hatfn.evaluation.metrics import accuracy
from hatfn.experiments.run.config import RunConfig, check_run
from hatfn.experiments.run.measure import _closing, _mean_of, _measure
from hatfn.experiments.run.progress import Progress, Run, Step
from hatfn.experiments.run.result import Learned, Result
from hatfn.experiments.run.setup import batches, make_learner, make_module, make_schedule, training_part
from hatfn.experiments.streams import Part, make_stream
from hatfn.numerics.seeds import mixed, seeded
from hatfn.numerics.trees import output_leaves
from hatfn.replicas import replicate, stack
from hatfn.state import HATState


class NonFiniteStepError(RuntimeError):
    """A step gave a loss or weights that are not finite; the state before it is intact."""


def start(config: RunConfig, ranks: Ranks = ALONE) -> Run:
    """Prepare a run: data, module, wiring, learner, state."""
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
    return Run(config, seeds, streams, prepare, hat, state, results, logits, Progress(0, 0, 0), ranks)


def _device(name: str) -> torch.device:
    """The device, after a check that numbers can be computed on it and read from it."""
    try:
        torch.zeros(1, device=name).tolist()
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without it
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"run: device={name!r} cannot be used: {reason} Expected cpu or cuda."
        ) from error
    return torch.device(name)


def opened(run: Run, progress: Progress) -> HATState:
    """A state with the structure that the run's state has at ``progress``.

    Its optimizer state is for the tasks that were opened last.
    """
    phase = progress.phase if progress.epoch or progress.batch else progress.phase - 1
    rows = run.phases[max(phase, 0)]
    return run.learner.begin(run.state, rows[0] if len(rows) == 1 else rows, locked=[])


def learn(run: Run) -> Iterator[Step | Learned]:
    """Learn the remaining tasks one after another; ``run`` is up to date at every yield.

    Raises:
        NonFiniteStepError: a step was refused; ``run.state`` is the state before it.
    """
    began = time.perf_counter() - run.seconds
    for phase in range(run.progress.phase, len(run.phases)):
        rows = run.phases[phase]
        for step in _learn_tasks(run, rows):
            run.seconds = time.perf_counter() - began
            yield step
        run.ranks.check_same(run.state, f"run: after task {rows[-1]}")
        learned = [_measure(run, i, state, rows[-1]) for i, state in enumerate(run.states)]
        run.progress, run.seconds = Progress(phase + 1, 0, 0), time.perf_counter() - began
        for result in run.results:
            result.seconds = run.seconds
        yield _mean_of(learned)


def _learn_tasks(run: Run, rows: list[int]) -> Iterator[Step]:
    """Train one task, or several in the same steps, to the end."""
    config, learner = run.config, run.learner
    # As in a user's code, a single task is an int, and the state of a single seed has no axis for it.
    task: int | list[int] = rows[0] if len(rows) == 1 else rows
    schedule = make_schedule(config)
    data = [[training_part(config, stream[row]) for row in rows] for stream in run.streams]
    count = max(len(part.y) for part in data[0])
    per_epoch = -(-count // run.batch_size)
    if count // per_epoch < run.ranks.size:
        raise ValueError(
            f"run: batches of {count // per_epoch} images for {run.ranks.size} processes. Expected at "
            f"least one image for each process: raise --batch-size ({config.batch_size})."
        )
    steps = per_epoch * config.epochs
    phase, first_epoch, first_batch = run.progress
    if not first_epoch and not first_batch:
        locked: list[int] | None = None if config.method in ("hat", "frozen") else []
        first = next(_epoch(run, data, rows, 0)) if config.init_from and len(rows) == 1 else None
        source = None if first is None else config.init_from
        run.state = learner.begin(run.state, task, locked, config.carry, source, first)
    step = first_epoch * per_epoch + first_batch
    for epoch in range(first_epoch, config.epochs):
        skipped = first_batch if epoch == first_epoch else 0
        rest = islice(enumerate(_epoch(run, data, rows, epoch)), skipped, None)
        for position, (x, y) in rest:
            progress = position / per_epoch if config.period == "epoch" else step / steps
            scale = schedule(progress)
            if config.anneal == "linear":
                falling = torch.full_like(run.state.hyper["lr"], 1 - step / steps)
                run.state = run.state._replace(hyper=run.state.hyper | {"lr": falling})
            with seeded(config.device, mixed(config.seed, rows[-1], epoch, position, run.ranks.rank)):
                run.state, info = learner.update(run.state, (x, y), task, scale, donate=True)
            if not info.ok.all():
                raise NonFiniteStepError(
                    f"run: step {step} of task {task} ({run.stream[rows[-1]].name}) gave loss "
                    f"{info.loss.tolist()} and was refused. Lower lr ({config.lr}), or set max_norm."
                )
            step += 1
            run.progress = Progress(phase, epoch, position + 1)
            outputs = [info.logits] if len(rows) == 1 else info.logits
            labels = [y] if len(rows) == 1 else y.unbind(-2)
            right = [
                accuracy(output_leaves(output)[0], label)
                for output, label in zip(outputs, labels, strict=True)
            ]
            loss, penalty = info.loss.mean().item(), info.penalty.mean().item()
            yield Step(rows[-1], epoch, step, steps, loss, penalty, scale, float(np.mean(right)))
    for row, parts in zip(rows, zip(*data, strict=True), strict=True):
        states = [_closing(run, i, state, row, parts[i]) for i, state in enumerate(run.states)]
        run.state = learner.consolidate(states[0] if len(states) == 1 else stack(states), row, [])


def _epoch(
    run: Run, data: list[list[Part]], rows: list[int], epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch.

    If there are several seeds, the first axis of a batch counts them; if there are several tasks, the
    next axis counts these.

    Args:
        run: the run in progress.
        data: for each seed, the training images of each task; the largest task sets the length of an
            epoch.
        rows: the tasks.
        epoch: the index of the epoch.
    """
    count = max(len(part.y) for part in data[0])

    def of_task(seed: int, row: int, part: Part) -> Iterator[Part]:
        order = torch.Generator().manual_seed(mixed(seed, row, epoch))
        for batch in batches(part, run.batch_size, order, count):
            x, y = map(run.ranks.share, batch)
            yield Part(run.prepare(x), y.to(run.config.device))

    all_batches = [
        [of_task(seed, row, part) for row, part in zip(rows, parts, strict=True)]
        for seed, parts in zip(run.seeds, data, strict=True)
    ]
    for step in zip(*(zip(*tasks, strict=True) for tasks in all_batches), strict=True):
        seeds = [Part(*map(_together, zip(*tasks, strict=True))) for tasks in step]
        x, y = map(_together, zip(*seeds, strict=True))
        yield x, y


def _together(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors, stacked; a single tensor stays as it is."""
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors))
