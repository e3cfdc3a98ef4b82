"""The networks of Serrà et al. 2018."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Fully connected layers with ReLU and dropout; the input is flattened.

    Args:
        features: numbers per sample.
        classes: outputs of the head.
        width: units per hidden layer.
        depth: number of hidden layers, at least 1.
        dropout: probability of dropping a hidden unit, in [0, 1).

    Example:
        >>> MLP(features=64, classes=10)(torch.zeros(2, 8, 8)).shape
        torch.Size([2, 10])

    Source:
        Serrà et al. 2018, section 3 (two layers of 1000 in comparisons of permuted MNIST).
    """

    def __init__(
        self, features: int, classes: int, width: int = 1000, depth: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        sizes = [features] + [width] * depth
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def get_classifier(self) -> nn.Module:
        """The head, under timm's name for it."""
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, classes)."""
        x = x.flatten(1)
        for layer in self.hidden:
            x = self.dropout(torch.relu(layer(x)))
        return self.head(x)  # type: ignore[no-any-return]


class AlexNet(nn.Module):
    """The AlexNet-like network of Serrà et al. 2018 for 32x32 images.

    Convolutions of 64, 128 and 256 channels (4x4, 3x3, 2x2), each with ReLU, dropout and 2x2
    pooling, then two layers of 2048.

    Args:
        classes: outputs of the head.
        channels: of the image.
        width: multiplies every layer's width, > 0.

    Example:
        >>> AlexNet(classes=10, width=0.25)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Source:
        Serrà et al. 2018, section 3.
    """

    def __init__(self, classes: int, channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        a, b, c, d = (max(1, round(units * width)) for units in (64, 128, 256, 2048))
        self.conv1, self.drop1 = nn.Conv2d(channels, a, 4), nn.Dropout(0.2)
        self.conv2, self.drop2 = nn.Conv2d(a, b, 3), nn.Dropout(0.2)
        self.conv3, self.drop3 = nn.Conv2d(b, c, 2), nn.Dropout(0.5)
        self.fc1, self.drop4 = nn.Linear(c * 4, d), nn.Dropout(0.5)
        self.fc2, self.drop5 = nn.Linear(d, d), nn.Dropout(0.5)
        self.head = nn.Linear(d, classes)

    def get_classifier(self) -> nn.Module:
        """The head, under timm's name for it."""
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, 32, 32) -> (B, classes)."""
        for conv, drop in (
            (self.conv1, self.drop1),
            (self.conv2, self.drop2),
            (self.conv3, self.drop3),
        ):
            x = nn.functional.max_pool2d(drop(torch.relu(conv(x))), 2)
        x = self.drop4(torch.relu(self.fc1(x.flatten(1))))
        x = self.drop5(torch.relu(self.fc2(x)))
        return self.head(x)  # type: ignore[no-any-return]
