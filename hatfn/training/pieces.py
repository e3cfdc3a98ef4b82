"""What follows the gradient on a CPU, piece by piece, while a piece is in the cache.

The step is bound by memory: a pass over a tensor costs as much as the arithmetic on it. Here the
gradient's memory becomes that of the new values, and no intermediate result exists as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from hatfn.engine.memory import Memory, Room
from hatfn.method import transforms
from hatfn.numerics import zeros
from hatfn.spec import Spec
from hatfn.state import Trainable
from hatfn.training.types import Scale, StepInputs


class Moved(NamedTuple):
    """What a step trains, after the update of the optimizer.

    Attributes:
        own: the new values.
        opt_state: the new optimizer state.
        finite: () bool, or (S,), whether all of it is finite, embeddings aside.
    """

    own: Trainable
    opt_state: Any
    finite: Tensor


def protect(
    gradients: Mapping[str, Tensor], protection: Mapping[str, Tensor], memory: Memory
) -> dict[str, Tensor]:
    """:func:`hatfn.method.transforms.protect` in the gradients' own memory.

    Args:
        gradients: {name: tensor on a CPU}, which are overwritten.
        protection: {name: tensor of the same shape}: bool, or p in [0, 1].
        memory: where masks are kept.
    """
    for name, gradient in gradients.items():
        p = protection[name]
        if p.dtype == torch.bool and gradient.is_contiguous():
            if (mask := memory.mask(name, p, gradient.dtype)) is not None:
                zeros.drop_(mask, gradient)
        else:
            _reduce(gradient, p)
    return dict(gradients)


def _reduce(value: Tensor, p: Tensor) -> None:
    """Multiply by (1 - p) in place; zero where p is 1."""
    if p.dtype != torch.bool:
        value.mul_((1 - p).to(value.dtype))
        p = p == 1
    zeros.drop_(zeros.bits_to_keep(p, value.dtype), value)


def moved(
    spec: Spec,
    gradients: Trainable,
    inputs: StepInputs,
    decayed: Trainable,
    scale: Scale,
    lead: int,
    room: Room,
) -> Moved | None:
    """The new values, in the memory of the gradients.

    Args:
        spec: the settings of the learner.
        gradients: dense tensors on a CPU, which are overwritten.
        inputs: the inputs of the step.
        decayed: the values that weight decay acts on.
        scale: the mask scale; None: embeddings keep their values.
        lead: the number of axes, 0 or 1, in front of every leaf that count states.
        room: from a shape and a type to memory for a part of the new optimizer state.

    Returns:
        The new values. None if the optimizer must see whole tensors, or if states differ in what they
        need, as in a rate of their own; the caller then updates all tensors at once.
    """
    lr = inputs.hyper["lr"].reshape(-1)[0]
    rate = transforms.agreed(inputs.hyper["lr"])
    old: list[Tensor]
    old, structure = optree.tree_flatten(inputs.own)  # type: ignore[arg-type]
    slopes: list[Tensor] = optree.tree_leaves(gradients)  # type: ignore[arg-type]
    shared = len(inputs.protection)
    dense = all(p.is_contiguous() for p in (*slopes, *old[:shared]))  # not so in channels-last modules
    by_piece = getattr(spec.optimizer, "by_piece", None)
    if by_piece is None or rate is None or not dense:
        return None
    flags = [
        spec.memory.mask(name, p, inputs.own.params[name].dtype) if p.dtype == torch.bool else p
        for name, p in sorted(inputs.protection.items())
    ]
    flat_old, flat_new = ([leaf.reshape(-1) for leaf in leaves] for leaves in (old, slopes))
    flat_flags = [None if flag is None else flag.reshape(-1) for flag in flags]
    trained = len(old) - (len(inputs.own.embeddings) if scale is None else 0)
    wide = reduce(torch.promote_types, {leaf.dtype for leaf in old}, torch.float32)
    sums = [torch.zeros((), dtype=wide)]

    def use(index: int, start: int, step: Tensor, kept: list[Tensor]) -> None:
        sums.extend(part.sum(dtype=wide) for part in kept)
        if index >= trained:
            return
        place = slice(start, start + len(step))
        flag = flat_flags[index] if index < shared else None
        if flag is not None:
            off = flag[place]
            if not off.is_floating_point():
                zeros.drop_(off, step)
            else:
                _reduce(step, off if spec.protection.on == "update" else off == 1)
        new = flat_new[index][place]  # the optimizer has read the gradient
        if rate == 1.0:
            torch.add(flat_old[index][place], step, out=new)
        else:  # rounded as by the update of all tensors at once
            torch.addcmul(flat_old[index][place], step, lr.to(step.dtype), out=new)
        sums.append(new.sum(dtype=wide))

    start: list[Tensor] = optree.tree_leaves(decayed)  # type: ignore[arg-type]
    opt_state = by_piece(slopes, inputs.opt_state, start, use, lead, room)
    if opt_state is None:
        return None
    new: Trainable = optree.tree_unflatten(structure, slopes)  # type: ignore[assignment]
    if scale is None:
        new = new._replace(embeddings=inputs.own.embeddings)
    finite = torch.isfinite(torch.stack(sums)).all()
    if lead and not finite:  # find out which of the states are not
        finite = transforms.finite((new._replace(embeddings={}), opt_state), lead)
    return Moved(new, opt_state, finite)
