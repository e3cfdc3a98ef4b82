"""The building blocks of streams: data sets in three parts, and tasks that are made from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hatfn.numerics.seeds import mixed

PartName = Literal["train", "validation", "test"]

SPLIT_SEED = 0
"""The seed that chooses validation images; it never changes, so that runs can be compared."""


class Part(NamedTuple):
    """Images (B, C, H, W) in [0, 1] and labels (B,), counted within the task."""

    x: Tensor
    y: Tensor


class Source(NamedTuple):
    """A data set, before it becomes tasks.

    Attributes:
        name: the name that its tasks are called by.
        classes: the number of classes.
        parts: "train", "validation" and "test"; pixels as bytes, or floats in [0, 1].
    """

    name: str
    classes: int
    parts: dict[PartName, Part]


@dataclass(frozen=True)
class Task:
    """One task: its name, its number of classes, and its data.

    The data are made when they are read, because ten permutations of a large data set do not fit in
    memory together.
    """

    name: str
    classes: int
    read: Callable[[PartName], Part]

    @property
    def train(self) -> Part:
        """The images that the task is learned from."""
        return self.read("train")

    @property
    def validation(self) -> Part:
        """The images to choose settings with; otherwise the task is learned from these, too."""
        return self.read("validation")

    @property
    def test(self) -> Part:
        """The images that measure the task."""
        return self.read("test")


class Plan(NamedTuple):
    """The plan of a task: a data set, and the function from its parts to those of the task.

    The function receives pixels in [0, 1].
    """

    name: str
    classes: int
    source: Source
    change: Callable[[Part], Part]


def as_tasks(plans: list[Plan]) -> list[Task]:
    """The tasks of a stream; the two parts that were made last are cached."""

    @lru_cache(maxsize=2)
    def read(index: int, name: PartName) -> Part:
        x, y = plans[index].source.parts[name]
        return plans[index].change(Part(x if x.is_floating_point() else x.float() / 255, y))

    return [Task(plan.name, plan.classes, partial(read, index)) for index, plan in enumerate(plans)]


def divided(train: Part, share: Fraction = Fraction(1, 10)) -> dict[PartName, Part]:
    """Split training images in two; validation gets that share of each class, but never all of it."""
    generator = torch.Generator().manual_seed(mixed(SPLIT_SEED))
    order = torch.randperm(len(train.y), generator=generator)
    chosen = torch.zeros(len(order), dtype=torch.bool)
    for label in train.y.unique():
        rows = order[train.y[order] == label]
        chosen[rows[: min(-(-len(rows) * share.numerator // share.denominator), len(rows) - 1)]] = True
    return {
        "train": Part(train.x[~chosen], train.y[~chosen]),
        "validation": Part(train.x[chosen], train.y[chosen]),
    }
