"""The models of timm to trace: one by its name, or the smallest of every family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import timm
import torch

from hatfn.experiments.rows import Entry, Page, Sample, examine, sweep

SIDES = (64, 96, 128, 160, 224)
"""Image sizes to try, in pixels: small images make the perturbation test affordable."""

REDUCED: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"depth": 2},
    "deepseek_vit_412m": {"depth": 2},
    "gemma4_vit_167m": {"depth": 2},
    "naflexvit_base_patch16_parfac_gap": {"depth": 2},
    "qwen3_vit_88m": {"depth": 6},
    "samvit_base_patch16_224": {"depth": 2, "global_attn_indexes": (1,)},
    "vgg11": {"mlp_ratio": 0.1},
}
"""Options that make large models small enough for the perturbation test on a small machine."""


PAGE = Page(
    title="The smallest model of every family of timm, traced",
    made="hatfn trace --all --verify --out examples/families.md",
    source="family",
    versions=f"timm {timm.__version__}",
    notes={
        "gemma4_vit": "positions are one-hot vectors times a table, and layers clamp by tensors: "
        "neither has a rule that keeps units, so the residual stream is ungated.",
        "vision_transformer": "a sixth of the weights of this small model read the image, which has no "
        "gates; deit_tiny is the same architecture at its usual size.",
        "vision_transformer_relpos": "a tenth of the weights of this small model read the image.",
    },
)
"""What examples/families.md says besides its rows."""


def make(name: str, side: int | None = None) -> Sample:
    """A model, an image that it accepts, and how they were made.

    Args:
        name: the name in timm.
        side: the side of the image in pixels; None: the smallest of ``SIDES`` that the model accepts.

    Raises:
        ValueError: the model does not exist, or no size fits.
    """
    if not timm.is_model(name):
        raise ValueError(f"trace: {name!r} is not a timm model. Expected one of timm.list_models().")
    reduced = REDUCED.get(name, {})
    config = timm.get_pretrained_cfg(name)
    channels, *default = (config.input_size if config else None) or (3, 224, 224)
    for size in dict.fromkeys([side] if side else [*SIDES, max(default)]):
        options: list[dict[str, Any]] = [{"img_size": size}, {}]
        for sized in options:
            try:
                module = timm.create_model(name, **reduced, **sized)
                x = torch.randn(2, channels, size, size)
                with torch.no_grad():
                    module.eval()(x)
            except Exception:  # timm raises many kinds of errors if a size does not fit
                continue
            built = [f"{size} px", *(f"{k}={v}" for k, v in reduced.items())]
            return Sample(module, x, ", ".join(built))
    raise ValueError(
        f"trace: {name} does not accept an image of {side or SIDES} pixels. Write another --side."
    )


def families() -> list[str]:
    """The modules of timm that have models; not those that other packages register."""
    return [name for name in timm.list_modules() if find_spec(f"timm.models.{name}") is not None]


def smallest(family: str) -> str:
    """The name of the family's model with the fewest parameters."""

    def count(name: str) -> float:
        try:
            with torch.device("meta"):
                module = timm.create_model(name)
        except Exception:  # a few models cannot be built on the meta device
            return float("inf")
        return sum(p.numel() for p in module.parameters())

    return min(timm.list_models(module=family), key=count)


def entries(chosen: Sequence[str], verify: bool) -> Iterator[Entry]:
    """Yield the row of each chosen family."""
    return sweep(_row, [(family, "") for family in chosen], verify, ())


def _row(family: str, _: str, verify: bool) -> Entry:
    name = smallest(family)
    return examine(family, name, partial(make, name), verify)
