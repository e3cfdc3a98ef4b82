"""Numbers under which a module shows what its layers do."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def lively(values: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Values under which every layer passes signal when half of its inputs are off.

    Matrices keep the variance; scales are near 1; biases and means are small; no layer starts at zero
    or at 1e-6, as trained-from-scratch recipes have it, because nothing behind it could be tested.

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
