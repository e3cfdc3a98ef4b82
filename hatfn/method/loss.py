"""The default loss."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor, nn


def cross_entropy(output: Any, y: Tensor) -> Tensor:
    """The cross entropy of the logits, averaged over the outputs if there are several.

    Args:
        output: logits (B, C) or (B, C, positions), or a tuple or dict of such tensors, such as
            distilled or auxiliary outputs.
        y: labels, (B,) or (B, positions).

    Example:
        >>> logits, y = torch.zeros(5, 2), torch.zeros(5, dtype=torch.long)
        >>> cross_entropy((logits, logits), y) == cross_entropy(logits, y)
        tensor(True)
    """
    leaves: list[Tensor] = optree.tree_leaves(output)
    return torch.stack([nn.functional.cross_entropy(leaf, y) for leaf in leaves]).mean()
