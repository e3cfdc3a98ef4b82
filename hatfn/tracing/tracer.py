"""The state of a trace: all that is known so far about values, parameters and units."""

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
    """One value of the graph.

    Attributes:
        label: the unit that makes each element zero, see labels.py. For a value with ``param``, call
            :meth:`Tracer.label` instead.
        dynamic: whether the value depends on the module's input.
        param: the name of the parameter, if the value is a parameter as it is stored.
        data: the numbers, if they are the same in every call.
        sources: the parameters that the value is computed from, if it does not depend on the input.
    """

    label: Tensor
    dynamic: bool = False
    param: str | None = None
    data: Tensor | None = None
    sources: frozenset[str] = frozenset()

    @property
    def shape(self) -> torch.Size:
        """The shape of the value."""
        return self.label.shape


Result = Tensor | tuple[Tensor, ...] | Value
"""The labels of an operator's outputs, or its only output."""

Rule = Callable[..., Result]
"""A function (tracer, node, *operands) -> labels, for one operator."""


@dataclass
class Param:
    """What the trace knows about one parameter.

    Attributes:
        shape: the shape of the parameter.
        out_units: the label with the unit that gates each entry; None until the first use.
        in_units: the label with the unit whose activation each entry multiplies.
        cells: the id of the first cell, if the parameter is moved or combined before use.
        bound: (numel,) bool, the cells that have multiplied an activation.
        own: whether some use makes the parameter per task.
        folded: whether the module computes with the parameter before use, so that the gate of
            ``in_units`` must multiply it too.
        normalised: whether its rows are directions. Their lengths are another parameter, which has
            their gates.
        readers: the nodes of the graph that read the parameter.
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
        """Whether no operator has used the parameter yet."""
        return self.out_units is None and self.cells is None and not (self.own or self.folded)


class Tracer:
    """Collects units, merges and the roles of parameters while the graph runs on labels.

    Attributes:
        unions: the classes of merged units and cells.
        params: {name: parameter}.
        heads: the names of the heads' weights.
        blocks: (group name, units) of each call of :meth:`fresh`, in order.
        deferred: the nodes of layers whose gate a later norm carries instead.
        fallbacks: the operators without a rule, and their modules.
        constants: the buffers whose numbers the trace read.
        input: the units of the input's features, if they have gates.
    """

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
        """The ids of ``count`` new units, (count,), which form the group ``name``."""
        self.unions, ids = self.unions.grow(count, cell=False)
        self.blocks.append((name, ids))
        return ids

    def label(self, value: Value) -> Tensor:
        """The label of a value. Each element of a stored parameter becomes a cell."""
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
        """The label of a sum, after the merge of its units; None if the merge is refused."""
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
        """The label of a mean, maximum or weighted sum over ``dims``, which keep size one.

        If the value is computed from parameters without gates, its elements along ``dims`` can share
        one gate: a table of positions that is resized gets the units of the channels that it is added
        to.
        """
        label = self.roots(value)
        if value.sources and 0 not in label.shape and self.together(label, dims) is not None:
            label = self.unions.find(label)
        return agree(label, dims)

    def bind(self, value: Value, wanted: Tensor, into: Tensor | None) -> Tensor:
        """Gate a parameter, or a value computed from parameters, with the units ``wanted``.

        Args:
            value: the parameter or value.
            wanted: a label that broadcasts to the value, with the unit that gates each entry.
            into: a label with the unit whose activation each entry multiplies; None: there is none.

        Returns:
            The new label of the value. It differs from ``wanted`` if an earlier use gave it other
            units and the two cannot be merged.
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
            inside = (cells >= param.cells) & (cells < param.cells + param.shape.numel())
            if bool(inside.any()):
                self._record_cells(param, cells[inside] - param.cells, into[inside])
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
        """Record the units that a head reads. No gate multiplies a head, but it has in units."""
        param = self.params[name]
        param.in_units = into if param.in_units is None else self.same(param.in_units, into)

    def same(self, a: Tensor, b: Tensor) -> Tensor:
        """``a`` where both labels have the same unit, else ``OPEN``."""
        a, b = torch.broadcast_tensors(self.unions.find(a), self.unions.find(b))
        return torch.where(a == b, a, OPEN)

    def own(self, value: Value) -> None:
        """Make every parameter that a value is computed from per task."""
        for name in value.sources:
            self.params[name].own = True

    def fold(self, value: Value) -> None:
        """Gate every parameter that a value is computed from by its in units as well."""
        for name in value.sources:
            self.params[name].folded = True

    def spread(self, value: Value, label: Tensor) -> bool:
        """Gate a parameter of one number with many units, one for each element that it is added to.

        The gated number has the shape of the units, so nothing else may read the parameter.

        Args:
            value: the parameter.
            label: the label of the value that the number is added to.

        Returns:
            Whether that was possible.
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
        """Give new units to the cells of a parameter that scales an ungated value."""
        cells = self.unions.find(shrink(label)).unique()
        cells = cells[(cells >= 0) & (self.unions.units[cells] == OPEN)]
        units = self.fresh(len(cells), name)
        self.unions = self.unions.join(cells, units)
