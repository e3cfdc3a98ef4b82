"""The default loss, and what it reads of what a module returns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


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
    losses = [nn.functional.cross_entropy(logits, y, **options) for logits in every_logits(output)]
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def logits_of(output: Any) -> Any:
    """The logits of what a module returns: the tensor itself, or what is called so."""
    if isinstance(output, Mapping):
        return output.get("logits", output)
    return getattr(output, "logits", output)


def every_logits(output: Any) -> list[Tensor]:
    """The logits of what a module returns: one tensor, or several of a tuple or dict of logits."""
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
