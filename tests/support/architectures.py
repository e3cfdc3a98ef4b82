"""Twelve kinds of architecture, each as small as possible."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torchopt
from timm.models.metaformer import MetaFormer
from timm.models.mlp_mixer import MlpMixer
from torch import nn

import hatfn

ARCHITECTURES: dict[str, tuple[str | Callable[..., nn.Module], dict[str, Any]]] = {
    "residual": ("test_resnet", {}),
    "dense": ("densenet121", {"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
    "depthwise": ("test_convnext", {}),
    "squeeze-excite": ("test_efficientnet", {}),
    "transformer": ("test_vit", {"img_size": 64}),
    "windowed attention": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4},
    ),
    "mixer": (MlpMixer, {"img_size": 64, "embed_dim": 32, "num_blocks": 2}),
    "hybrid": ("test_coatnet", {"img_size": 64}),
    "normaliser-free": ("test_nfnet", {}),
    "gated convolution": ("test_mambaout", {}),
    "class attention": (
        "cait_xxs24_224", {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 4},
    ),
    "learnable activation": (MetaFormer, {"dims": (16, 24), "depths": (1, 1)}),
}  # fmt: skip


def build(kind: str, classes: list[int], dtype: torch.dtype = torch.float32) -> tuple[hatfn.HAT, Any]:
    """A learner of that kind, and the shape of its inputs."""
    make, settings = ARCHITECTURES[kind]
    make = partial(timm.create_model, make) if isinstance(make, str) else make
    module = make(num_classes=4, **settings).to(dtype)
    x = torch.randn(4, 3, 64, 64, dtype=dtype)
    wiring = hatfn.trace(module, x)
    assert not wiring.fallbacks
    optimizer = torchopt.adamw(1e-2, weight_decay=0.1)
    return hatfn.build(module, wiring, classes, optimizer, s_max=60.0, sparsity=0.0), x
