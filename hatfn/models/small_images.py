"""ResNets for 32x32 images, registered with timm: ``timm.create_model("resnet18s")``.

The ``s`` of resnet18s and resnet34s stands for small images: a 3x3 stem of stride 1 without pooling
after it. Residual branches start at full scale, not at zero as in timm. The ResNet-50 is called
resnet50_small, because timm uses the name resnet50s for another network.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn


def small_image_resnet(zero_init_last: bool = False, **kwargs: Any) -> ResNet:
    """timm's ResNet with a stem for 32x32 images, and residual branches that start at full scale.

    The result is an object of timm's own class. Every task starts with the norms of the module, so if
    branches started at zero, their scales would have to grow again in every task.
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
"""The settings that timm reads for the models of this file."""


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
