"""Networks of the papers, registered with timm: ``timm.create_model("resnet18s")`` after this import.

The ``s`` of resnet18s and resnet34s stands for small images: a 3x3 stem of stride 1 and no pooling
behind it, for 32x32 pixels. Residual branches start at full scale, not at timm's zero. The one with
bottlenecks is resnet50_small, because timm has given the name resnet50s to another network. ``MLP``
and ``AlexNet`` are the networks of Serrà et al. 2018.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

__all__ = ["MLP", "AlexNet", "resnet18s", "resnet34s", "resnet50_small", "small_image_resnet"]


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


def small_image_resnet(zero_init_last: bool = False, **kwargs: Any) -> ResNet:
    """timm's ResNet with a stem for 32x32 images, and residual branches that start at full scale.

    Its class is timm's, which is all that it needs. Every task begins with norms as they are here:
    scales of zero would have to grow in each one anew.
    """
    module = ResNet(zero_init_last=zero_init_last, **kwargs)
    stem = nn.Conv2d(kwargs.get("in_chans", 3), 64, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    module.add_module("conv1", stem)
    module.add_module("maxpool", nn.Identity())
    return module


_SMALL = {
    "num_classes": 1000,
    "input_size": (3, 32, 32),
    "pool_size": (4, 4),
    "first_conv": "conv1",
    "classifier": "fc",
}
_NAMES = ("resnet18s", "resnet34s", "resnet50_small")
default_cfgs = generate_default_cfgs(dict.fromkeys(_NAMES, _SMALL))
"""Where timm looks for what it should know of the models that this file registers."""


def _resnet(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(small_image_resnet, name, pretrained, **kwargs)


@register_model
def resnet18s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 for 32x32 images."""
    return _resnet("resnet18s", pretrained, block=BasicBlock, layers=(2, 2, 2, 2), **kwargs)


@register_model
def resnet34s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-34 for 32x32 images."""
    return _resnet("resnet34s", pretrained, block=BasicBlock, layers=(3, 4, 6, 3), **kwargs)


@register_model
def resnet50_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50, with bottlenecks, for 32x32 images."""
    return _resnet("resnet50_small", pretrained, block=Bottleneck, layers=(3, 4, 6, 3), **kwargs)
