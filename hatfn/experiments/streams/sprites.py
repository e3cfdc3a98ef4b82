"""Infinite dSprites: random shapes, each seen at any scale, orientation and position."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from hatfn.experiments.streams.parts import Part, PartName, Source
from hatfn.experiments.streams.sources import needed
from hatfn.numerics.seeds import mixed, numpy_seeded

IMAGES: dict[PartName, int] = {"train": 160, "validation": 40, "test": 20}
"""Images per shape."""
OVERSAMPLING = 4
"""How much larger shapes are drawn before pixels are averaged, because corners lie on whole pixels."""


def sprites(
    shapes: int, seed: int, side: Literal[32, 64] = 32, images: dict[PartName, int] | None = None
) -> Source:
    """A data set with a class for each shape; shape k does not depend on the number of shapes.

    The package idsprites draws the outlines, and half of each shape black, which shows its orientation.
    Factors are uniform over the ranges of the paper's benchmark: scale in [0.5, 1], any orientation, a
    centre in the middle half of the image. Shapes are white.

    Args:
        shapes: the number of shapes.
        seed: the seed of the outlines and of the factors.
        side: the side in pixels; images are (B, 3, side, side).
        images: the number of images per shape in each part; None: IMAGES.

    Raises:
        ImportError: idsprites is not installed.

    Source: Dziadzio et al. 2023, arXiv 2312.16731.
    """
    images = IMAGES if images is None else images
    package = needed("idsprites", "dsprites")
    painter = package.InfiniteDSprites(img_size=side * OVERSAMPLING)
    pictures = np.stack(
        [_pictures(package, painter, seed, shape, sum(images.values())) for shape in range(shapes)]
    )
    x = torch.from_numpy(pictures)
    parts: dict[PartName, Part] = {}
    for (name, count), part in zip(images.items(), x.split(list(images.values()), 1), strict=True):
        parts[name] = Part(part.flatten(0, 1), torch.arange(shapes).repeat_interleave(count))
    return Source("shapes", shapes, parts)


def _pictures(package: Any, painter: Any, seed: int, shape: int, count: int) -> Any:
    """(count, 3, side, side) bytes."""
    with numpy_seeded(mixed(seed, shape)):
        outline = painter.generate_shape()
    random = np.random.default_rng(mixed(seed, shape, 1))
    side = painter.img_size // OVERSAMPLING
    drawn = np.empty((count, 3, side, side), np.uint8)
    for index in range(count):
        factors = package.Factors(
            shape=outline,
            color=np.ones(3),
            shape_id=shape,
            scale=random.uniform(0.5, 1),
            orientation=random.uniform(0, 2 * np.pi),
            position_x=random.uniform(),
            position_y=random.uniform(),
        )
        large = painter.draw(factors).reshape(3, side, OVERSAMPLING, side, OVERSAMPLING)
        drawn[index] = np.rint(large.sum(2).sum(3) * (255 / OVERSAMPLING**2))
    return drawn
