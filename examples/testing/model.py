"""A model and a step of somebody's own: what test_model.py holds to hatfn's contracts."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class TwoRoads(nn.Module):
    """Two branches over an image, one of them gated by the other."""

    def __init__(self, classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.wide, self.deep = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, classes)."""
        x = torch.relu(self.norm(self.stem(x)))
        wide = torch.tanh(self.wide(x))
        both = torch.cat([wide, wide * torch.relu(self.deep(x))], 1)
        return self.head(both.mean((2, 3)))


class Average(NamedTuple):
    """A running average of weights: of how many steps, and the weights."""

    steps: Tensor
    params: dict[str, Tensor]


def average(state: Average, params: dict[str, Tensor]) -> Average:
    """One step of it; in-place arithmetic here would be found by verify_pure."""
    steps = state.steps + 1
    mean = {name: old + (params[name] - old) / steps for name, old in state.params.items()}
    return Average(steps, mean)
