"""Random weights for tests of a wiring: with them every layer passes signal."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def lively(values: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Random values with which every layer passes signal if half of its inputs are off.

    Matrices keep the variance, N(0, 4 / fan_in). Scales and variances are in [0.5, 1.5], biases and
    means in [-0.25, 0.25]. Training recipes start some layers at 0 or 1e-6; such a layer would hide
    everything before it from a test.

    Args:
        values: {name: tensor}, parameters and running statistics; integers stay as they are.
        generator: a CPU generator.
    """

    def draw(name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        if value.dim() > 1:
            fan_in = max(value.numel() // max(len(value), 1), 1)
            return torch.randn(value.shape, generator=generator).to(value) * math.sqrt(4 / fan_in)
        positive = name.rpartition(".")[2] in ("weight", "gamma", "running_var", "scale")
        spread = torch.rand(value.shape, generator=generator).to(value)
        return spread + 0.5 if positive else (spread - 0.5) / 2

    return {name: draw(name, value) for name, value in values.items()}
