"""Note whatever makes the CPU wait for a device, also where the device only pretends to be one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_METHODS = {
    Tensor.tolist, Tensor.item, Tensor.numpy, Tensor.cpu, Tensor.__array__, Tensor.__bool__,
    Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__contains__, Tensor.__repr__,
}  # fmt: skip
"""What Python calls. Of these a CPU tensor's ``tolist`` and ``cpu`` call no operator at all."""

_OPERATORS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "bincount",
    "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "allclose",
}  # fmt: skip
"""Operators that read numbers, or whose result has a shape that depends on them."""


class _Methods(TorchFunctionMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to = {str(value) for value in (*args[1:], *kwargs.values())}
        sent = kwargs.get("non_blocking")  # the way to a device: the CPU waits for nothing
        if func in _METHODS or (func is Tensor.to and "cpu" in to and not sent):
            self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **kwargs)


class _Operators(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        flags = [
            one for one in (args[1] if name in ("index", "index_put", "index_put_") else ())
            if isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8)
        ]  # fmt: skip
        if name in _OPERATORS or flags:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def noted_reads() -> Iterator[list[str]]:
    """A list that fills with the names of what reads numbers out of tensors."""
    seen: list[str] = []
    with _Methods(seen), _Operators(seen):
        yield seen


class Messages(TorchDispatchMode):
    """Notes copies between devices that the CPU waits for; also of fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.__name__.split(".")[0]
        if name in ("_to_copy", "copy_") and not (kwargs.get("non_blocking") or args[2:3] == (True,)):
            tensors = [one for one in (*args, result) if isinstance(one, Tensor)]
            self.seen += [name] * (len({one.device.type for one in tensors}) > 1)
        return result
