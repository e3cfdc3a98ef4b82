"""vit_pytorch: small vision transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch

from hatfn.experiments.rows import Sample

TRUNK: dict[str, Any] = {"num_classes": 4, "dim": 64, "depth": 2, "heads": 4}
"""Two layers of 64 features."""

FLAT = {**TRUNK, "image_size": 32, "patch_size": 4, "mlp_dim": 128}
"""The same on patches of four pixels."""

STAGES: dict[str, Any] = {"num_classes": 4, "dim": (16, 32, 64, 64), "depth": (1, 1, 1, 1)}
"""Four stages of one layer each."""


def models() -> Mapping[str, Callable[[], Sample]]:
    """How to build each."""
    plain = {
        "ViT": "vit.ViT",
        "SimpleViT": "simple_vit.SimpleViT",
        "DeepViT": "deepvit.DeepViT",
        "RvT": "rvt.RvT",
        "ViT for small datasets": "vit_for_small_dataset.ViT",
        "ViT with memory": "learnable_memory_vit.ViT",
        "ViT with normed keys": "simple_vit_with_qk_norm.SimpleViT",
        "ViT with registers": "simple_vit_with_register_tokens.SimpleViT",
        "ViT with value residual": "simple_vit_with_value_residual.SimpleViT",
        "ViT with decorrelation": "vit_with_decorr.ViT",
        "normalized ViT": "normalized_vit.nViT",
    }
    found = {name: partial(_build, path, **FLAT) for name, path in plain.items()}
    found |= {
        "ParallelViT": partial(_build, "parallel_vit.ViT", **FLAT, num_parallel_branches=2),
        "CaiT": partial(_build, "cait.CaiT", **FLAT, cls_depth=1),
        "XCiT": partial(_build, "xcit.XCiT", **FLAT, cls_depth=1),
        "ViT with patch dropout": partial(
            _build, "vit_with_patch_dropout.ViT", **FLAT, patch_dropout=0.2
        ),
        "ViT with patch merger": partial(
            _build, "vit_with_patch_merger.ViT", **FLAT, patch_merge_layer=1, patch_merge_num_tokens=8
        ),
        "ViT with FFT": partial(_build, "simple_vit_with_fft.SimpleViT", **FLAT, freq_patch_size=4),
        "T2TViT": partial(
            _build, "t2t.T2TViT", image_size=32, **TRUNK, mlp_dim=128, t2t_layers=((3, 2), (3, 2))
        ),
        "PiT": partial(_build, "pit.PiT", **{**FLAT, "patch_size": 8, "depth": (1, 2), "heads": 2}),
        "LeViT": partial(
            _build,
            "levit.LeViT",
            **{**TRUNK, "dim": (64, 96), "heads": (2, 4)},
            image_size=64,
            mlp_mult=2,
            stages=2,
        ),
        "CCT": partial(
            _build,
            "cct.CCT",
            img_size=32,
            embedding_dim=64,
            n_conv_layers=1,
            num_layers=4,
            num_heads=4,
            mlp_ratio=2.0,
            num_classes=4,
            positional_embedding="learnable",
        ),
        "CrossFormer": partial(
            _build,
            "crossformer.CrossFormer",
            **{**STAGES, "dim": (32, 32, 64, 64)},
            global_window_size=(4, 2, 2, 1),
            local_window_size=(2, 2, 2, 1),
        ),
        "RegionViT": partial(_build, "regionvit.RegionViT", **STAGES, window_size=2, side=64),
        "SepViT": partial(
            _build, "sep_vit.SepViT", num_classes=4, dim=32, heads=(1, 2), depth=(1, 2), side=56
        ),
        "MaxViT": partial(
            _build,
            "max_vit.MaxViT",
            num_classes=4,
            dim=32,
            depth=(1, 1),
            dim_conv_stem=16,
            window_size=4,
        ),
        "NesT": partial(
            _build,
            "nest.NesT",
            image_size=32,
            patch_size=4,
            num_classes=4,
            dim=32,
            heads=2,
            num_hierarchies=2,
            block_repeats=(1, 1),
        ),
        "MobileViT": partial(
            _build,
            "mobile_vit.MobileViT",
            image_size=(64, 64),
            dims=[32, 48, 64],
            channels=[8, 16, 24, 24, 32, 32, 48, 48, 64, 64, 128],
            num_classes=4,
        ),
        "ScalableViT": partial(
            _build,
            "scalable_vit.ScalableViT",
            num_classes=4,
            dim=32,
            heads=(1, 2),
            depth=(1, 1),
            reduction_factor=(2, 1),
            window_size=(8, 4),
        ),
        "CvT": partial(_build, "cvt.CvT", num_classes=4, s3_depth=2, side=64),
        "TwinsSVT": partial(
            _build,
            "twins_svt.TwinsSVT",
            num_classes=4,
            side=64,
            **{f"s{stage}_{key}": value for stage in (1, 2, 3, 4) for key, value in _TWINS.items()},
        ),
    }
    return found


_TWINS = {"emb_dim": 64, "patch_size": 2, "local_patch_size": 2, "global_k": 2, "depth": 1}


def _build(path: str, side: int = 32, **options: Any) -> Sample:
    file, name = path.split(".")
    module = getattr(import_module(f"vit_pytorch.{file}"), name)(**options)
    size = options.get("image_size", side)
    side = size if isinstance(size, int) else size[0]
    return Sample(module, torch.randn(2, 3, side, side), f"{side} px")
