"""Activation checkpointing: modules that recompute activations in the backward pass."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from hatfn.network.copies import copied

RECOMPUTES = ("grad_checkpointing", "gradient_checkpointing")
"""The attributes of timm's and transformers' modules that switch checkpointing on."""


def recomputes(module: nn.Module) -> bool:
    """Whether a module, or a module inside it, checkpoints activations."""
    return any(getattr(child, flag, False) is True for child in module.modules() for flag in RECOMPUTES)


def stop_checkpointing(module: nn.Module) -> None:
    """Switch the checkpointing of a module off; the module is changed."""
    for child in module.modules():
        for flag in RECOMPUTES:
            if getattr(child, flag, False) is True:
                setattr(child, flag, False)


def start_checkpointing(module: nn.Module) -> None:
    """Switch the checkpointing of a module, or of the modules inside it, on; the module is changed.

    Raises:
        ValueError: the module does not offer checkpointing.
    """
    if not _switch_on(module) and not recomputes(module):
        raise ValueError(
            f"build: grad_checkpointing=True, but {type(module).__name__} does not offer it. Expected "
            f"a module with set_grad_checkpointing(), as most of timm's have; for others split every "
            f"batch instead: build(accumulate=4)."
        )


def _switch_on(module: nn.Module) -> bool:
    if hasattr(module, "set_grad_checkpointing"):
        try:
            module.set_grad_checkpointing(True)  # type: ignore[operator]
        except AssertionError:  # timm raises it in modules without checkpointing
            return False
        return True
    if hasattr(module, "gradient_checkpointing_enable"):
        module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        return True
    offered = [_switch_on(child) for child in module.children()]
    return any(offered)


def keeping(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the module that holds the given tensors itself.

    The backward pass recomputes activations after ``functional_call`` has removed its tensors from the
    module, so the module needs them. Buffers are cloned: the recomputation must not read or change
    buffers that the forward pass wrote.

    Args:
        module: from :func:`~hatfn.network.copies.meta_copy`.
        values: {name: tensor}, all parameters and buffers, as they are before the forward pass.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    copies = {id(b): values[name].clone() for name, b in module.named_buffers()}
    return copied(module, None, lambda t: values[names[id(t)]] if id(t) in names else copies[id(t)])
