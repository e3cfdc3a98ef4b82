"""Classifiers of images and videos: torchvision and pytorchcv."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch

from hatfn.experiments.rows import Sample

Models = Mapping[str, Callable[[], Sample]]


def torchvision() -> Models:
    """Models of images by the side of the image, of videos by their size."""
    sides = {
        "alexnet": 64, "convnext_tiny": 64, "densenet121": 64, "efficientnet_b0": 64,
        "efficientnet_v2_s": 64, "googlenet": 64, "inception_v3": 96, "mnasnet0_5": 64,
        "mobilenet_v2": 64, "mobilenet_v3_small": 64, "regnet_x_400mf": 64, "regnet_y_400mf": 64,
        "resnet18": 64, "resnext50_32x4d": 64, "shufflenet_v2_x0_5": 64, "squeezenet1_1": 64,
        "swin_t": 64, "swin_v2_t": 64, "lraspp_mobilenet_v3_large": 64,
        "deeplabv3_mobilenet_v3_large": 64, "fcn_resnet50": 64,
    }  # fmt: skip
    videos = {"mc3_18": (8, 32), "r3d_18": (8, 32), "r2plus1d_18": (8, 32)}
    models = {name: partial(_torchvision, name, (side, side)) for name, side in sides.items()}
    models |= {n: partial(_torchvision, n, (t, side, side)) for n, (t, side) in videos.items()}
    models["vit_b_32"] = partial(_torchvision, "vit_b_32", (64, 64), image_size=64)
    models["maxvit_t"] = partial(_torchvision, "maxvit_t", (224, 224))
    return models


def _torchvision(name: str, size: tuple[int, ...], **options: Any) -> Sample:
    models = import_module("torchvision.models")
    none: dict[str, Any] = {
        "weights": None,
        **({"weights_backbone": None} if _has_backbone(name) else {}),
    }
    if name in ("googlenet", "inception_v3"):
        none |= {"init_weights": False, "aux_logits": False}  # their draws take a minute
    module = models.get_model(name, **none, **options)
    return Sample(module, torch.randn(2, 3, *size), _pixels(size))


def _has_backbone(name: str) -> bool:
    return name.startswith(("lraspp", "deeplabv3", "fcn"))


def pytorchcv() -> Models:
    """Models of small images (their names say which data they are for), and of 224 pixels."""
    small = (
        "resnet20_cifar10", "preresnet20_cifar10", "resnext20_16x4d_cifar10", "seresnet20_cifar10",
        "sepreresnet20_cifar10", "densenet40_k12_cifar10",
        "xdensenet40_2_k24_bc_cifar10", "nin_cifar10", "ror3_56_cifar10", "rir_cifar10",
        "diaresnet20_cifar10", "diapreresnet20_cifar10",
    )  # fmt: skip
    large = (
        "bninception", "resnet10", "preresnet10", "seresnet10", "cbam_resnet18", "regnetx002",
        "diracnet18v2", "darknet_tiny", "espnetv2_wd2", "dicenet_wd5", "hardnet39ds",
        "squeezenet_v1_1", "shufflenet_g1_wd4", "menet108_8x1_g3", "mobilenet_wd4",
        "fdmobilenet_wd4", "mobilenetv2_wd4", "igcv3_wd4", "ghostnet", "mnasnet_small", "vovnet27s",
    )  # fmt: skip
    models = {name: partial(_pytorchcv, name, 32) for name in small}
    return models | {name: partial(_pytorchcv, name, 224) for name in large}


def _pytorchcv(name: str, side: int) -> Sample:
    get_model = import_module("pytorchcv.model_provider").get_model
    return Sample(get_model(name, pretrained=False), torch.randn(2, 3, side, side), f"{side} px")


def _pixels(size: tuple[int, ...]) -> str:
    frames = f"{size[0]} frames of " if len(size) > 2 else ""
    return f"{frames}{size[-1]} px"
