"""What streams are made of: data sets in three parts, and tasks that show them changed."""

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
"""Which images are validation images never changes, so that runs can be compared."""


class Part(NamedTuple):
    """Images (B, C, H, W) in [0, 1] and labels (B,), counted within the task."""

    x: Tensor
    y: Tensor


class Source(NamedTuple):
    """A data set, before it becomes tasks.

    Attributes:
        name: for the names of tasks.
        classes: how many it has.
        parts: "train", "validation" and "test"; pixels as bytes, or floats in [0, 1].
    """

    name: str
    classes: int
    parts: dict[PartName, Part]


@dataclass(frozen=True)
class Task:
    """One task: its name, the number of its classes, and its data, made when they are asked for.

    Ten permutations of a large data set would fill the memory, and one at a time does not.
    """

    name: str
    classes: int
    read: Callable[[PartName], Part]

    @property
    def train(self) -> Part:
        """What the task is learned from."""
        return self.read("train")

    @property
    def validation(self) -> Part:
        """What settings are chosen by; otherwise more to learn from."""
        return self.read("validation")

    @property
    def test(self) -> Part:
        """What the task is judged by."""
        return self.read("test")


class Plan(NamedTuple):
    """A task to be: a data set, and the change that makes it the task's (of pixels in [0, 1])."""

    name: str
    classes: int
    source: Source
    change: Callable[[Part], Part]


def as_tasks(plans: list[Plan]) -> list[Task]:
    """The tasks of a stream; what was made last is kept, since it is what is asked for next."""

    @lru_cache(maxsize=2)
    def read(index: int, name: PartName) -> Part:
        x, y = plans[index].source.parts[name]
        return plans[index].change(Part(x if x.is_floating_point() else x.float() / 255, y))

    return [Task(plan.name, plan.classes, partial(read, index)) for index, plan in enumerate(plans)]


def divided(train: Part, share: Fraction = Fraction(1, 10)) -> dict[PartName, Part]:
    """Training images in two, with that share of each class (but never all of it) for validation."""
    generator = torch.Generator().manual_seed(mixed(SPLIT_SEED))
    order = torch.randperm(len(train.y), generator=generator)
    held = torch.zeros(len(order), dtype=torch.bool)
    for label in train.y.unique():
        rows = order[train.y[order] == label]
        held[rows[: min(-(-len(rows) * share.numerator // share.denominator), len(rows) - 1)]] = True
    return {
        "train": Part(train.x[~held], train.y[~held]),
        "validation": Part(train.x[held], train.y[held]),
    }
