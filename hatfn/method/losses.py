"""The losses of tasks: one for all, one for each, and what a loss reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hatfn.checks.capacity import warn
from hatfn.checks.values import check_callable
from hatfn.method.loss import cross_entropy, every_logits, logits_of
from hatfn.numerics.concrete import reads_freely

Loss = Callable[[Any, Tensor], Tensor]
"""(output of the module, target) -> ()."""


@dataclass(frozen=True)
class Told:
    """A loss that receives the task as a keyword argument.

    Attributes:
        function: (output, target, task=int) -> ().
        task: the task; None: of_task() fills it in.
    """

    function: Callable[..., Tensor]
    task: int | None = None

    def __call__(self, output: Any, y: Tensor) -> Tensor:
        """The loss of the task."""
        return self.function(output, y, task=self.task)


_IGNORED = -100
"""The label that PyTorch's cross entropy leaves out by default."""

Losses = Loss | tuple[Loss, ...]
"""The losses of all tasks: one for all, which may be :class:`Told` the task, or one for each."""


def of_task(losses: Losses, task: int) -> Loss:
    """The loss of one task."""
    if isinstance(losses, tuple):
        return losses[task]
    return replace(losses, task=task) if isinstance(losses, Told) else losses


def reads_labels(loss: Loss) -> bool:
    """Whether a loss is a cross entropy, so that its integer targets are class labels."""
    while isinstance(loss, partial):
        loss = loss.func
    known = loss is cross_entropy or loss is nn.functional.cross_entropy
    return known or isinstance(loss, nn.CrossEntropyLoss)


def explained(loss: Loss, task: int, output: Any, y: Tensor) -> Tensor:
    """The loss; if it fails, a note on the error names the task, the output and the target.

    Labels on a GPU are not read. If one of them is no class of the output, the loss is nan, so that the
    step is refused. Without that, the GPU would stop the whole process.

    Args:
        loss: the loss of the task.
        task: the task.
        output: the output of the module.
        y: the target.
    """
    try:
        if reads_freely(y.device) or y.is_floating_point() or not reads_labels(loss):
            return loss(output, y)
        safe, right = _inside(loss, output, y)
        return torch.where(right, loss(output, safe), torch.nan)
    except (RuntimeError, ValueError, IndexError) as error:
        logits = logits_of(output)
        got = f"{tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        mend = " Write y.float()." if "dtype" in str(error) or "type Long" in str(error) else ""
        error.add_note(
            f"hatfn: the loss of task {task} failed on an output of shape {got} and a target of shape "
            f"{tuple(y.shape)} and {y.dtype}. Expected a target that the loss takes.{mend}"
        )
        raise


def _inside(loss: Loss, output: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """Labels that the loss can take, and whether they are those that were given, () bool.

    Args:
        loss: a cross entropy.
        output: the output of the module.
        y: labels of any value.
    """
    last = min(logits.shape[min(1, logits.dim() - 1)] for logits in every_logits(output)) - 1
    options = getattr(loss, "keywords", {})
    ignored = getattr(loss, "ignore_index", options.get("ignore_index", _IGNORED))
    safe, known = y.clamp(0, last), y == ignored
    return torch.where(known, y, safe), (known | (safe == y)).all()


def check_losses(where: str, loss: Any, tasks: int) -> Losses:
    """The losses of tasks, from one function for all or from a list of one for each."""
    right = "of (output, y), such as torch.nn.functional.mse_loss"
    if not isinstance(loss, list | tuple):
        check_callable(where, "loss", loss, right)
        return Told(loss) if _takes_task(loss) else loss
    for one in loss:
        check_callable(where, "loss", one, right)
    if len(loss) != tasks:
        raise ValueError(
            f"{where}: loss has {len(loss)} functions for {tasks} tasks. Expected one function for all "
            f"tasks, or one for each."
        )
    return tuple(loss)


def _takes_task(loss: Callable[..., Any]) -> bool:
    """Whether a function has an argument called task that is still open."""
    if isinstance(loss, partial) and "task" in loss.keywords:
        return False
    try:
        return "task" in inspect.signature(loss).parameters
    except (TypeError, ValueError):  # some built-in functions have no signature
        return False


def warn_one_class(where: str, classes: Sequence[int] | None, losses: Losses, first: int = 0) -> None:
    """Warn of tasks whose cross entropy is 0 whatever the module returns, because they have one class.

    Args:
        where: the function that was called.
        classes: the number of classes of each task from ``first`` on.
        losses: the losses of all tasks.
        first: the first task.
    """
    for task, count in enumerate(classes or (), first):
        if count == 1 and reads_labels(of_task(losses, task)):
            warn(
                f"{where}: task {task} has one class, and the cross entropy of one class is 0 whatever "
                f"the module returns: the task would learn nothing. Give it two classes, or a loss of "
                f"one number, such as torch.nn.functional.binary_cross_entropy_with_logits: "
                f"build(loss=[...])."
            )
