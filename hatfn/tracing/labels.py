"""Labels: which unit zeroes each element of a value, and a union-find over units.

A label is an integer tensor of the value's own shape. A non-negative entry names the unit whose
gate, when off, makes that element exactly zero; ``OPEN`` says that no gate does; ``ZERO`` says
that the element is zero whatever the gates are (padding, a constant), so it agrees with any unit.

Labels that repeat along a dimension are kept expanded (stride 0) there: data movement can then run
the model's own operator on them, and a label of a large activation costs a vector, not a volume.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hatfn.wiring import OPEN

ZERO = -2


def filled(shape: torch.Size | tuple[int, ...], value: int) -> Tensor:
    """A label with one entry everywhere."""
    return torch.tensor(value).expand(shape)


def shrink(label: Tensor) -> Tensor:
    """The same label with every repeated dimension cut to size one."""
    for dim, (size, stride) in enumerate(zip(label.shape, label.stride(), strict=True)):
        if stride == 0 and size > 1:
            label = label.narrow(dim, 0, 1)
    return label


def all_but(label: Tensor, dim: int) -> tuple[int, ...]:
    """Every dimension of a label except one."""
    return tuple(d for d in range(label.dim()) if d != dim % label.dim())


def agree(label: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The entry shared by everything along ``dims`` (kept, with size one), else ``OPEN``.

    This is the label of a sum, mean, maximum or weighted sum over ``dims``: it is zero for a unit
    only if that unit zeroes every term. ``ZERO`` terms do not count.
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
    """Find the dimensions along which a label repeats and expand over them."""
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

    A *unit* has a gate of its own. A *cell* is one element of a parameter that is moved or combined
    before it meets an activation: it has no gate until it is joined with a unit.

    Attributes:
        root: (N,) the root of every unit and cell; always fully compressed.
        cell: (N,) bool, True for cells.
    """

    root: Tensor
    cell: Tensor

    @classmethod
    def empty(cls) -> UnionFind:
        """No units yet."""
        return cls(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.bool))

    def grow(self, count: int, cell: bool) -> tuple[UnionFind, Tensor]:
        """``count`` new units (or cells), and their ids."""
        ids = torch.arange(len(self.root), len(self.root) + count)
        flags = torch.full((count,), cell)
        return UnionFind(torch.cat([self.root, ids]), torch.cat([self.cell, flags])), ids

    def find(self, label: Tensor) -> Tensor:
        """The label with every unit replaced by its root."""
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
        """(N,) for every root, the smallest unit of its class; ``OPEN`` where it holds only cells."""
        none = len(self.root)
        ids = torch.where(self.cell, none, torch.arange(none))
        least = torch.full((none,), none).scatter_reduce(0, self.root, ids, "amin")
        return torch.where(least == none, OPEN, least)[self.root]

    def width(self, label: Tensor) -> int:
        """How many different units the label holds."""
        ids = self.find(shrink(label)).flatten()
        units = self.units[ids[ids >= 0]].unique()
        return int((units >= 0).sum())


def merge(unions: UnionFind, a: Tensor, b: Tensor) -> tuple[UnionFind, Tensor] | None:
    """Make two labels one, element by element: the label of a sum.

    Where both name a unit, the two units become one. ``None`` (refused) if that would also make
    one unit of two units of the same operand, as in ``x + x.roll(1)``: a few such merges collapse
    a whole network into a single unit.
    """
    shape = torch.broadcast_shapes(a.shape, b.shape)
    a, b = torch.broadcast_tensors(shrink(a), shrink(b))
    both = (a >= 0) & (b >= 0)
    joined = unions.join(a[both], b[both])
    if joined.width(a) < unions.width(a) or joined.width(b) < unions.width(b):
        return None
    label = torch.where(a == ZERO, b, torch.where((b == ZERO) | both, a, OPEN))
    return joined, label.expand(shape)
