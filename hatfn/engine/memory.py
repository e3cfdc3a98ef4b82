"""What a learner keeps from step to step to save work: blocks of memory, and masks ready for use.

The C library hands a large block back to the system as soon as it is free, and the next step faults it
in again, page by page. A donated step keeps the blocks of the state that it was given instead.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hatfn.numerics.ownership import is_owned
from hatfn.numerics.zeros import bits_to_keep

LARGE = 2**20
"""The bytes from which a block is kept; malloc handles smaller ones well."""

HUGE = 2**25
"""The bytes from which glibc maps every block anew, however often it is freed."""

Room = Callable[[Sequence[int], torch.dtype], Tensor]
"""From a shape and a type to memory for dense numbers."""

Kind = tuple[int, torch.dtype]
"""The number of elements of a block, and their type."""


def new_memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A dense tensor of arbitrary numbers on the CPU."""
    return torch.empty(shape, dtype=dtype)


@dataclass(frozen=True, eq=False)
class Memory:
    """What the steps of one learner on a CPU have in common; it saves work and changes no result.

    It lasts as long as a task is open.

    Attributes:
        free: the free blocks of each kind, (n,).
        wanted: how many blocks of a kind one step takes; no more are kept.
        masks: {name: (protection, mask)}, the protection of weights as :func:`bits_to_keep` has it;
            they take as many bytes as the weights.
    """

    free: dict[Kind, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    wanted: Counter[Kind] = field(default_factory=Counter)
    masks: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        return Memory, ()  # blocks are neither copied nor pickled

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """:func:`new_memory`, in a free block if there is one."""
        size = torch.Size(shape).numel()
        if size * dtype.itemsize < LARGE:
            return new_memory(shape, dtype)
        self.wanted[size, dtype] += 1
        blocks = self.free[size, dtype]
        return blocks.pop().view(shape) if blocks else new_memory(shape, dtype)

    def give(self, leaves: Iterable[Tensor]) -> None:
        """Keep the blocks of tensors that nobody else holds, as many as the last step took.

        The caller does not use the tensors again.
        """
        for leaf in leaves:
            kind = (leaf.numel(), leaf.dtype)
            large = leaf.is_cpu and leaf.nbytes >= LARGE
            room = len(self.free[kind]) < self.wanted[kind] if large else False
            if room and leaf.is_contiguous() and is_owned(leaf):
                self.free[kind].append(leaf.detach().view(-1))
        self.wanted.clear()

    def mask(self, name: str, protection: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The mask of a weight, from its protection (bool); None if no entry is protected."""
        known = self.masks.get(name)
        # The cached protection keeps its memory, so no other tensor has its address.
        if known and (known[0].data_ptr(), known[0].shape) == (protection.data_ptr(), protection.shape):
            return known[1]
        mask = bits_to_keep(protection, dtype).contiguous() if protection.any() else None
        self.masks[name] = (protection.detach(), mask)
        return mask

    def clear(self) -> None:
        """Hand everything back to the system."""
        for kept in (self.free, self.wanted, self.masks):
            kept.clear()


class ProductsIn(TorchDispatchMode):
    """Within it, matrix products of huge results, such as gradients, go to memory from ``take``."""

    def __init__(self, take: Room) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.take = take

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and not kwargs:
            one, two = args
            shape = (one.shape[0], two.shape[1])
            if one.is_cpu and shape[0] * shape[1] * one.element_size() >= HUGE:
                return torch.mm(one, two, out=self.take(shape, one.dtype))
        return func(*args, **kwargs or {})
