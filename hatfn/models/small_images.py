"""ResNets for 32x32 images, registered with timm: ``timm.create_model("resnet18s")``.

The ``s`` of resnet18s and resnet34s stands for small images: a 3x3 stem of stride 1 and no pooling
behind it. Residual branches start at full scale, not at timm's zero. The one with bottlenecks is
resnet50_small, because timm has given the name resnet50s to another network.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn


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
