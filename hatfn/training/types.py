"""The inputs and the outputs of a training step."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from hatfn.network.network import Output
from hatfn.numerics.arguments import Inputs
from hatfn.numerics.concrete import read
from hatfn.state import Trainable

Batches = tuple[tuple[Inputs, Tensor], ...]
"""The inputs and targets of each of the K tasks that a step trains."""

Scale = float | Tensor | None
"""The mask scale; None: binary gates."""


class StepInputs(NamedTuple):
    """The part of a state that a step of K tasks reads; with stacked states every leaf leads with S.

    Attributes:
        own: the tensors that the step trains.
        buffers: {name: (K, ...)}, the running statistics of the tasks.
        used: {group: (U,)}, the cumulative mask: bool, or in [0, 1].
        protection: {name: tensor}, the protection of the shared weights: bool, or in [0, 1].
        hyper: {name: ()}, or {name: (K,)} for settings that each task has its own value of.
        opt_state: the optimizer state.
        open: () bool, whether all K tasks are open.
    """

    own: Trainable
    buffers: dict[str, Tensor]
    used: dict[str, Tensor]
    protection: dict[str, Tensor]
    hyper: dict[str, Tensor]
    opt_state: Any
    open: Tensor


class StepOutputs(NamedTuple):
    """The values that a step writes, with the fields of :class:`StepInputs`."""

    own: Trainable
    buffers: dict[str, Tensor]
    opt_state: Any


class ForwardResult(NamedTuple):
    """The results of the forward pass of a step.

    Attributes:
        loss: (K,), the loss of each task without the penalty.
        penalty: (K,), the sparsity penalty of each task, before its weight.
        logits: the outputs of the K tasks.
        buffers: {name: (K, ...)}, the new running statistics.
    """

    loss: Tensor
    penalty: Tensor
    logits: tuple[Output, ...]
    buffers: dict[str, Tensor]


class Applied(NamedTuple):
    """The results of a step.

    Attributes:
        forward: the results of the forward pass, with losses averaged over processes.
        outputs: the values that the step writes if ``ok``.
        norm: (), the 2-norm of the gradient before the clip.
        ok: () bool, whether the tasks are open and all results are finite.
    """

    forward: ForwardResult
    outputs: StepOutputs
    norm: Tensor
    ok: Tensor


class Info(NamedTuple):
    """The report of one update; every leaf is a tensor. K is the number of tasks trained together.

    Attributes:
        loss: (), the loss without the penalty; (K,) for a list of tasks.
        penalty: () or (K,), the sparsity penalty before its weight.
        logits: the output in train mode, before the step: (B, classes of the task), or a tuple or dict
            if the module returns one. For a list of tasks, a tuple of K outputs.
        grad_norm: (), the 2-norm of the gradient of all that the step trains, after protection and
            compensation and before the clip.
        ok: () bool; False if the step was refused: a result was not finite or, on a GPU, a task was not
            open, the scale above s_max, or a label wrong.
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
    """The numbers of a small tensor, or its shape inside a transform, where numbers are unreadable."""
    numbers = read(value.float() if value.is_floating_point() else value)
    if numbers is None:
        return f"of shape {tuple(value.shape)}"
    return f"{numbers:.4g}" if isinstance(numbers, float) else str(numbers)


def report(applied: Applied, several: bool) -> Info:
    """The report for the caller; unless ``several``, without the axis over tasks."""
    result, norm, ok = applied.forward, applied.norm, applied.ok
    if several:
        return Info(result.loss, result.penalty, result.logits, norm, ok)
    return Info(result.loss[..., 0], result.penalty[..., 0], result.logits[0], norm, ok)
