"""The measurements of a run, after each task and at the end, for one seed or as a mean of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from hatfn.evaluation.metrics import average_accuracy, backward_transfer, forgetting


class Closing(NamedTuple):
    """The readiness of a task at the end of its training; see :func:`hatfn.readiness`.

    Attributes:
        undecided: number of units whose gates are not yet binary.
        gap: by how much binary gates raise the loss on training images.
        recalibrated: whether its batch-norm statistics were re-estimated; for several seeds, the share.
    """

    undecided: float
    gap: float
    recalibrated: float


class Learned(NamedTuple):
    """The measurements after a task was learned, as they are shown and logged.

    The last three fields are those of :class:`Closing`. ``class_incremental`` and ``task_inference``
    are empty if they were not measured.
    """

    task: int
    name: str
    accuracies: list[float]
    class_incremental: list[float]
    task_inference: list[float]
    drift: float
    free_capacity: dict[str, float]
    free_weights: float
    undecided: float
    gap: float
    recalibrated: float


@dataclass
class Result:
    """All measurements of a run so far.

    Attributes:
        names: the names of the tasks.
        accuracy_matrix: row i: after task i; column j: accuracy on task j, NaN for j > i.
        class_incremental: the same with the task inferred among those learned so far; rows that were
            not measured are NaN.
        task_inference: after the last task, for each task the share of images whose inferred task is
            right.
        drift: after each task, the largest change of any logit of any earlier task since it was
            learned.
        usage: after the last task, for each group, the share of units that each task uses, and the
            free share.
        memory: bytes of each part of the state after the last task.
        free_units: after each task, {group: share of units that no task uses}.
        free_weights: after each task, the share of shared weights that no task depends on.
        closings: the :class:`Closing` of each task.
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
    closings: list[Closing] = field(default_factory=list)
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

    @classmethod
    def of(cls, names: list[str]) -> Result:
        """A result without measurements."""
        empty = np.full((len(names),) * 2, np.nan)
        return cls(names, empty, empty.copy(), empty[0].copy())


def to_json(result: Result) -> dict[str, Any]:
    """A result as JSON, without usage and memory, which follow from the state."""
    return {
        "accuracy_matrix": result.accuracy_matrix.tolist(),
        "class_incremental": result.class_incremental.tolist(),
        "task_inference": result.task_inference.tolist(),
        "drift": result.drift,
        "free_units": result.free_units,
        "free_weights": result.free_weights,
        "closings": result.closings,
        "seconds": result.seconds,
    }


def from_json(names: list[str], data: dict[str, Any]) -> Result:
    """The result from the data of :func:`to_json`, without usage and memory.

    Raises:
        KeyError, TypeError, ValueError: the data is something else.
    """
    tasks, done = len(names), len(data["drift"])

    def numbers(name: str, *shape: int) -> np.ndarray:
        found = np.array(data[name], dtype=float)
        if found.shape != shape:
            raise ValueError(f"{name} is {found.shape}, expected {shape}")
        return found

    closings = np.array(data["closings"], dtype=float).reshape(-1, len(Closing._fields))
    return Result(
        names,
        numbers("accuracy_matrix", tasks, tasks),
        numbers("class_incremental", tasks, tasks),
        numbers("task_inference", tasks),
        drift=numbers("drift", done).tolist(),
        free_units=[{str(g): float(v) for g, v in free.items()} for free in data["free_units"]],
        free_weights=numbers("free_weights", done).tolist(),
        closings=[Closing(*closing) for closing in closings.tolist()],
        seconds=float(data["seconds"]),
    )


def mean(results: Sequence[Result]) -> Result:
    """The mean of the results of several seeds; but the largest drift, and the memory of one seed."""
    if len(results) == 1:
        return results[0]
    first = results[0]

    def over(pick: Callable[[Result], Any]) -> Any:
        values = [pick(result) for result in results]
        return sum(values[1:], start=values[0]) / len(values)

    def free(phase: int, group: str) -> float:
        return float(over(lambda result: result.free_units[phase][group]))

    phases = range(len(first.drift))
    return Result(
        first.names,
        over(lambda result: result.accuracy_matrix),
        over(lambda result: result.class_incremental),
        over(lambda result: result.task_inference),
        [max(result.drift[phase] for result in results) for phase in phases],
        over(lambda result: result.usage),
        first.memory,
        [{group: free(phase, group) for group in first.free_units[phase]} for phase in phases],
        over(lambda result: np.array(result.free_weights)).tolist(),
        [Closing(*row) for row in over(lambda result: np.array(result.closings)).tolist()],
        first.seconds,
    )
