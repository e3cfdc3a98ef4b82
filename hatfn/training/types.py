"""What goes into a step of training and what comes out of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from hatfn.network.network import Output
from hatfn.numerics.arguments import Inputs
from hatfn.numerics.concrete import read
from hatfn.state import Trainable

Batches = tuple[tuple[Inputs, Tensor], ...]
"""Inputs and targets of each of the K tasks that are trained."""

Scale = float | Tensor | None
"""The mask scale; None: binary gates."""


class StepInputs(NamedTuple):
    """What a step of K tasks reads of a state; of S stacked states every leaf leads with S.

    Attributes:
        own: what it trains.
        buffers: {name: (K, ...)}, the tasks' running statistics.
        used: {group: (U,)}, the cumulative mask.
        protection: {name: tensor}, of the shared weights.
        hyper: {name: ()}, or {name: (K,)} for what each task has of its own.
        opt_state: the optimizer state.
        open: () bool, whether the tasks may be written to.
    """

    own: Trainable
    buffers: dict[str, Tensor]
    used: dict[str, Tensor]
    protection: dict[str, Tensor]
    hyper: dict[str, Tensor]
    opt_state: Any
    open: Tensor


class StepOutputs(NamedTuple):
    """What a step writes: fields as in :class:`StepInputs`."""

    own: Trainable
    buffers: dict[str, Tensor]
    opt_state: Any


class ForwardResult(NamedTuple):
    """What the forward pass of a step gives.

    Attributes:
        loss: (K,).
        penalty: (K,).
        logits: K outputs.
        buffers: {name: (K, ...)}, new running statistics.
    """

    loss: Tensor
    penalty: Tensor
    logits: tuple[Output, ...]
    buffers: dict[str, Tensor]


class Applied(NamedTuple):
    """What follows from a gradient.

    Attributes:
        forward: of the forward pass, losses averaged over processes.
        outputs: what may be written.
        norm: () of the gradient.
        ok: () bool, whether every number of it is finite.
    """

    forward: ForwardResult
    outputs: StepOutputs
    norm: Tensor
    ok: Tensor


class Info(NamedTuple):
    """What one update reports; every leaf a tensor. K: tasks trained together.

    Attributes:
        loss: (), the criterion without the penalty; (K,) for several tasks.
        penalty: () or (K,), the sparsity before its weight.
        logits: (B, classes of the task), or the module's several outputs, before the step, in train
            mode; for several tasks a tuple of them.
        grad_norm: (), of everything trained, after protection and compensation, before the clip.
        ok: () bool; False: something was not finite, and the step was refused.
    """

    loss: Tensor
    penalty: Tensor
    logits: Output
    grad_norm: Tensor
    ok: Tensor

    def __repr__(self) -> str:
        """One line, without the logits."""
        shown = (f"{name} {_shown(getattr(self, name))}" for name in self._fields if name != "logits")
        return f"Info({', '.join(shown)})"


def _shown(value: Tensor) -> str:
    """The numbers of a small tensor; its shape where there are none to read."""
    numbers = read(value.float() if value.is_floating_point() else value)
    if numbers is None:
        return f"of shape {tuple(value.shape)}"
    return f"{numbers:.4g}" if isinstance(numbers, float) else str(numbers)


def report(applied: Applied, several: bool) -> Info:
    """What the caller is told: of a single task without an axis over tasks."""
    seen, norm, ok = applied.forward, applied.norm, applied.ok
    if several:
        return Info(seen.loss, seen.penalty, seen.logits, norm, ok)
    return Info(seen.loss[..., 0], seen.penalty[..., 0], seen.logits[0], norm, ok)
