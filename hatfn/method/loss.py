"""The losses of tasks: the default loss, one loss for each task, and what a loss reads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

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

    Args:
        loss: the loss of the task.
        task: the task.
        output: the output of the module.
        y: the target.
    """
    try:
        return loss(output, y)
    except (RuntimeError, ValueError, IndexError) as error:
        logits = logits_of(output)
        got = f"{tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        mend = " Write y.float()." if "dtype" in str(error) or "type Long" in str(error) else ""
        error.add_note(
            f"hatfn: the loss of task {task} failed on an output of shape {got} and a target of shape "
            f"{tuple(y.shape)} and {y.dtype}. Expected a target that the loss takes.{mend}"
        )
        raise


def cross_entropy(output: Any, y: Tensor, **options: Any) -> Tensor:
    """The cross entropy of the logits, averaged over the outputs if there are several.

    Args:
        output: logits (B, C) or (B, C, positions); something with ``logits``, such as a ModelOutput, a
            named tuple or a dict, of which nothing else is read; or a tuple or dict of logits, such as
            distilled or auxiliary outputs.
        y: labels, (B,) or (B, positions); or probabilities of the shape of the logits.
        options: ``weight``, ``label_smoothing``, ``ignore_index`` and the other keyword arguments of
            ``torch.nn.functional.cross_entropy``.

    Raises:
        TypeError: another output; :func:`hatfn.build` takes a ``loss`` for it.

    Example:
        >>> logits, y = torch.zeros(5, 2), torch.zeros(5, dtype=torch.long)
        >>> cross_entropy((logits, logits), y) == cross_entropy({"logits": logits}, y)
        tensor(True)
    """
    losses = [nn.functional.cross_entropy(logits, y, **options) for logits in _every_logits(output)]
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def logits_of(output: Any) -> Any:
    """The logits of what a module returns: the tensor itself, or what is called so."""
    if isinstance(output, Mapping):
        return output.get("logits", output)
    return getattr(output, "logits", output)


def _every_logits(output: Any) -> list[Tensor]:
    found = logits_of(output)
    if type(found) in (dict, OrderedDict):
        found = tuple(found.values())
    every = [*found] if type(found) in (tuple, list) else [found]
    if not every or not all(isinstance(logits, Tensor) for logits in every):
        what = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        raise TypeError(
            f"update: the module returns a {type(output).__name__}{what}, of which the default loss "
            f"reads no logits. Expected a tensor, or something with logits. Give a loss of what it "
            f"returns: build(loss=lambda output, y: ...)."
        )
    return every
