"""Streams of tasks from real data, the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.transforms import v2

StreamName = Literal["split-digits", "permuted-digits", "rotated-digits"]
SPLIT_SEED = 0
"""Which images are test and validation images never changes, so that runs can be compared."""


class Part(NamedTuple):
    """Images (B, C, H, W) in [0, 1] and labels (B,), counted within the task."""

    x: Tensor
    y: Tensor


class Task(NamedTuple):
    """One task: its data and the number of its classes."""

    name: str
    classes: int
    train: Part
    validation: Part
    test: Part


def make_stream(name: StreamName, tasks: int | None, seed: int) -> list[Task]:
    """A sequence of tasks on scikit-learn's 1,797 handwritten digits of 8x8 pixels.

    A fifth of the images is for testing, a fifth of the rest for validation, in proportion to the
    digits. "split-digits": tasks of 10 / tasks digits each (default 5 tasks), in the usual order.
    "permuted-digits": all ten digits, in every task after the first under another random permutation
    of the pixels (default 10). "rotated-digits": all ten, turned by 180 / tasks degrees more in every
    task (default 5).

    Args:
        name: which stream.
        tasks: number of tasks; None: the stream's default. For "split-digits" a divisor of 10.
        seed: of the permutations.

    Raises:
        ValueError: an unknown stream, or a number of tasks that it cannot have.
    """
    makers: dict[str, Callable[[int | None, int], list[Task]]] = {
        "split-digits": _split,
        "permuted-digits": _permuted,
        "rotated-digits": _rotated,
    }
    if name not in makers:
        raise ValueError(f"stream: {name!r}. Expected one of {', '.join(makers)}.")
    if tasks is not None and tasks < 1:
        raise ValueError(f"stream: tasks={tasks}. Expected at least 1.")
    return makers[name](tasks, seed)


def digits() -> dict[str, Part]:
    """scikit-learn's digits as {"train", "validation", "test"}, each (B, 1, 8, 8) in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(
        range(len(labels)), test_size=0.2, random_state=SPLIT_SEED, stratify=labels
    )
    train, validation = train_test_split(
        rest, test_size=0.2, random_state=SPLIT_SEED, stratify=labels[rest]
    )
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels, dtype=torch.long)
    parts = {"train": train, "validation": validation, "test": test}
    return {name: Part(x[rows], y[rows]) for name, rows in parts.items()}


def _transformed(name: str, change: Callable[[Tensor], Tensor]) -> Task:
    parts = {part: Part(change(data.x), data.y) for part, data in digits().items()}
    return Task(name, 10, **parts)


def _split(tasks: int | None, seed: int) -> list[Task]:
    count = 5 if tasks is None else tasks
    if 10 % count or count == 10:
        raise ValueError(f"stream: {count} tasks of ten digits. Expected 1, 2 or 5.")
    width = 10 // count

    def only(data: Part, first: int) -> Part:
        mine = (data.y >= first) & (data.y < first + width)
        return Part(data.x[mine], data.y[mine] - first)

    stream = []
    for first in range(0, 10, width):
        parts = {part: only(data, first) for part, data in digits().items()}
        stream.append(Task(f"digits {first}-{first + width - 1}", width, **parts))
    return stream


def _permuted(tasks: int | None, seed: int) -> list[Task]:
    generator = torch.Generator().manual_seed(seed)
    stream = []
    for index in range(10 if tasks is None else tasks):
        order = torch.randperm(64, generator=generator) if index else torch.arange(64)

        def permute(x: Tensor, order: Tensor = order) -> Tensor:
            return x.flatten(1)[:, order].reshape(x.shape)

        stream.append(_transformed(f"permutation {index}", permute))
    return stream


def _rotated(tasks: int | None, seed: int) -> list[Task]:
    count = 5 if tasks is None else tasks
    stream = []
    for index in range(count):
        angle = 180 * index / count

        def turn(x: Tensor, angle: float = angle) -> Tensor:
            turned: Tensor = v2.functional.rotate(x, angle, v2.InterpolationMode.BILINEAR)
            return turned

        stream.append(_transformed(f"{angle:g} degrees", turn))
    return stream
