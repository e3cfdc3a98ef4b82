"""Reading numbers out of tensors, and telling whether a tensor has numbers to read.

A read from a GPU waits until the GPU has done all work that it was given. So code that runs at every
call reads only numbers that are at hand, and lets the device itself decide about all others.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor

FREE = frozenset({"cpu"})
"""The kinds of device from which a read waits for no work."""


def reads_freely(device: torch.device) -> bool:
    """Whether a read from a device waits for no work of the device."""
    return device.type in FREE


def is_at_hand(tensor: Tensor) -> bool:
    """Whether a tensor has numbers, and a read of them waits for no device."""
    return reads_freely(tensor.device) and is_concrete(tensor)


def is_transformed(tensor: Tensor) -> bool:
    """Whether a transform of ``torch.func`` works on the tensor, or a graph is being captured."""
    return _functorch.is_functorch_wrapped_tensor(tensor) or not is_concrete(tensor)


def is_concrete(tensor: Tensor) -> bool:
    """Whether a tensor has numbers: it has none inside ``vmap`` or while a graph is captured."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return not (tensor.is_meta or isinstance(tensor, FakeTensor) or torch._is_functional_tensor(tensor))


def read(tensor: Tensor) -> Any:
    """The numbers of a small tensor, as ``tolist`` gives them; None if it has no numbers to read."""
    return tensor.tolist() if is_concrete(tensor) else None


def read_at_hand(tensor: Tensor) -> Any:
    """As :func:`read`, but also None for a tensor on a device that a read would wait for."""
    return tensor.tolist() if is_at_hand(tensor) else None


def integer(value: Any) -> int | None:
    """An int, a numpy integer or a 0-d integer tensor as an int; None for all else, also for a bool."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):
        return None
