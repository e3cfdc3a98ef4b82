"""Make the tasks of a stream from its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

from sklearn.utils import shuffle

from hatfn.experiments.config import StreamName
from hatfn.experiments.streams import files, sources
from hatfn.experiments.streams.parts import Plan, Source, Task, as_tasks
from hatfn.experiments.streams.sequences import mixture, permuted, rotated, split
from hatfn.experiments.streams.sprites import sprites

SEQUENCES: dict[str, Callable[[Source, int | None, int], list[Plan]]] = {
    "split": split,
    "permuted": permuted,
    "rotated": rotated,
}

MIXTURE = (
    *("cifar10", "cifar100", "mnist", "svhn"),
    *("fashionmnist", "trafficsigns", "facescrub", "notmnist"),
)
"""The data sets of the mixture, in the order that the paper's code shuffles."""

SHAPES_PER_TASK = 5

SENSELESS = {
    "rotated-mnist1d": "MNIST-1D has signals, which cannot be rotated",
    "rotated-dsprites": "dSprites are rotated at random already, so all tasks would be the same",
}


def make_stream(
    name: StreamName,
    tasks: int | None = None,
    seed: int = 0,
    data_dir: Path | None = None,
    image_size: int | None = None,
) -> list[Task]:
    """A sequence of tasks: a data set, split, permuted or rotated, or a mixture of data sets.

    "split-...": every task has the same number of classes, in their usual order (default: 5 tasks of
    a data set with ten classes, 10 tasks of others). "permuted-...": every task has all classes, and
    after the first task each has its own random permutation of the pixels (default 10). "rotated-...":
    every task has all classes, rotated by 180 / tasks degrees more than the task before (default 5).
    "mixture": eight data sets, each a task of colour images of 32x32 pixels, in an order that depends
    on the seed (Serrà et al. 2018).

    The data sets are digits (scikit-learn's 1,797 of 8x8 pixels; a fifth of the images is for testing,
    a fifth of the rest for validation), mnist, fashionmnist, cifar10 and cifar100 (from files),
    mnist1d, and dsprites (generated: 5 new shapes for every task if they are split, ten if permuted).

    Args:
        name: the name of the stream.
        tasks: the number of tasks; None: the default. If a data set is split, it must divide the number
            of classes; for a mixture it is at most 8.
        seed: the seed of permutations, of dsprites' shapes and images, and of the mixture's order.
        data_dir: the folder of the files, for streams that are read from files.
        image_size: the side in pixels of the images that the model reads. dsprites have 32 pixels if it
            is at most 32, and else 64.

    Raises:
        ValueError: an unknown stream, an impossible number of tasks, or missing files.
        ImportError: the package of the data set is not installed.

    Example:
        >>> [task.name for task in make_stream("split-digits", tasks=2, seed=0)]
        ['digits 0-4', 'digits 5-9']
    """
    if name in SENSELESS:
        raise ValueError(f"stream: {name!r}: {SENSELESS[name]}. Expected split or permuted.")
    if name not in get_args(StreamName):
        raise ValueError(f"stream: {name!r}. Expected one of {', '.join(get_args(StreamName))}.")
    if tasks is not None and tasks < 1:
        raise ValueError(f"stream: tasks={tasks}. Expected at least 1.")
    if name == "mixture":
        return as_tasks(mixture(files.load(_order(tasks, seed), data_dir, name)))
    kind, _, data = name.partition("-")
    source = _source(data, name, tasks, seed, data_dir, image_size)
    return as_tasks(SEQUENCES[kind](source, tasks, seed))


def _order(tasks: int | None, seed: int) -> list[str]:
    """The first data sets of the mixture, in the order that the seed gives, as in the paper's code."""
    if tasks is not None and tasks > len(MIXTURE):
        raise ValueError(f"stream: mixture of {tasks} tasks. Expected at most {len(MIXTURE)}.")
    order: list[str] = shuffle(MIXTURE, random_state=seed)
    return list(order[:tasks])


def _source(
    data: str, stream: str, tasks: int | None, seed: int, folder: Path | None, side: int | None
) -> Source:
    if data in files.FILE_SETS:
        return files.load([data], folder, stream)[0]
    if data == "digits":
        return Source("digits", 10, sources.digits())
    if data == "mnist1d":
        return sources.mnist1d()
    groups = (10 if tasks is None else tasks) if stream.startswith("split") else 2
    return sprites(SHAPES_PER_TASK * groups, seed, 32 if side is None or side <= 32 else 64)
