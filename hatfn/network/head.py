"""A classifier behind a module that has none: the two as one module, with one wiring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hatfn.wiring import Head, ParamWiring, Wiring

BODY = "body."
"""What stands before the names of a module that has a head behind it."""


class Headed(nn.Module):
    """A module, and a linear layer on the features that it returns."""

    def __init__(self, body: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The logits (B, C)."""
        features = self.body(*args, **kwargs)
        if not isinstance(features, Tensor):
            raise ValueError(
                f"the module returns a {type(features).__name__}, behind which no classifier can be "
                f"put. Name those it has: trace(module, x, head=(...)), or build with classes=None."
            )
        return self.head(features)  # type: ignore[no-any-return]


def with_head(module: nn.Module, wiring: Wiring) -> tuple[Headed, Wiring]:
    """A module with a head behind it, and their wiring.

    The head has no rows: every task brings its own. Parameters keep the names that they have in the
    module; those of the head are "head.weight" and "head.bias".
    """
    some = next(module.parameters(), torch.empty(0))
    shape = (0, *wiring.output_shape)
    head = nn.Linear(shape[-1], 1, device="meta")
    head.out_features = 0
    head.weight = nn.Parameter(torch.empty(shape, dtype=some.dtype, device=some.device))
    head.bias = nn.Parameter(torch.empty(0, dtype=some.dtype, device=some.device))
    own = {
        "head.weight": ParamWiring(shape, "head", in_units=wiring.output),
        "head.bias": ParamWiring((0,), "head"),
    }
    layers = {
        f"{BODY}{path}": layer._replace(readers=tuple(f"{BODY}{reader}" for reader in layer.readers))
        for path, layer in wiring.layers.items()
    }
    whole = replace(
        wiring,
        params={**wiring.params, **own},
        heads=(Head("head.weight", "head.bias"),),
        layers=layers,
    )
    return Headed(module, head), whole


def inner_names(module: nn.Module) -> Mapping[str, str]:
    """{name in a state: name in the module}, where the two differ: behind a head."""
    if not isinstance(module, Headed):
        return {}
    tensors = (*module.body.named_parameters(), *module.body.named_buffers())
    return {name: BODY + name for name, _ in tensors}
