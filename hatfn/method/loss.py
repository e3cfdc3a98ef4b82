"""The default loss."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor, nn


def cross_entropy(output: Any, y: Tensor) -> Tensor:
    """The cross entropy of the logits; of several outputs (distilled, auxiliary) the mean.

    Args:
        output: logits (B, C) or (B, C, places), or a tuple or dict of such.
        y: labels, (B,) or (B, places).

    Example:
        >>> logits, y = torch.zeros(5, 2), torch.zeros(5, dtype=torch.long)
        >>> cross_entropy((logits, logits), y) == cross_entropy(logits, y)
        tensor(True)
    """
    leaves: list[Tensor] = optree.tree_leaves(output)
    return torch.stack([nn.functional.cross_entropy(leaf, y) for leaf in leaves]).mean()
