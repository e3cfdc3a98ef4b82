"""Properties of a module that its graph does not show: buffers and attributes that a call changes."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from hatfn.network.copies import attributes, copied
from hatfn.tracing.inputs import Call
from hatfn.tracing.reach import watched_call


def remembers(module: nn.Module, call: Call) -> bool:
    """Whether a call in eval mode changes attributes of the module, as LeViT stores a table of biases.

    The next call has the parameters of another task and must not read stored results.
    """
    called = copied(module, training=False)
    before = [attributes(child) for child in called.modules()]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user did not make this call
        called(*call.args, **call.kwargs)
    after = [attributes(child) for child in called.modules()]
    return [[id(leaf) for leaf in leaves] for leaves in before] != [
        [id(leaf) for leaf in leaves] for leaves in after
    ]


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
