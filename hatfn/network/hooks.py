"""Hooks on the layers of a private module: gating what a layer returns, leaving out what is off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hatfn.numerics.zeros import drop

GATE = "hatfn_gate"
"""The buffer by which a layer's output is gated; an empty one gates nothing."""

COLUMNS = "hatfn_columns"
"""The buffer with the places of its input that a layer reads; an empty one reads all."""

BACK = "hatfn_back"
"""The buffer with the place of each output among those that a layer makes; an empty one makes all."""

OWN_BUFFERS = (GATE, COLUMNS, BACK)
"""The names of the buffers that hatfn adds to layers."""


def hook_gates(module: nn.Module, paths: Iterable[str]) -> None:
    """Give layers a buffer, ``GATE``, by which they gate what they return.

    Args:
        module: from :func:`~hatfn.network.copies.meta_copy`; it is changed.
        paths: of the layers.
    """
    for path in paths:
        layer = module.get_submodule(path)
        layer.register_buffer(GATE, torch.empty(0, device="meta"))
        layer.register_forward_hook(_gated)


def hook_skips(module: nn.Module, paths: Iterable[str]) -> None:
    """Give layers two buffers, ``COLUMNS`` and ``BACK``, so that they can work with a smaller weight.

    Args:
        module: from :func:`~hatfn.network.copies.meta_copy`; it is changed.
        paths: of the layers.
    """
    for path in paths:
        layer = module.get_submodule(path)
        for name in (COLUMNS, BACK):
            layer.register_buffer(name, torch.empty(0, dtype=torch.int64, device="meta"))
        layer.register_forward_pre_hook(_narrowed)
        layer.register_forward_hook(_widened, prepend=True)  # the user's hooks see the full size


def hook_outputs(module: nn.Module) -> None:
    """Have a module return only tensors and plain values, in its own containers.

    A cache of keys and values, as language models return it, is left out.

    Args:
        module: from :func:`~hatfn.network.copies.copied`; it is changed.
    """
    module.register_forward_hook(_plain)


def remove_hooks(module: nn.Module) -> None:
    """Remove hatfn's hooks and buffers from a module; other hooks stay."""
    ours = (_gated, _narrowed, _widened, _plain)
    for layer in module.modules():
        for name in OWN_BUFFERS:
            layer._buffers.pop(name, None)
        for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook in ours]:
                del hooks[key]


_PLAIN = (Tensor, bool, int, float, str, type(None))


def _plain(_: nn.Module, __: object, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        odd = [name for name, value in output.items() if not _is_plain(value)]
        kept = {name: value for name, value in output.items() if name not in odd}
        return type(output)(**kept) if odd else output
    return pytree.tree_map(lambda leaf: leaf if isinstance(leaf, _PLAIN) else None, output)


def _is_plain(value: Any) -> bool:
    return all(isinstance(leaf, _PLAIN) for leaf in pytree.tree_leaves(value))


def _gated(layer: nn.Module, _: object, output: Tensor) -> Tensor:
    gate = layer.get_buffer(GATE)
    if not gate.numel():
        return output
    if gate.dtype == torch.bool:  # a product would make an overflow in a row that is off a nan
        return drop(~gate, output)
    return output * gate.to(output.dtype)


def _narrowed(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    columns = layer.get_buffer(COLUMNS)
    return (_picked(layer, inputs[0], columns),) if columns.numel() else None


def _widened(layer: nn.Module, _: object, output: Tensor) -> Tensor:
    back = layer.get_buffer(BACK)
    return _picked(layer, output, back) if back.numel() else output


def _picked(layer: nn.Module, value: Tensor, index: Tensor) -> Tensor:
    """Some entries along the axis that the layer's weight mixes: the last, or the one before space."""
    weight: Tensor = layer._parameters["weight"]  # type: ignore[assignment]
    if weight.dim() > 2:
        return value.index_select(1 - weight.dim(), index)
    # Along the last of two axes a CPU picks ten times as fast as along the last of three.
    return value.flatten(0, -2).index_select(-1, index).reshape(*value.shape[:-1], len(index))
