"""Make a sequence of tasks from a data set."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from hatfn.experiments.streams.parts import Part, Plan, Source


def split(source: Source, tasks: int | None, seed: int) -> list[Plan]:
    """Tasks with classes / tasks classes each, in the usual order of the classes."""
    classes = source.classes
    count = (5 if classes == 10 else 10) if tasks is None else tasks
    possible = [n for n in range(1, classes // 2 + 1) if classes % n == 0]
    if count not in possible:
        raise ValueError(
            f"stream: {count} tasks of the {classes} classes of {source.name}, but every task needs "
            f"the same number, at least two. Expected one of {', '.join(map(str, possible))}."
        )
    width = classes // count

    def plan(first: int) -> Plan:
        def only(data: Part) -> Part:
            mine = (data.y >= first) & (data.y < first + width)
            return Part(data.x[mine], data.y[mine] - first)

        return Plan(f"{source.name} {first}-{first + width - 1}", width, source, only)

    return [plan(first) for first in range(0, classes, width)]


def permuted(source: Source, tasks: int | None, seed: int) -> list[Plan]:
    """Tasks with all classes; each after the first has its own random permutation of the pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = source.parts["train"].x[0, 0].numel()

    def plan(index: int) -> Plan:
        order = torch.randperm(pixels, generator=generator) if index else torch.arange(pixels)

        def permute(data: Part) -> Part:
            return Part(data.x.flatten(2)[:, :, order].reshape(data.x.shape), data.y)

        return Plan(f"permutation {index}", source.classes, source, permute)

    return [plan(index) for index in range(10 if tasks is None else tasks)]


def rotated(source: Source, tasks: int | None, seed: int) -> list[Plan]:
    """Tasks with all classes, each rotated by 180 / tasks degrees more than the task before."""
    count = 5 if tasks is None else tasks

    def plan(angle: float) -> Plan:
        def turn(data: Part) -> Part:
            turned = v2.functional.rotate(data.x, angle, v2.InterpolationMode.BILINEAR)
            return Part(turned, data.y)

        return Plan(f"{angle:g} degrees", source.classes, source, turn)

    return [plan(180 * index / count) for index in range(count)]


def mixture(sources: list[Source]) -> list[Plan]:
    """Tasks with a data set each, with its own number of classes, as colour images of 32x32 pixels."""
    return [Plan(one.name, one.classes, one, _coloured) for one in sources]


def _coloured(data: Part) -> Part:
    return Part(framed(data.x).expand(-1, 3, -1, -1), data.y)


def framed(x: Tensor) -> Tensor:
    """Images of 28x28 pixels with a black frame, which makes them 32x32; others stay as they are."""
    return nn.functional.pad(x, [2, 2, 2, 2]) if x.shape[-2:] == (28, 28) else x
