"""Hooks on the layers of a private module: they gate outputs and skip units that are off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hatfn.numerics.zeros import drop

GATE = "hatfn_gate"
"""The buffer with the gate of a layer's output; if it is empty, the output is not gated."""

COLUMNS = "hatfn_columns"
"""The buffer with the indices of the input that a layer reads; if it is empty, it reads all."""

BACK = "hatfn_back"
"""The buffer with the index of each output among the computed ones; if empty, all are computed."""

OWN_BUFFERS = (GATE, COLUMNS, BACK)
"""The names of the buffers that hatfn adds to layers."""


def hook_gates(module: nn.Module, paths: Iterable[str]) -> None:
    """Add the buffer ``GATE`` to layers, and a hook that multiplies their output by it.

    Args:
        module: from :func:`~hatfn.network.copies.meta_copy`; it is changed.
        paths: the paths of the layers.
    """
    for path in paths:
        layer = module.get_submodule(path)
        layer.register_buffer(GATE, torch.empty(0, device="meta"))
        layer.register_forward_hook(_gated)


def hook_skips(module: nn.Module, paths: Iterable[str]) -> None:
    """Add the buffers ``COLUMNS`` and ``BACK`` to layers, and hooks that let them use smaller weights.

    Args:
        module: from :func:`~hatfn.network.copies.meta_copy`; it is changed.
        paths: the paths of the layers.
    """
    for path in paths:
        layer = module.get_submodule(path)
        for name in (COLUMNS, BACK):
            layer.register_buffer(name, torch.empty(0, dtype=torch.int64, device="meta"))
        layer.register_forward_pre_hook(_narrowed)
        layer.register_forward_hook(_widened, prepend=True)  # the user's hooks see the full size


def hook_outputs(module: nn.Module) -> None:
    """Make a module return only tensors, numbers and strings, in the same containers.

    Other values are left out, such as the cache of keys and values that language models return.

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
        other = [name for name, value in output.items() if not _is_plain(value)]
        kept = {name: value for name, value in output.items() if name not in other}
        return type(output)(**kept) if other else output
    return pytree.tree_map(lambda leaf: leaf if isinstance(leaf, _PLAIN) else None, output)


def _is_plain(value: Any) -> bool:
    return all(isinstance(leaf, _PLAIN) for leaf in pytree.tree_leaves(value))


def _gated(layer: nn.Module, _: object, output: Tensor) -> Tensor:
    gate = layer.get_buffer(GATE)
    if not gate.numel():
        return output
    if gate.dtype == torch.bool:  # a product with 0 would turn an overflow into a nan
        return drop(~gate, output)
    return output * gate.to(output.dtype)


def _narrowed(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    columns = layer.get_buffer(COLUMNS)
    return (_picked(layer, inputs[0], columns),) if columns.numel() else None


def _widened(layer: nn.Module, _: object, output: Tensor) -> Tensor:
    back = layer.get_buffer(BACK)
    return _picked(layer, output, back) if back.numel() else output


def _picked(layer: nn.Module, value: Tensor, index: Tensor) -> Tensor:
    """Select features: the last axis of a linear layer, the channel axis of a convolution."""
    weight: Tensor = layer._parameters["weight"]  # type: ignore[assignment]
    if weight.dim() > 2:
        return value.index_select(1 - weight.dim(), index)
    # On a CPU, index_select on the last of two axes is ten times as fast as on the last of three.
    return value.flatten(0, -2).index_select(-1, index).reshape(*value.shape[:-1], len(index))
