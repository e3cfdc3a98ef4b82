"""The memory of a trace: what is known of every value, parameter and unit so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from hatfn.tracing.labels import ZERO, UnionFind, agree, compress, filled, merge, shrink
from hatfn.wiring import OPEN


@dataclass(frozen=True)
class Value:
    """What the trace knows of one value of the graph.

    Attributes:
        label: which unit zeroes each element (see labels.py); for an untouched parameter ask
            ``Tracer.label`` instead.
        dynamic: whether it depends on the module's input.
        param: its name, if it is a parameter to which nothing has been done yet.
        data: its numbers, if they are the same in every call.
        sources: the parameters that it was computed from, if it does not depend on the input.
    """

    label: Tensor
    dynamic: bool = False
    param: str | None = None
    data: Tensor | None = None
    sources: frozenset[str] = frozenset()

    @property
    def shape(self) -> torch.Size:
        """The value's own shape."""
        return self.label.shape


Result = Tensor | tuple[Tensor, ...] | Value
Rule = Callable[..., Result]


@dataclass
class Param:
    """What is known of one parameter.

    Attributes:
        shape: its shape.
        out_units: which unit gates each entry; None until it is first used.
        in_units: which unit's activation meets each entry.
        cells: the id of its first cell, once it has been moved or combined before use.
        bound: (numel,) which cells have met an activation in a contraction.
        own: some use keeps it from being shared.
        folded: it is computed with before use, so that the gate of ``in_units`` must multiply it too.
        normalised: its rows are directions, whose lengths are another parameter that has their gates.
        readers: the graph nodes that read it.
    """

    shape: torch.Size
    out_units: Tensor | None = None
    in_units: Tensor | None = None
    cells: int | None = None
    bound: Tensor | None = None
    own: bool = False
    folded: bool = False
    normalised: bool = False
    readers: set[Node] = field(default_factory=set)

    @property
    def untouched(self) -> bool:
        """Whether nothing is known of it."""
        return self.out_units is None and self.cells is None and not (self.own or self.folded)


class Tracer:
    """Accumulates units, merges and the roles of parameters while the graph is interpreted."""

    def __init__(self, params: dict[str, torch.Size], heads: Iterable[str]) -> None:
        self.unions = UnionFind.empty()
        self.params = {name: Param(shape) for name, shape in params.items()}
        self.heads = frozenset(heads)
        self.blocks: list[tuple[str, Tensor]] = []
        self.deferred: set[Node] = set()
        self.products: dict[Node, tuple[Value, Value]] = {}
        self.fallbacks: list[str] = []
        self.constants: set[str] = set()
        self.input: Tensor | None = None

    def fresh(self, count: int, name: str) -> Tensor:
        """``count`` new units, (count,), to be called the group ``name``."""
        self.unions, ids = self.unions.grow(count, cell=False)
        self.blocks.append((name, ids))
        return ids

    def label(self, value: Value) -> Tensor:
        """The label of a value. A parameter becomes one cell per element."""
        if value.param is None:
            return value.label
        param = self.params[value.param]
        if param.cells is None:
            self.unions, ids = self.unions.grow(param.shape.numel(), cell=True)
            param.cells = int(ids[0]) if len(ids) else 0
            param.bound = torch.full((len(ids),), param.out_units is not None)
            if param.out_units is not None:
                known = param.out_units.expand(param.shape).flatten()
                self.unions = self.unions.join(ids[known >= 0], known[known >= 0])
        first = param.cells
        return torch.arange(first, first + param.shape.numel()).reshape(param.shape)

    def roots(self, value: Value) -> Tensor:
        """The label of a value with every unit replaced by the root of its class."""
        label = self.label(value)
        return self.unions.find(label)

    def merge(self, a: Tensor, b: Tensor) -> Tensor | None:
        """Make two labels one; None, and nothing merged, if that would collapse an operand."""
        merged = merge(self.unions, a, b)
        if merged is None:
            return None
        self.unions, label = merged
        return label

    def together(self, label: Tensor, dims: tuple[int, ...]) -> Tensor | None:
        """Give a parameter's entries along some dimensions one gate together.

        Returns:
            The label, of size one along these dimensions; None if they cannot have one gate.
        """
        first = label
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        known = bool((label >= 0).all())
        return first if known and self.merge(label, first.expand(label.shape)) is not None else None

    def combined(self, value: Value, dims: tuple[int, ...]) -> Tensor:
        """The label of a mean, maximum or weighted sum over ``dims`` (kept, with size one).

        The elements of a parameter that has no gate yet can be given one gate together: a table of
        positions that is resized takes the units of the channels that it is added to.
        """
        label = self.roots(value)
        if value.sources and 0 not in label.shape and self.together(label, dims) is not None:
            label = self.unions.find(label)
        return agree(label, dims)

    def bind(self, value: Value, wanted: Tensor, into: Tensor | None) -> Tensor:
        """Gate a parameter, or what was computed from parameters, with the units ``wanted``.

        Args:
            value: the parameter.
            wanted: the unit to gate each entry with, broadcastable to the value.
            into: the unit whose activation each entry multiplies; None: no contraction.

        Returns:
            The label that the value really has now; it differs from ``wanted`` where an earlier use
            decided otherwise.
        """
        wanted = wanted.expand(value.shape)
        meets = filled(value.shape, OPEN) if into is None else into.expand(value.shape)
        if value.param is None:
            label = self._bind_cells(value.label, wanted, meets)
        else:
            label = self._bind_param(value, wanted, meets)
        return label

    def _bind_param(self, value: Value, wanted: Tensor, into: Tensor) -> Tensor:
        assert value.param is not None
        param = self.params[value.param]
        if param.cells is not None:
            return self._bind_cells(self.label(value), wanted, into)
        if param.out_units is None or param.in_units is None:
            param.out_units, param.in_units = wanted, into
            return wanted
        param.in_units = self.same(param.in_units, into)
        merged = self.merge(param.out_units, wanted)
        param.out_units = param.out_units if merged is None else merged
        return param.out_units

    def _bind_cells(self, label: Tensor, wanted: Tensor, into: Tensor) -> Tensor:
        cells, into = label.flatten(), into.expand(label.shape).flatten()
        for param in self.params.values():
            if param.cells is None:
                continue
            mine = (cells >= param.cells) & (cells < param.cells + param.shape.numel())
            if bool(mine.any()):
                self._record_cells(param, cells[mine] - param.cells, into[mine])
        merged = self.merge(label, wanted)
        return label if merged is None else merged

    def _record_cells(self, param: Param, cells: Tensor, into: Tensor) -> None:
        assert param.bound is not None
        count = param.shape.numel()
        known = filled((count,), ZERO)
        if param.in_units is not None:
            known = self.unions.find(param.in_units).expand(param.shape).flatten()
            known = torch.where(param.bound, known, ZERO)
        into = self.unions.find(into)
        high = known.scatter_reduce(0, cells, into, "amax")
        low = torch.where(known == ZERO, high, known).scatter_reduce(0, cells, into, "amin")
        param.in_units = torch.where(high == low, high, OPEN).reshape(param.shape)
        param.bound = param.bound.index_fill(0, cells, True)

    def gate(self, label: Tensor, wanted: Tensor, into: Tensor) -> bool:
        """Gate cells of parameters; whether they have the wanted gates now.

        Args:
            label: of cells.
            wanted: the unit to gate each with, broadcastable to the label.
            into: the unit whose gate is that of what each multiplies, broadcastable too.
        """
        wanted = wanted.expand(label.shape)
        held = self._bind_cells(label, wanted, into)
        return torch.equal(self.unions.find(held), self.unions.find(wanted))

    def cells(self, shape: list[int]) -> Tensor:
        """New cells that no parameter has: they hand on the gate that they are given."""
        self.unions, ids = self.unions.grow(torch.Size(shape).numel(), cell=True)
        return ids.reshape(shape)

    def feeds(self, label: Tensor) -> Tensor:
        """For each cell of a label, the unit that it reads as far as is known; ``ZERO``: not known."""
        known = filled((len(self.unions.root),), ZERO).clone()
        for param in self.params.values():
            if param.cells is not None and param.bound is not None and param.in_units is not None:
                mine = self.unions.find(param.in_units).expand(param.shape).flatten()
                last = param.cells + len(mine)
                known[param.cells : last] = torch.where(param.bound, mine, ZERO)
        return known[label]

    def feed(self, name: str, into: Tensor) -> None:
        """Record what a head reads: nothing gates a head, but its columns have in units."""
        param = self.params[name]
        param.in_units = into if param.in_units is None else self.same(param.in_units, into)

    def same(self, a: Tensor, b: Tensor) -> Tensor:
        """``a`` where both labels name one unit, else ``OPEN``."""
        a, b = torch.broadcast_tensors(self.unions.find(a), self.unions.find(b))
        return torch.where(a == b, a, OPEN)

    def own(self, value: Value) -> None:
        """Keep every parameter that a value was computed from per task."""
        for name in value.sources:
            self.params[name].own = True

    def fold(self, value: Value) -> None:
        """Gate every parameter that a value was computed from at both ends."""
        for name in value.sources:
            self.params[name].folded = True

    def spread(self, value: Value, label: Tensor) -> bool:
        """Gate one number with many units: every element that it is added to gets a gate of its own.

        That is possible if nothing else reads it, since its gated value has the shape of the units.
        """
        param = self.params.get(value.param or "")
        vector = shrink(self.unions.find(compress(label)))
        while vector.dim() and vector.shape[0] == 1:
            vector = vector[0]
        if (
            param is None
            or param.shape.numel() != 1
            or param.out_units is not None
            or param.cells is not None
            or len(param.readers) > 1
            or vector.dim() in (0, label.dim())  # one unit, or samples that differ
            or bool((vector < 0).any())
        ):
            return False
        param.out_units, param.own = vector, True
        return True

    def promote(self, label: Tensor, name: str) -> None:
        """Give units of their own to the cells of a parameter that scales something ungated."""
        cells = self.unions.find(shrink(label)).unique()
        cells = cells[(cells >= 0) & (self.unions.units[cells] == OPEN)]
        units = self.fresh(len(cells), name)
        self.unions = self.unions.join(cells, units)
