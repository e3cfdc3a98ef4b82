"""Modules that compute activations again in the backward pass."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from hatfn.network.copies import copied

RECOMPUTES = ("grad_checkpointing", "gradient_checkpointing")
"""Flags by which timm's and transformers' modules know that they checkpoint activations."""


def recomputes(module: nn.Module) -> bool:
    """Whether parts of a module are computed a second time in the backward pass."""
    return any(getattr(child, flag, False) is True for child in module.modules() for flag in RECOMPUTES)


def stop_checkpointing(module: nn.Module) -> None:
    """Switch a module's checkpointing off."""
    for child in module.modules():
        for flag in RECOMPUTES:
            if getattr(child, flag, False) is True:
                setattr(child, flag, False)


def start_checkpointing(module: nn.Module) -> None:
    """Switch a module's checkpointing on, by its own switch or by those of the modules inside.

    Raises:
        ValueError: it offers none.
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
        except AssertionError:  # timm's way to say no
            return False
        return True
    if hasattr(module, "gradient_checkpointing_enable"):
        module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        return True
    offered = [_switch_on(child) for child in module.children()]
    return any(offered)


def keeping(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy that holds numbers of its own, for what it computes again in the backward pass.

    By then ``functional_call`` has taken out the numbers that it put in. Buffers are copies: the second
    pass must neither read nor write what the first pass writes.

    Args:
        module: from :func:`~hatfn.network.copies.meta_copy`.
        values: {name: tensor}, all its parameters and buffers, before the first pass.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    copies = {id(b): values[name].clone() for name, b in module.named_buffers()}
    return copied(module, None, lambda t: values[names[id(t)]] if id(t) in names else copies[id(t)])
