"""Labels: the unit that makes each element of a value zero, and a union-find over units.

A label is an integer tensor with the shape of the value. An entry >= 0 is the unit whose gate, when it
is off, makes the element exactly zero. ``OPEN`` (-1) means that no gate does. ``ZERO`` (-2) means that
the element is always zero, such as padding or a constant; it agrees with any unit.

A label that repeats along a dimension is expanded (stride 0) there. So the model's own operators that
move data run on labels too, and the label of a large activation takes little memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hatfn.wiring import OPEN

ZERO = -2
"""The entry of an element that is zero under all gates."""


def filled(shape: torch.Size | tuple[int, ...], value: int) -> Tensor:
    """A label of this shape with the same entry everywhere."""
    return torch.tensor(value).expand(shape)


def shrink(label: Tensor) -> Tensor:
    """The label with every expanded dimension cut to size one."""
    for dim, (size, stride) in enumerate(zip(label.shape, label.stride(), strict=True)):
        if stride == 0 and size > 1:
            label = label.narrow(dim, 0, 1)
    return label


def all_but(label: Tensor, dim: int) -> tuple[int, ...]:
    """Every dimension of a label except one."""
    return tuple(d for d in range(label.dim()) if d != dim % label.dim())


def agree(label: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The label of a sum, mean, maximum or weighted sum over ``dims``, which keep size one.

    A unit makes a sum zero only if it makes every term zero. So the entry is the one that all terms
    have in common, apart from ``ZERO`` terms, or else ``OPEN``.
    """
    label = shrink(label)
    dims = tuple(dim % label.dim() for dim in dims)
    if 0 in label.shape:
        return label.sum(dims, keepdim=True) + ZERO  # a sum of nothing
    if not dims:
        return label
    top = label.amax(dims, keepdim=True)
    same = ((label == top) | (label == ZERO)).all(dim=dims, keepdim=True)
    return torch.where(same, top, OPEN)


def compress(label: Tensor) -> Tensor:
    """The same label, expanded along every dimension in which its entries repeat."""
    shape, label = label.shape, shrink(label)
    if 0 in shape:
        return label.expand(shape)
    for dim in range(label.dim()):
        if label.shape[dim] > 1:
            top = label.amax(dim, keepdim=True)
            if bool(((label == top) | (label == ZERO)).all()):
                label = top
    return label.expand(shape)


@dataclass(frozen=True)
class UnionFind:
    """An immutable union-find over units and cells.

    A *unit* has a gate. A *cell* is one element of a parameter that is moved or combined before it
    meets an activation; it has no gate until it is joined with a unit.

    Attributes:
        root: (N,) int64, the root of every unit and cell; paths are always fully compressed.
        cell: (N,) bool, True for cells.
    """

    root: Tensor
    cell: Tensor

    @classmethod
    def empty(cls) -> UnionFind:
        """A union-find without units."""
        return cls(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.bool))

    def grow(self, count: int, cell: bool) -> tuple[UnionFind, Tensor]:
        """A union-find with ``count`` more units, or cells, and the ids of these, (count,)."""
        ids = torch.arange(len(self.root), len(self.root) + count)
        flags = torch.full((count,), cell)
        return UnionFind(torch.cat([self.root, ids]), torch.cat([self.cell, flags])), ids

    def find(self, label: Tensor) -> Tensor:
        """The label with every unit replaced by the root of its class."""
        shape, label = label.shape, shrink(label)
        if not len(self.root):
            return label.expand(shape)
        return torch.where(label < 0, label, self.root[label.clamp(min=0)]).expand(shape)

    def join(self, a: Tensor, b: Tensor) -> UnionFind:
        """The union-find in which ``a[i]`` and ``b[i]`` are one unit, for every i."""
        root = self.root
        while True:
            low, high = torch.minimum(root[a], root[b]), torch.maximum(root[a], root[b])
            apart = low != high
            if not bool(apart.any()):
                return UnionFind(root, self.cell)
            root = root.scatter_reduce(0, high[apart], low[apart], "amin")
            while not torch.equal(up := root[root], root):
                root = up

    @cached_property
    def units(self) -> Tensor:
        """(N,) int64, the smallest unit of each entry's class; ``OPEN`` if the class has only cells."""
        none = len(self.root)
        ids = torch.where(self.cell, none, torch.arange(none))
        least = torch.full((none,), none).scatter_reduce(0, self.root, ids, "amin")
        return torch.where(least == none, OPEN, least)[self.root]

    def width(self, label: Tensor) -> int:
        """The number of different units in the label."""
        ids = self.find(shrink(label)).flatten()
        units = self.units[ids[ids >= 0]].unique()
        return int((units >= 0).sum())


def merge(unions: UnionFind, a: Tensor, b: Tensor) -> tuple[UnionFind, Tensor] | None:
    """The label of a sum of two values: where both have a unit, the two units become one.

    The merge is refused if it would also join two units of the same operand, as ``x + x.roll(1)``
    does: a few such merges collapse a whole network into a single unit.

    Args:
        unions: the union-find so far.
        a: the label of one operand.
        b: the label of the other; the two broadcast.

    Returns:
        The new union-find and the label of the sum; None if the merge is refused.
    """
    shape = torch.broadcast_shapes(a.shape, b.shape)
    a, b = torch.broadcast_tensors(shrink(a), shrink(b))
    both = (a >= 0) & (b >= 0)
    joined = unions.join(a[both], b[both])
    if joined.width(a) < unions.width(a) or joined.width(b) < unions.width(b):
        return None
    label = torch.where(a == ZERO, b, torch.where((b == ZERO) | both, a, OPEN))
    return joined, label.expand(shape)
