"""Zeros by a flag, exact and at the speed of arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

_WIDTHS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def drop(off: Tensor, value: Tensor) -> Tensor:
    """Zero where ``off``, else ``value``: ``torch.where(off, 0, value)``, whatever the value is.

    A product with 0 would make a nan of an infinity. On a CPU ``where`` takes an element at a time,
    since a flag has another width than a number; an ``and`` of the numbers' bits is many times as
    fast. It has no derivative, hence ``where`` for whoever differentiates through it.

    Args:
        off: bool, broadcastable to ``value``.
        value: floating numbers.

    Example:
        >>> drop(torch.tensor([True, False]), torch.tensor([torch.nan, 2.0]))
        tensor([0., 2.])
    """
    integers = _WIDTHS.get(value.element_size())
    if value.requires_grad or value.device.type != "cpu" or integers is None:
        return torch.where(off, 0, value)
    ones = (off.view(torch.int8) - 1).to(integers)  # 0 where off, else -1: every bit is one
    bits = value.view(integers)
    if ones.shape != bits.shape:
        return (ones & bits).view(value.dtype)
    return ones.bitwise_and_(bits).view(value.dtype)  # new memory costs more than the operator
