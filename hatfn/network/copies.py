"""Private copies of modules, with and without tensors, and the names of parameters and buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch
from torch import Tensor, nn

from hatfn.network.closures import copy_functions
from hatfn.network.hooks import OWN_BUFFERS, remove_hooks


def copied(
    module: nn.Module,
    training: bool | None,
    convert: Callable[[Tensor], Tensor] | None = None,
    memo: dict[int, Any] | None = None,
) -> nn.Module:
    """A copy of the module's structure that shares the module's parameters and buffers.

    Closures, partials and hooks of the copy hold the parts of the copy.

    Args:
        module: any module.
        training: True: train mode; False: eval mode; None: each part keeps its mode.
        convert: a function from each parameter and buffer to its replacement in the copy; tied ones
            stay tied. None: the same tensors.
        memo: receives what was copied, {id of the original: copy}.
    """
    memo = {} if memo is None else memo
    for child in module.modules():
        for value in attributes(child):
            if isinstance(value, Tensor) and not value.is_leaf:  # deepcopy refuses these
                memo[id(value)] = value.detach()
    for tensor in (*module.parameters(), *module.buffers()):
        memo[id(tensor)] = tensor if convert is None else convert(tensor)
    fill_functions = copy_functions(module, memo)
    new = copy.deepcopy(module, memo)
    fill_functions()
    for child in new.modules():
        config: Any = getattr(child, "config", None)
        if getattr(config, "use_cache", False) is True:
            config.use_cache = False  # a cache of keys and values would be wrong for other weights
        if isinstance(child, nn.Embedding | nn.EmbeddingBag):
            child.sparse = False  # protection and optimizers work on dense gradients
    # Train mode first: on the switch to it, a module drops results stored in eval mode.
    return new if training is None else new.train().train(training)


def attributes(module: nn.Module) -> list[Any]:
    """The values of a module's attributes, and the items of containers among them."""
    return optree.tree_leaves(list(vars(module).values()))  # type: ignore[arg-type]


def meta_copy(module: nn.Module, training: bool, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy on the meta device: ``functional_call`` must supply every parameter and buffer.

    Args:
        module: any module.
        training: True: train mode; False: eval mode.
        memo: receives what was copied, {id of the original: copy}.
    """

    def empty(tensor: Tensor) -> Tensor:
        hollow = torch.empty_like(tensor, device="meta")
        return (
            nn.Parameter(hollow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow
        )

    return copied(module, training, empty, memo)


def filled(hollow: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """An ordinary module in eval mode, from a meta copy and values; hatfn's hooks are removed.

    Args:
        hollow: from :func:`meta_copy`.
        values: {name: tensor}, all parameters and buffers, of any shape; they are copied.
    """
    names = {id(t): name for name, t in (*hollow.named_parameters(), *hollow.named_buffers())}

    def real(tensor: Tensor) -> Tensor:
        name = names[id(tensor)]
        if name.rpartition(".")[2] in OWN_BUFFERS:
            return tensor
        value = values[name].detach().clone()
        return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value

    new = copied(hollow, False, real)
    remove_hooks(new)
    return new


def measure_statistics(module: nn.Module) -> None:
    """Change a module in eval mode so that batch norms store the statistics of the last batch.

    A module may keep some norms in eval mode even after ``train()``; these do not change.
    """
    training = [child.training for child in copied(module, training=True).modules()]
    for child, trains in zip(module.modules(), training, strict=True):
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.track_running_stats and trains:
            child.train()
            child.momentum = 1.0


def untied(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values for every place where a module registers a tensor; a tied tensor has several places.

    A layer with two names is one place. If ``functional_call`` replaced its tensors under both names,
    it would leave numbers in the module.

    Args:
        module: any module.
        values: {name: tensor}, for the first name of every parameter and buffer.
    """
    first: dict[int, str] = {}
    places = {}
    for path, child in module.named_modules():
        for name, tensor in (*child._parameters.items(), *child._buffers.items()):
            if tensor is not None:
                place = f"{path}.{name}".lstrip(".")
                places[place] = values[first.setdefault(id(tensor), place)]
    return places


def first_names(module: nn.Module) -> dict[str, str]:
    """{name of a parameter or buffer: its first name}; a tied one has several names."""
    names: dict[str, str] = {}
    for walk in (module.named_parameters, module.named_buffers):
        first = {id(tensor): name for name, tensor in walk()}
        names |= {name: first[id(tensor)] for name, tensor in walk(remove_duplicate=False)}
    return names
