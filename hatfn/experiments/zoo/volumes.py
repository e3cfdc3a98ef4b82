"""Networks for scans and for segmentation: MONAI and segmentation_models_pytorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch

from hatfn.experiments.rows import Sample

Models = Mapping[str, Callable[[], Sample]]

UNET: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}
"""A network from one channel to three classes for each pixel."""

STEPS: dict[str, Any] = {"channels": (16, 32, 64), "strides": (2, 2)}
"""Two steps down and up."""


def monai() -> Models:
    """Classifiers and segmentations, of planes and of volumes."""

    def unet(name: str, **options: Any) -> Callable[[], Sample]:
        return partial(_monai, name, (32, 32), **UNET, **options)

    volume = {**UNET, "spatial_dims": 3}
    classes = {"spatial_dims": 2, "in_channels": 1, "num_classes": 4}
    return {
        "DenseNet": partial(
            _monai, "DenseNet", (32, 32), **UNET, init_features=16, growth_rate=8, block_config=(2, 2)
        ),
        "DenseNet121": partial(_monai, "DenseNet121", (64, 64), **UNET),
        "EfficientNetBN": partial(
            _monai,
            "EfficientNetBN",
            (64, 64),
            **classes,
            model_name="efficientnet-b0",
            pretrained=False,
        ),
        "ResNet": partial(
            _monai,
            "ResNet",
            (16, 32, 32),
            block="basic",
            layers=[1, 1, 1, 1],
            block_inplanes=[16, 32, 64, 64],
            n_input_channels=1,
            num_classes=4,
        ),
        "SENet": partial(
            _monai,
            "SENet",
            (32, 32),
            spatial_dims=2,
            in_channels=1,
            block="se_resnetxt_bottleneck",
            layers=(1, 1, 1, 1),
            groups=8,
            reduction=8,
            num_classes=4,
        ),
        "ViT": partial(
            _monai,
            "ViT",
            (16, 16, 16),
            in_channels=1,
            img_size=16,
            patch_size=4,
            hidden_size=64,
            mlp_dim=128,
            num_layers=4,
            num_heads=4,
            classification=True,
            num_classes=4,
            post_activation="",
        ),
        "FullyConnectedNet": partial(
            _monai, "FullyConnectedNet", None, in_channels=10, out_channels=4, hidden_channels=(64, 64)
        ),
        "UNet": unet("UNet", **STEPS, num_res_units=2),
        "AttentionUnet": unet("AttentionUnet", **STEPS),
        "BasicUNet": unet("BasicUNet", features=(16, 16, 32, 64, 64, 16)),
        "BasicUNetPlusPlus": unet("BasicUNetPlusPlus", features=(16, 16, 32, 64, 64, 16)),
        "DynUNet": unet(
            "DynUNet",
            kernel_size=[3, 3, 3],
            strides=[1, 2, 2],
            upsample_kernel_size=[2, 2],
            filters=[16, 32, 64],
        ),
        "SegResNet": unet("SegResNet", init_filters=16, blocks_down=(1, 1, 1), blocks_up=(1, 1)),
        "SegResNetDS": unet("SegResNetDS", init_filters=16, blocks_down=(1, 1, 1)),
        "HighResNet": unet("HighResNet"),
        "VNet": partial(_monai, "VNet", (32, 32), **UNET),
        "UNETR": unet("UNETR", img_size=32, feature_size=16, hidden_size=64, mlp_dim=128, num_heads=4),
        "SwinUNETR": partial(_monai, "SwinUNETR", (64, 64), **UNET, feature_size=12, window_size=4),
        "MedNeXt": partial(
            _monai,
            "MedNeXt",
            (32, 32),
            **UNET,
            init_filters=16,
            encoder_expansion_ratio=2,
            decoder_expansion_ratio=2,
            bottleneck_expansion_ratio=2,
            blocks_down=(1, 1),
            blocks_bottleneck=1,
            blocks_up=(1, 1),
        ),
        "FlexibleUNet": partial(
            _monai,
            "FlexibleUNet",
            (64, 64),
            in_channels=3,
            out_channels=3,
            backbone="efficientnet-b0",
            spatial_dims=2,
        ),
        "AutoEncoder": unet("AutoEncoder", channels=(16, 32, 64), strides=(2, 2, 2)),
        "UNet of volumes": partial(_monai, "UNet", (16, 16, 16), **volume, **STEPS),
        "AHNet": partial(
            _monai,
            "AHNet",
            (32, 32, 32),
            layers=(1, 1, 1, 1),
            psp_block_num=2,
            spatial_dims=3,
            in_channels=1,
            out_channels=3,
        ),
    }


def _monai(name: str, size: tuple[int, ...] | None, **options: Any) -> Sample:
    module = getattr(import_module("monai.networks.nets"), name)(**options)
    if size is None:
        return Sample(module, torch.randn(2, options["in_channels"]), "rows")
    channels = options.get("in_channels", options.get("n_input_channels", 1))
    return Sample(module, torch.randn(2, channels, *size), " x ".join(map(str, size)) + " px")


def segmentation() -> Models:
    """Every decoder of segmentation_models_pytorch, behind small encoders."""
    light: dict[str, Any] = {"encoder_name": "resnet18", "encoder_weights": None, "classes": 3}
    names = (
        "Unet",
        "UnetPlusPlus",
        "MAnet",
        "Linknet",
        "FPN",
        "PSPNet",
        "DeepLabV3",
        "DeepLabV3Plus",
    )
    found = {name: partial(_segmentation, name, **light) for name in names}
    mobile = {**light, "encoder_name": "timm-mobilenetv3_small_075"}
    found |= {
        f"{name} of MobileNetV3": partial(_segmentation, name, **mobile) for name in ("Unet", "FPN")
    }
    found["Segformer"] = partial(_segmentation, "Segformer", **{**light, "encoder_name": "mit_b0"})
    found["UPerNet"] = partial(_segmentation, "UPerNet", **light)
    found["PAN"] = partial(_segmentation, "PAN", 128, **light)
    vit = {**light, "encoder_name": "tu-vit_tiny_patch16_224", "dynamic_img_size": True}
    found["DPT"] = partial(_segmentation, "DPT", **vit)
    return found


def _segmentation(name: str, side: int = 64, **options: Any) -> Sample:
    module = getattr(import_module("segmentation_models_pytorch"), name)(**options)
    built = f"{side} px, {options['encoder_name']}"
    return Sample(module, torch.randn(2, 3, side, side), built)
