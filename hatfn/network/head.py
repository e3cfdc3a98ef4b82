"""Put a classifier behind a module that has none: one module with one wiring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hatfn.wiring import Head, ParamWiring, Wiring

BODY = "body."
"""The prefix of the names of a module inside :class:`Headed`."""


class Headed(nn.Module):
    """A module, and a linear head on the features that it returns."""

    def __init__(self, body: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The logits (B, C), for features (B, D).

        Raises:
            ValueError: the module does not return a tensor.
        """
        features = self.body(*args, **kwargs)
        if not isinstance(features, Tensor):
            raise ValueError(
                f"the module returns a {type(features).__name__}, behind which no classifier can be "
                f"put. Name those it has: trace(module, x, head=(...)), or build with classes=None."
            )
        return self.head(features)  # type: ignore[no-any-return]


def with_head(module: nn.Module, wiring: Wiring) -> tuple[Headed, Wiring]:
    """A module with a head behind it, and the wiring of both.

    The head has no rows, because each task has its own head. In the wiring, parameters of the module
    keep their names, and those of the head are "head.weight" and "head.bias".
    """
    example = next(module.parameters(), torch.empty(0))
    shape = (0, *wiring.output_shape)
    head = nn.Linear(shape[-1], 1, device="meta")
    head.out_features = 0
    head.weight = nn.Parameter(torch.empty(shape, dtype=example.dtype, device=example.device))
    head.bias = nn.Parameter(torch.empty(0, dtype=example.dtype, device=example.device))
    added = {
        "head.weight": ParamWiring(shape, "head", in_units=wiring.output),
        "head.bias": ParamWiring((0,), "head"),
    }
    layers = {
        f"{BODY}{path}": layer._replace(readers=tuple(f"{BODY}{reader}" for reader in layer.readers))
        for path, layer in wiring.layers.items()
    }
    whole = replace(
        wiring,
        params={**wiring.params, **added},
        heads=(Head("head.weight", "head.bias"),),
        layers=layers,
    )
    return Headed(module, head), whole


def inner_names(module: nn.Module) -> Mapping[str, str]:
    """{name in a state: name in the module} if the two differ, as they do in :class:`Headed`."""
    if not isinstance(module, Headed):
        return {}
    tensors = (*module.body.named_parameters(), *module.body.named_buffers())
    return {name: BODY + name for name, _ in tensors}
