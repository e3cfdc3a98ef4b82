"""Choosing between numbers by a flag, to the bit and at the speed of arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

_WIDTHS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def select(held: Tensor, kept: Tensor | None, new: Tensor) -> Tensor:
    """``kept`` (None: zero) where ``held``, else ``new``: ``torch.where``, to the bit.

    On a CPU PyTorch's own kernel takes an element at a time, since a flag has another width than a
    number, and lasts five times as long as operators on the numbers' bits do. These have no
    derivative, hence ``where`` for whoever differentiates through it.

    Args:
        held: bool, broadcastable to ``new``.
        kept: numbers of the shape and type of ``new``, or None.
        new: floating numbers.

    Example:
        >>> select(torch.tensor([True, False]), None, torch.tensor([torch.nan, 2.0]))
        tensor([0., 2.])
    """
    followed = new.requires_grad or (kept is not None and kept.requires_grad)
    if followed or new.device.type != "cpu" or new.element_size() not in _WIDTHS:
        return torch.where(held, 0 if kept is None else kept, new)
    integers = _WIDTHS[new.element_size()]
    number = held.to(torch.uint8).to(integers)  # a bool is turned into nothing as fast as into a byte
    bits = new.view(integers)
    if kept is None:
        return ((number - 1) & bits).view(new.dtype)
    return ((kept.view(integers) ^ bits).bitwise_and_(number.neg_()).bitwise_xor_(bits)).view(new.dtype)
