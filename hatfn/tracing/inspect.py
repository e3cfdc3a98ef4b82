"""Properties of a module that its graph does not show: buffers and attributes that a call changes."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hatfn.network.copies import attributes, copied
from hatfn.tracing.inputs import Call
from hatfn.tracing.reach import watched_call


class Called(NamedTuple):
    """What one call of a module in eval mode shows.

    Attributes:
        remembers: whether it changes attributes of the module, as LeViT stores a table of biases. The
            next call has the parameters of another task and must not read stored results.
        several: the paths of the modules within that return anything but one tensor.
    """

    remembers: bool
    several: frozenset[str]


def called(module: nn.Module, call: Call) -> Called:
    """Call a copy of a module in eval mode: what it leaves behind, and what its layers return."""
    private, several = copied(module, training=False), set[nn.Module]()

    def look(layer: nn.Module, _: object, output: object) -> None:
        if not isinstance(output, Tensor):
            several.add(layer)

    for layer in private.modules():
        layer.register_forward_hook(look)
    before = [attributes(child) for child in private.modules()]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user did not make this call
        private(*call.args, **call.kwargs)
    after = [attributes(child) for child in private.modules()]
    remembers = [[id(leaf) for leaf in leaves] for leaves in before] != [
        [id(leaf) for leaf in leaves] for leaves in after
    ]
    layers = private.named_modules(remove_duplicate=False)
    return Called(remembers, frozenset(path for path, layer in layers if layer in several))


def changed_buffers(module: nn.Module, call: Call, names: dict[str, str]) -> tuple[str, ...]:
    """The buffers that training changes: statistics of norms, and all that one call changes."""
    values, before = watched_call(module, call, training=True), dict(module.named_buffers())
    if not before:
        return ()
    trained = copied(module, training=True)
    changed = {name for name in before if not torch.equal(values[name], before[name])}
    for path, child in trained.named_modules(remove_duplicate=False):
        if isinstance(child, nn.modules.batchnorm._NormBase) and child.training:
            changed |= {names[f"{path}.{name}".lstrip(".")] for name, _ in child.named_buffers()}
    return tuple(name for name in before if name in changed)
