"""Skip dead units: under binary gates, a layer computes only with its live rows and columns.

The output of a unit that is off is zero, so a layer need not compute its row, and later layers need not
read its column. The module's code does not change: a layer gets a smaller weight, a hook selects the
live columns of its input, and another hook puts zeros back into its output. Between two layers neither
hook is needed if the second reads exactly the live units of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from hatfn.network.hooks import BACK, COLUMNS
from hatfn.wiring import OPEN, Units, Wiring

WORTH = 16
"""The number of multiplications that take as long as moving one number, on a CPU."""

SMALL = 2**21
"""A layer with fewer multiplications is never narrowed: to find its live units takes as long."""

_PLAIN = {nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}


class Ends(NamedTuple):
    """The units of the rows and columns of the layers' weights.

    Attributes:
        axes: the different axes, each (size,) int64: the unit of each row or column.
        of_layers: {path: (index in ``axes`` for the rows, index for the columns)}; None: no units.
    """

    axes: tuple[Tensor, ...]
    of_layers: dict[str, tuple[int | None, int | None]]


class Skippable(NamedTuple):
    """A layer whose dead rows and columns can be skipped.

    Attributes:
        params: the names of its weight (O, I, ...) and, if it has one, its bias.
        out_units: the index of the axis with the unit of each row; None: no row is ever dead.
        in_units: the index of the axis with the unit of each column; None: no column is ever dead.
        numbers: how many numbers its weight has.
        places: how many positions of a sample it is applied to: one, or all pixels or tokens.
        readers: the paths of the layers that read its output, if nothing else does and the units of
            their columns are those of its rows; else empty.
    """

    params: tuple[str, ...]
    out_units: int | None
    in_units: int | None
    numbers: int
    places: int
    readers: tuple[str, ...] = ()


class Skippables(NamedTuple):
    """The layers of a module whose dead rows and columns can be skipped.

    Attributes:
        layers: {path: layer}.
        axes: (size,) int64 each, the unit of each entry, as in :class:`~hatfn.wiring.Units`.
    """

    layers: dict[str, Skippable]
    axes: tuple[Tensor, ...]


class Skips(NamedTuple):
    """The parts of a module that a call skips; for several tasks at once each tensor leads with T.

    Attributes:
        params: {name: tensor}, smaller weights and biases.
        hooks: {name in the module: tensor}, the buffers that the hooks of layers read.
        bare: the layers whose output has no gate and is not widened, because only layers that are
            narrowed to their live rows read it.
    """

    params: dict[str, Tensor]
    hooks: dict[str, Tensor]
    bare: frozenset[str] = frozenset()


NOTHING = Skips({}, {})
"""Nothing is skipped."""


class _Side(NamedTuple):
    """The live entries of an axis for T tasks.

    Attributes:
        axis: the index of the axis in :class:`Skippables`.
        on: (T, size) bool, whether an entry is live.
        order: (T, live) int64, the positions of the live entries; ``live`` is the largest number of
            them in any task, and at least 1. A task with fewer repeats its first one.
        counts: the number of live entries of each task.
    """

    axis: int
    on: Tensor
    order: Tensor
    counts: list[int]

    @property
    def live(self) -> int:
        """The number of entries to keep, the same for all tasks."""
        return self.order.shape[1]

    @property
    def size(self) -> int:
        """The number of entries of the axis."""
        return self.on.shape[1]

    @property
    def share(self) -> float:
        """The share of entries to keep, in (0, 1]."""
        return self.live / self.size

    def back(self) -> Tensor:
        """(T, size) int64, the position of each entry among the kept ones; ``live`` if it is dead."""
        return torch.where(self.on, self.on.cumsum(1) - 1, self.live)


class _Cut(NamedTuple):
    """The sides on which a layer is narrowed.

    Attributes:
        rows: the live rows to narrow to; None: all rows.
        cols: the live columns to narrow to; None: all columns.
    """

    rows: _Side | None
    cols: _Side | None


class Plan(NamedTuple):
    """Where layers are narrowed for T tasks.

    Attributes:
        cuts: {path: the sides on which a layer is narrowed}; other layers may be missing.
        bare: as in :class:`Skips`.
        tasks: T.
    """

    cuts: dict[str, _Cut]
    bare: frozenset[str]
    tasks: int


def layer_ends(wiring: Wiring) -> Ends:
    """The units of the rows and columns of the layers' weights.

    A side has none if no gate reaches it, if it has not one unit for each entry, or if weight and bias
    differ. The rows of a head have none, because they are classes.
    """
    axes: list[Tensor] = []

    def number(units: Units | None, size: int) -> int | None:
        if units is None or units.index.numel() != size or bool((units.index == OPEN).all()):
            return None
        flat = units.index.flatten()
        known = (i for i, axis in enumerate(axes) if torch.equal(axis, flat))
        if (found := next(known, None)) is None:
            axes.append(flat)
        return len(axes) - 1 if found is None else found

    of_layers = {}
    for path, layer in wiring.layers.items():
        roles = [wiring.params[name] for name in layer.params]
        outs = {number(role.out_units, roles[0].shape[0]) for role in roles}
        agree = len(outs) == len({role.gated for role in roles}) == 1 and roles[0].kind != "head"
        into = number(roles[0].in_units, roles[0].shape[1])
        of_layers[path] = (outs.pop() if agree else None, into)
    return Ends(tuple(axes), of_layers)


def find_skippable(module: nn.Module, wiring: Wiring, device: torch.device) -> Skippables:
    """The layers of a module that can compute with a smaller weight.

    These are PyTorch's own linear layers and ungrouped convolutions. A subclass with another forward
    may do anything else with its input, so it is left out.

    Args:
        module: any module.
        wiring: its wiring.
        device: the device of the indices.
    """
    found = {}
    with unset_fake_temporarily():  # a wiring has numbers, also where a learner is built without any
        ends = layer_ends(wiring)
    for path, (out, into) in ends.of_layers.items():
        child, layer = module.get_submodule(path), wiring.layers[path]
        plain = type(child).forward in _PLAIN and "forward" not in vars(child)
        if plain and getattr(child, "groups", 1) == 1 and not (out is None and into is None):
            shape = wiring.params[layer.params[0]].shape
            places = layer.size // shape[0]
            found[path] = Skippable(
                layer.params, out, into, torch.Size(shape).numel(), places, layer.readers
            )
    # If the user registered hooks, outputs keep their full size.
    watched = any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
    layers = {
        path: layer
        if layer.out_units is not None and not watched
        and all(r in found and found[r].in_units == layer.out_units for r in layer.readers)
        else layer._replace(readers=())
        for path, layer in found.items()
    }  # fmt: skip
    return Skippables(layers, tuple(axis.to(device) for axis in ends.axes))


def planned(skippable: Skippables, wiring: Wiring, masks: Mapping[str, Tensor], samples: int) -> Plan:
    """The layers that are worth narrowing for T tasks.

    All tasks get the same shapes, those of the task with the most live units.

    Args:
        skippable: from :func:`find_skippable`.
        wiring: the wiring of the module.
        masks: {group: (T, U)} bool.
        samples: the number of samples in the batch.
    """
    layers = skippable.layers
    tasks = len(next(iter(masks.values()))) if masks else 0
    # Under vmap, a layer whose input no gate reaches is computed once for all tasks.
    works = {
        path: samples * layer.places * layer.numbers * (1 if layer.in_units is None else tasks)
        for path, layer in layers.items()
    }
    if not tasks or max(works.values(), default=0) < SMALL:
        return Plan({}, frozenset(), tasks)
    flat = [masks[group] for group in wiring.groups]
    on = torch.cat([*flat, torch.ones_like(flat[0][:, :1])], 1)  # OPEN is -1, the last, which is on
    sides: dict[int, _Side] = {}

    def side(axis: int | None) -> _Side | None:
        if axis is None:
            return None
        if axis not in sides:
            sides[axis] = _live(axis, on[:, skippable.axes[axis]])
        return sides[axis]

    cuts = {
        path: _best(
            layers[path],
            side(layers[path].out_units),
            side(layers[path].in_units),
            samples,
            tasks,
            work,
        )
        for path, work in works.items()
        if work >= SMALL
    }
    return Plan(cuts, frozenset(_bare(layers, cuts, side)), tasks)


def skipped(skippable: Skippables, wiring: Wiring, params: Mapping[str, Tensor], plan: Plan) -> Skips:
    """The smaller weights of the layers that are narrowed for T tasks.

    Args:
        skippable: from :func:`find_skippable`.
        wiring: the wiring of the module.
        params: {name: tensor}; per-task parameters and heads lead with T.
        plan: the layers to narrow, from :func:`planned`.

    Returns:
        The parts to skip; every tensor leads with T.
    """
    layers, (cuts, bare, tasks) = skippable.layers, plan
    inner = {reader for path in bare if cuts[path].rows is not None for reader in layers[path].readers}
    smaller: dict[str, Tensor] = {}
    hooks: dict[str, Tensor] = {}
    for path, (rows, cols) in cuts.items():
        if rows is None and cols is None:
            continue
        for name in layers[path].params:
            per_task = wiring.params[name].kind in ("task", "head")
            smaller[name] = _narrow(params[name], per_task, rows, cols, tasks, path not in bare)
        if rows is not None and path not in bare:
            hooks[f"{path}.{BACK}"] = rows.back()
        if cols is not None and path not in inner:
            hooks[f"{path}.{COLUMNS}"] = cols.order
    return Skips(smaller, hooks, bare)


def _bare(
    layers: Mapping[str, Skippable],
    cuts: dict[str, _Cut],
    side: Callable[[int | None], _Side | None],
) -> set[str]:
    """The layers whose readers read only live units; ``cuts`` is changed to narrow the readers."""
    found = set()
    for path, layer in layers.items():
        units = side(layer.out_units) if layer.readers else None
        if units is None or min(units.counts) == 0:  # without live units, a dead one is kept
            continue
        if path in cuts and cuts[path].rows is not None:
            for reader in layer.readers:  # otherwise the output would have to be widened for them
                cuts[reader] = _Cut(cuts[reader].rows if reader in cuts else None, units)
        read = [cuts[reader].cols for reader in layer.readers if reader in cuts]
        if len(read) == len(layer.readers) and all(cols and cols.axis == units.axis for cols in read):
            found.add(path)
            cuts.setdefault(path, _Cut(None, None))
    return found


def _live(axis: int, on: Tensor) -> _Side:
    """The live entries of an axis, from (T, size) bool."""
    counts = on.sum(1).tolist()
    live, positions = max(1, *counts), on.nonzero()[:, 1]
    if min(counts) == live:
        return _Side(axis, on, positions.reshape(-1, live), counts)
    none = positions.new_zeros(1)
    filled = [
        torch.cat([some, (some if len(some) else none)[:1].expand(live - len(some))])
        for some in positions.split(counts)
    ]
    return _Side(axis, on, torch.stack(filled), counts)


def _best(
    layer: Skippable, out: _Side | None, into: _Side | None, samples: int, tasks: int, work: int
) -> _Cut:
    """The sides that are worth narrowing; none if narrowing costs more than it saves."""
    places = samples * layer.places

    def cost(rows: _Side | None, cols: _Side | None) -> float:
        read = layer.numbers * (rows.share if rows else 1.0)
        moved = read + places * ((rows.size if rows else 0) + (cols.live if cols else 0))
        return tasks * (places * read * (cols.share if cols else 1.0) + WORTH * moved)

    ways = [_Cut(*way) for way in ((out, into), (out, None), (None, into)) if any(way)]
    best = min(ways, key=lambda way: cost(*way))
    return best if cost(*best) < work else _Cut(None, None)


def _narrow(
    value: Tensor, per_task: bool, rows: _Side | None, cols: _Side | None, tasks: int, widened: bool
) -> Tensor:
    """A weight or bias without dead rows and columns, for each task.

    Args:
        value: (O, I, ...) or (O,); with a leading axis T if it is ``per_task``.
        per_task: whether each task has its own.
        rows: the rows to keep; None: all.
        cols: the columns to keep, ignored for a bias; None: all.
        tasks: T.
        widened: append a row of zeros, which stands for all dead rows.

    Returns:
        (T, kept rows, kept columns, ...).
    """
    shape = value.shape[per_task:]
    cols = cols if len(shape) > 1 else None
    index = torch.arange(shape[0], device=value.device).expand(tasks, -1)
    if rows is not None:
        index = torch.cat([rows.order, rows.order[:, :1]], 1) if widened else rows.order
    # One index for each kept number: int32 ones are made in a quarter of the time of int64 ones.
    width = torch.int32 if value.numel() < 2**31 else torch.int64
    index, taken = index.to(width), 1
    if cols is not None:
        index, taken = index[:, :, None] * shape[1] + cols.order.to(width)[:, None, :], 2
    if per_task:
        task = torch.arange(tasks, dtype=width, device=value.device).reshape(-1, *(1,) * taken)
        index = index + task * shape[:taken].numel()
    # One index_select for all tasks and axes: many times as fast as one for each.
    whole = value.flatten(0, taken - 1 + per_task).index_select(0, index.flatten())
    whole = whole.reshape(*index.shape, *shape[taken:])
    if cols is not None and min(cols.counts) < cols.live:
        kept = torch.arange(cols.live, device=value.device) < torch.tensor(cols.counts)[:, None].to(
            value.device
        )
        whole = whole * kept.to(whole.dtype).reshape(tasks, 1, -1, *(1,) * len(shape[taken:]))
    if rows is not None and widened:
        whole[:, -1] = 0
    return whole
