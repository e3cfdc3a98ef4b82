"""What a trace asks of a module beside its graph: its statistics, and what it keeps between calls."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from hatfn.network.copies import attributes, copied
from hatfn.tracing.inputs import Call
from hatfn.tracing.reach import watched_call


def remembers(module: nn.Module, call: Call) -> bool:
    """Whether a call in eval mode leaves something behind, as LeViT keeps its table of biases.

    The next call, with another task's parameters, would find it.
    """
    called = copied(module, training=False)
    before = [attributes(child) for child in called.modules()]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a trace is no call of the user's
        called(*call.args, **call.kwargs)
    after = [attributes(child) for child in called.modules()]
    return [[id(leaf) for leaf in leaves] for leaves in before] != [
        [id(leaf) for leaf in leaves] for leaves in after
    ]


def changed_buffers(module: nn.Module, call: Call, names: dict[str, str]) -> tuple[str, ...]:
    """The buffers that training changes: norms' statistics, and whatever one step changes."""
    values, before = watched_call(module, call, training=True), dict(module.named_buffers())
    if not before:
        return ()
    trained = copied(module, training=True)
    changed = {name for name in before if not torch.equal(values[name], before[name])}
    for path, child in trained.named_modules(remove_duplicate=False):
        if isinstance(child, nn.modules.batchnorm._NormBase) and child.training:
            changed |= {names[f"{path}.{name}".lstrip(".")] for name, _ in child.named_buffers()}
    return tuple(name for name in before if name in changed)
