"""Set flagged entries of a tensor to zero, exactly and fast."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from hatfn.numerics.concrete import is_concrete

PIECE = 2**17
"""How many numbers are processed at a time, so that intermediate results stay in the cache."""

_WIDTHS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def drop(off: Tensor, value: Tensor) -> Tensor:
    """Zero where ``off``, else ``value``, also for nan and infinity: ``torch.where(off, 0, value)``.

    A product with 0 would turn infinity into nan. On a CPU, ``where`` takes one element at a time,
    because a flag and a number differ in width; a bitwise ``and`` with the number is many times as
    fast. The bitwise ``and`` has no derivative, so values that require gradients go through ``where``.

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
    ones = bits_to_keep(off, value.dtype)
    bits = value.view(integers)
    if ones.shape != bits.shape:
        return (ones & bits).view(value.dtype)
    return ones.bitwise_and_(bits).view(value.dtype)  # in place: new memory would cost more


def bits_to_keep(off: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask with which :func:`drop_` is fastest: integers as wide as the numbers that it is for.

    Args:
        off: bool.
        dtype: the type of these numbers.

    Returns:
        0 where ``off``, else -1: every bit is one. For a type without integers of its width, ``off``.
    """
    integers = _WIDTHS.get(dtype.itemsize)
    return off if integers is None else (off.view(torch.int8) - 1).to(integers)


def drop_(mask: Tensor, value: Tensor) -> None:
    """:func:`drop` in place, with a mask from :func:`bits_to_keep` of the same shape."""
    if mask.dtype == torch.bool:
        value.masked_fill_(mask, 0)
    else:
        value.view(mask.dtype).bitwise_and_(mask)


def add(off: Tensor, old: Tensor, update: Tensor, rate: Tensor) -> Tensor:
    """``old + rate * update``; where ``off``, it is ``old``, even if the update is not finite.

    Large tensors are processed in pieces, so that intermediate results stay in the cache.

    Args:
        off: bool.
        old: floating numbers of the same shape.
        update: the same.
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
    pieces = (tensor.view(-1).split(PIECE) for tensor in (new, *tensors))
    for to, flags, here, step in zip(*pieces, strict=True):
        torch.addcmul(here, drop(flags, step), rate.view(()), out=to)
    return new


def _in_pieces(rate: Tensor, off: Tensor, old: Tensor, update: Tensor) -> bool:
    """Whether pieces pay, and the tensors are outside of gradients and ``vmap``."""
    every, same = (rate, off, old, update), (off, old, update)
    return (
        off.numel() > PIECE
        and rate.numel() == 1
        and old.dtype == update.dtype
        and not any(tensor.requires_grad for tensor in every)
        and all(t.shape == old.shape and t.is_contiguous() and t.device.type == "cpu" for t in same)
        and all(map(is_concrete, every))
    )
