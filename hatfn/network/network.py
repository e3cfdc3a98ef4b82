"""The static half of a learner: the module's structure, its wiring and tensors that never change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from hatfn.network.checkpointing import recomputes, start_checkpointing, stop_checkpointing
from hatfn.network.copies import first_names, measure_statistics, meta_copy
from hatfn.network.head import inner_names, with_head
from hatfn.network.hooks import hook_gates, hook_outputs, hook_skips
from hatfn.network.skipping import Skippables, find_skippable
from hatfn.network.together import Work, measured
from hatfn.wiring import Units, Wiring

Output = Any
"""What a module returns: a tensor, or a tuple or dict of tensors."""


class Network(NamedTuple):
    """The static half of a learner: no step changes it.

    Attributes:
        train: a meta copy of the module in train mode.
        evaluate: a meta copy in eval mode.
        calibrate: a meta copy in eval mode, in which batch norms store the statistics of each batch.
        plain: a meta copy in eval mode that has neither hooks for gates nor an added head.
        wiring: the wiring of the module, including an added head.
        outputs: {path of a layer: units}, the layers whose output can be gated instead of parameters.
        skippable: the layers that can skip dead units, in eval mode.
        work: the work of the module for one sample.
        initial: {name: tensor}, the values of parameters and buffers at build().
        constants: {name: tensor}, the buffers that training does not change.
        classes: the number of classes of each task; None: tasks use the module's own output.
        heads: the names of the heads' parameters, whose first axis counts classes.
        names: {name of a parameter or buffer: its name in the module}, if the two differ.
        untrained: {name: tensor}, the parameters with ``requires_grad=False``; no state holds them.
        precision: the type of number of ``torch.autocast``; None: no autocast.
        recomputes: whether the module checkpoints activations in train mode.
        tied: whether a parameter or buffer has several names. If not, calls need not look for ties.
    """

    train: nn.Module
    evaluate: nn.Module
    calibrate: nn.Module
    plain: nn.Module
    wiring: Wiring
    outputs: dict[str, Units]
    skippable: Skippables
    work: Work
    initial: dict[str, Tensor]
    constants: dict[str, Tensor]
    classes: tuple[int, ...] | None
    heads: tuple[str, ...]
    names: Mapping[str, str]
    untrained: dict[str, Tensor]
    precision: torch.dtype | None
    recomputes: bool
    tied: bool


def make_network(
    module: nn.Module,
    wiring: Wiring,
    classes: Sequence[int] | None,
    precision: torch.dtype | None = None,
    grad_checkpointing: bool = False,
) -> Network:
    """The network of a module; the module itself is neither changed nor kept.

    Args:
        module: the traced module.
        wiring: its wiring. If it has no heads and there are classes, a head is put behind the module.
        classes: the number of classes of each task, or None.
        precision: the type of number of ``torch.autocast``, or None.
        grad_checkpointing: switch on the checkpointing that the module offers.

    Raises:
        ValueError: ``grad_checkpointing`` is set, and the module does not offer it.
    """
    plain = meta_copy(module, False)
    if classes is not None and not wiring.heads:
        module, wiring = with_head(module, wiring)
    names = inner_names(module)
    outer = {inner: name for name, inner in names.items()}
    tensors = (*module.named_parameters(), *module.named_buffers())
    initial = {outer.get(name, name): tensor.detach().clone() for name, tensor in tensors}
    buffers = [outer.get(name, name) for name, _ in module.named_buffers()]
    heads = tuple(name for head in wiring.heads for name in head if name is not None)
    parameters = module.named_parameters()
    untrained = {outer.get(name, name) for name, p in parameters if not p.requires_grad} - {*heads}
    roles = {
        name: role._replace(kind="untrained") if name in untrained else role
        for name, role in wiring.params.items()
    }
    wiring = replace(wiring, params=roles)
    with unset_fake_temporarily():  # a wiring has numbers, also where a learner is built without any
        outputs = wiring.outputs
    device = next((tensor.device for tensor in initial.values()), torch.device("cpu"))

    train, evaluate, calibrate = (meta_copy(module, training) for training in (True, False, False))
    skippable = find_skippable(module, wiring, device)
    for each in (evaluate, calibrate, plain):  # checkpointing saves memory only in training
        stop_checkpointing(each)
    for each in (train, evaluate, calibrate, plain):
        hook_outputs(each)
    if grad_checkpointing:
        start_checkpointing(train)
    for each in (train, evaluate, calibrate):
        hook_gates(each, outputs)
    hook_skips(evaluate, skippable.layers)
    measure_statistics(calibrate)
    return Network(
        train=train,
        evaluate=evaluate,
        calibrate=calibrate,
        plain=plain,
        wiring=wiring.to(device),
        outputs={path: units.to(device) for path, units in outputs.items()},
        skippable=skippable,
        work=measured(module, wiring, names),
        initial=initial,
        constants={name: initial[name] for name in buffers if name not in wiring.buffers},
        classes=None if classes is None else tuple(classes),
        heads=heads,
        names=names,
        untrained={name: initial[name] for name in roles if name in untrained},
        precision=precision,
        recomputes=grad_checkpointing or recomputes(train),
        tied=any(name != first for name, first in first_names(module).items()),
    )
