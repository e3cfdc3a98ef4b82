"""The static half of a learner: the module's structure and its wiring, without what tasks change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hatfn.network.checkpointing import recomputes, start_checkpointing, stop_checkpointing
from hatfn.network.copies import first_names, measure_statistics, meta_copy
from hatfn.network.hooks import hook_gates, hook_skips
from hatfn.network.skipping import Skippable, find_skippable
from hatfn.wiring import Units, Wiring

Output = Any
"""What a module returns: a tensor, or a tuple or dict of tensors."""


class Network(NamedTuple):
    """The static half of a learner: what no task changes.

    Attributes:
        train: the module's structure in train mode, without numbers.
        evaluate: the same in eval mode.
        calibrate: the same in eval mode, but batch norms take the statistics of each batch.
        wiring: which units gate which parameters.
        outputs: {path of a layer: units that can gate what it returns in the place of its parameters}.
        skippable: {path of a layer: where units lie along its weight}, in eval mode.
        initial: {name: tensor}, the module's own parameters and buffers.
        constants: {name: tensor}, the buffers that training does not change.
        classes: classes of each task; None: the module's output as it is.
        heads: names of the heads' parameters, which lead with the classes.
        added: whether the head is a linear layer put behind the module.
        frozen: names of the parameters that the module does not train (``requires_grad=False``).
        precision: of the module's arithmetic under ``torch.autocast``; None: that of its numbers.
        recomputes: whether the module checkpoints activations in train mode.
        tied: whether a parameter or buffer has several names; looking for them costs each call.
    """

    train: nn.Module
    evaluate: nn.Module
    calibrate: nn.Module
    wiring: Wiring
    outputs: dict[str, Units]
    skippable: dict[str, Skippable]
    initial: dict[str, Tensor]
    constants: dict[str, Tensor]
    classes: tuple[int, ...] | None
    heads: tuple[str, ...]
    added: bool
    frozen: frozenset[str]
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
    """Take from a module what calling it needs; the module itself is neither changed nor kept."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    initial = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    buffers = [name for name, _ in module.named_buffers()]
    device = next((tensor.device for tensor in initial.values()), torch.device("cpu"))
    own = tuple(name for head in wiring.heads for name in head if name is not None)
    train, evaluate, calibrate = (meta_copy(module, training) for training in (True, False, False))
    skippable = find_skippable(module, wiring, device)
    for each in (evaluate, calibrate):  # no backward pass needs what they could save there
        stop_checkpointing(each)
    if grad_checkpointing:
        start_checkpointing(train)
    for each in (train, evaluate, calibrate):
        hook_gates(each, wiring.outputs)
    hook_skips(evaluate, skippable)
    measure_statistics(calibrate)
    return Network(
        train,
        evaluate,
        calibrate,
        wiring.to(device),
        {path: units.to(device) for path, units in wiring.outputs.items()},
        skippable,
        initial,
        {name: initial[name] for name in buffers if name not in wiring.buffers},
        None if classes is None else tuple(classes),
        own or ("head.weight", "head.bias"),
        added=not own,
        frozen=frozenset(n for n, p in module.named_parameters() if not p.requires_grad) - {*own},
        precision=precision,
        recomputes=grad_checkpointing or recomputes(train),
        tied=any(name != first for name, first in first_names(module).items()),
    )
