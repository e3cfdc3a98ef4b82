"""Numbers out of tensors, where there are any to read."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def read(tensor: Tensor) -> Any:
    """The numbers of a small tensor; None inside ``vmap`` or while a graph is captured, without any."""
    if isinstance(tensor, FakeTensor):  # it would answer with symbols
        return None
    try:
        return tensor.tolist()
    except Exception:  # tensors without numbers have an error each
        return None


def integer(value: Any) -> int | None:
    """An int, a numpy integer or a 0-d integer tensor as an int; None for anything else, bools too."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):
        return None
