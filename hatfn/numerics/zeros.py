"""Zeros by a flag, exact and at the speed of arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from hatfn.numerics.concrete import read

PIECE = 2**17
"""Numbers that :func:`add` works on at a time."""

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
    eager = value.device.type == "cpu" and not (value.requires_grad or isinstance(value, FakeTensor))
    if integers is None or not eager:
        return torch.where(off, 0, value)
    ones = (off.view(torch.int8) - 1).to(integers)  # 0 where off, else -1: every bit is one
    bits = value.view(integers)
    if ones.shape != bits.shape:
        return (ones & bits).view(value.dtype)
    return ones.bitwise_and_(bits).view(value.dtype)  # new memory costs more than the operator


def add(off: Tensor, old: Tensor, update: Tensor, rate: Tensor) -> Tensor:
    """``old + rate * update``, and ``old`` where ``off``, whatever the update is.

    Large tensors are gone through in pieces: what lies between the operators never leaves the cache.

    Args:
        off: bool.
        old: floating numbers of the same shape.
        update: likewise.
        rate: broadcastable to them.

    Example:
        >>> off, update = torch.tensor([True, False]), torch.tensor([torch.nan, 2.0])
        >>> add(off, torch.ones(2), update, rate=torch.tensor(0.5))
        tensor([1., 2.])
    """
    rate, tensors = rate.to(update.dtype), (off, old, update)
    if not _in_pieces(rate, *tensors):
        return torch.addcmul(old, drop(off, update), rate)
    new = torch.empty_like(old)
    for to, *pieces in zip(*(t.view(-1).split(PIECE) for t in (new, *tensors)), strict=True):
        flags, here, step = pieces
        torch.addcmul(here, drop(flags, step), rate.view(()), out=to)
    return new


def _in_pieces(rate: Tensor, off: Tensor, old: Tensor, update: Tensor) -> bool:
    """Whether it pays, and nobody differentiates through the tensors or batches them."""
    every, same = (rate, off, old, update), (off, old, update)
    return (
        off.numel() > PIECE
        and rate.numel() == 1
        and old.dtype == update.dtype
        and not any(tensor.requires_grad for tensor in every)
        and all(t.shape == old.shape and t.is_contiguous() and t.device.type == "cpu" for t in same)
        and all(read(tensor.view(-1)[0]) is not None for tensor in every)
    )
