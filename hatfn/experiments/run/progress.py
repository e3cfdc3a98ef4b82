"""A run in progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from hatfn.engine.ranks import ALONE, Ranks
from hatfn.experiments.run.config import RunConfig
from hatfn.experiments.run.result import Result, mean
from hatfn.experiments.streams import Task
from hatfn.learner import HAT
from hatfn.replicas import Replicas, replica
from hatfn.state import HATState


class Step(NamedTuple):
    """One training step, as it is shown and logged; numbers are means over seeds and tasks."""

    task: int
    epoch: int
    step: int
    steps: int
    loss: float
    penalty: float
    scale: float
    accuracy: float


class Progress(NamedTuple):
    """How far a run is: the batch with which it goes on.

    Attributes:
        phase: index of the phase; each phase trains one task, or several together.
        epoch: index of the epoch in the phase.
        batch: index of the batch in the epoch. At batch 0 of epoch 0 the phase has not begun.
    """

    phase: int
    epoch: int
    batch: int


@dataclass
class Run:
    """A run in progress, of one seed or of several at once.

    Attributes:
        config: its settings.
        seeds: the seeds of its replicas.
        streams: the tasks of each seed.
        prepare: the function from images of a stream to inputs of the module, on its device.
        hat: the learner.
        state: the state after the last step; stacked if there are several seeds.
        results: the measurements so far, for each seed.
        logits: for each seed, {task: its logits when it was learned}; drift is measured against them.
        progress: how far it is.
        ranks: the processes that train it together, each on its share of every batch.
        seconds: the time that it took so far, without interruptions.
    """

    config: RunConfig
    seeds: list[int]
    streams: list[list[Task]]
    prepare: Callable[[Tensor], Tensor]
    hat: HAT
    state: HATState
    results: list[Result]
    logits: list[dict[int, Tensor]]
    progress: Progress
    ranks: Ranks = ALONE
    seconds: float = 0.0

    @property
    def batch_size(self) -> int:
        """Images per step, over all processes."""
        return self.config.batch_size * (self.config.processes or 1)

    @property
    def phases(self) -> list[list[int]]:
        """The tasks of each phase, which are trained together."""
        tasks = list(range(len(self.stream)))
        return [tasks] if self.config.method == "joint" else [[task] for task in tasks]

    @property
    def stream(self) -> list[Task]:
        """The tasks of the first seed."""
        return self.streams[0]

    @property
    def result(self) -> Result:
        """The measurements so far; for several seeds, their mean."""
        return mean(self.results)

    @property
    def learner(self) -> HAT | Replicas:
        """The learner that takes ``state``: for one seed, or for stacked states."""
        return self.hat if len(self.seeds) == 1 else Replicas(self.hat)

    @property
    def states(self) -> list[HATState]:
        """The state of each seed."""
        if len(self.seeds) == 1:
            return [self.state]
        return [replica(self.state, index) for index in range(len(self.seeds))]
