"""Twelve kinds of architecture learn two tasks with everything that moves weights; none forgets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchopt
from nets import learn
from timm.models.metaformer import MetaFormer
from timm.models.mlp_mixer import MlpMixer
from torch import nn

import hatfn
from hatfn.testing import verify_no_forgetting

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


@pytest.mark.filterwarnings("ignore::hatfn.HATWarning")  # the smallest groups are soon used up
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_no_architecture_forgets(kind: str) -> None:
    make, settings = ARCHITECTURES[kind]
    make = partial(timm.create_model, make) if isinstance(make, str) else make
    module = make(num_classes=4, **settings)
    x = torch.randn(4, 3, 64, 64)
    wiring = hatfn.trace(module, x)
    assert not wiring.fallbacks
    hat = hatfn.build(
        module, wiring, [4, 3], torchopt.adamw(1e-2, weight_decay=0.1), s_max=60.0, sparsity=0.0
    )
    state = learn(hat, hat.init(seed=0), x, 0, steps=3)
    logits, weights = hat.forward(state, x, 0), state.params
    state = learn(hat, state, x, 1, steps=3, carry=True)
    assert torch.equal(hat.forward(state, x, 0), logits)
    assert any(not torch.equal(state.params[name], weight) for name, weight in weights.items())
    verify_no_forgetting(hat, state, x)
