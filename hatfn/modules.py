"""Copies and names of modules: what hatfn needs of ``nn.Module`` beside calling it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hatfn.wiring import Head


def twin(
    module: nn.Module, training: bool, convert: Callable[[Tensor], Tensor] | None = None
) -> nn.Module:
    """A copy of the module's structure, in train or eval mode, that shares the module's tensors.

    Args:
        module: any.
        training: train or eval mode.
        convert: what to put in the place of each parameter and buffer; tied ones stay tied.
    """
    memo: dict[int, object] = {}
    for child in module.modules():
        for value in vars(child).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # computed: cannot be copied
                memo[id(value)] = value.detach()
    for tensor in (*module.parameters(), *module.buffers()):
        memo[id(tensor)] = tensor if convert is None else convert(tensor)
    return copy.deepcopy(module, memo).train(training)


def skeleton(module: nn.Module, training: bool) -> nn.Module:
    """A twin without numbers: ``functional_call`` must supply every parameter and buffer."""

    def empty(tensor: Tensor) -> Tensor:
        hollow = torch.empty_like(tensor, device="meta")
        return (
            nn.Parameter(hollow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow
        )

    return twin(module, training, empty)


def measuring(module: nn.Module) -> nn.Module:
    """The module with batch norms in train mode whose running statistics become those of each batch.

    Only the norms that ``train()`` puts in train mode: a module may keep some of them frozen.
    """
    training = [child.training for child in twin(module, training=True).modules()]
    for child, trains in zip(module.modules(), training, strict=True):
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.track_running_stats and trains:
            child.train()
            child.momentum = 1.0
    return module


def first_names(module: nn.Module) -> dict[str, str]:
    """{every name of every parameter and buffer: its first name}: tied ones have several."""
    names: dict[str, str] = {}
    for walk in (module.named_parameters, module.named_buffers):
        first = {id(tensor): name for name, tensor in walk()}
        names |= {name: first[id(tensor)] for name, tensor in walk(remove_duplicate=False)}
    return names


def find_heads(module: nn.Module, head: str | tuple[str, ...] | None) -> list[Head]:
    """The parameters of the classifier's layers.

    Args:
        module: any.
        head: names of the layers; None asks timm's ``get_classifier``, and finds none where there is
            none.

    Raises:
        ValueError: a name that the module does not have, or that is no layer whose first dimension
            counts classes.
    """
    modules = dict(module.named_modules())
    if head is None:
        found = module.get_classifier() if hasattr(module, "get_classifier") else ()  # type: ignore[operator]
        wanted = found if isinstance(found, tuple | list) else (found,)
        layers = [name for name, child in modules.items() if any(child is w for w in wanted)]
        layers = [name for name in layers if _is_head(modules[name])]
    else:
        layers = [head] if isinstance(head, str) else list(head)
    for name in layers:
        if not _is_head(modules.get(name)):
            known = [other for other, child in modules.items() if _is_head(child)]
            raise ValueError(
                f"trace: head={name!r} names no linear or (ungrouped) convolution layer of "
                f"{type(module).__name__}. Expected one of its own, such as {known[-1:]}."
            )
    first = first_names(module)
    return [
        Head(first[f"{name}.weight".lstrip(".")], first.get(f"{name}.bias".lstrip(".")))
        for name in layers
    ]


def _is_head(module: nn.Module | None) -> bool:
    """Whether the weight is a parameter whose rows are classes."""
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    return "weight" in module._parameters and getattr(module, "groups", 1) == 1
