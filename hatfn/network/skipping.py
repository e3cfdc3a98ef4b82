"""Dead units are not computed: under binary gates a layer works on its live rows and columns alone.

A unit that is off is zero wherever it is read, so a product may leave it out on both sides, and what it
makes may be left at zero. The module stays as it is: a layer is handed a smaller weight, its input is
narrowed on the way in and its output widened on the way out, or neither where the next layer reads
just what this one makes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hatfn.network.hooks import BACK, COLUMNS
from hatfn.wiring import OPEN, Units, Wiring

WORTH = 16
"""Multiplications that take about as long as moving a number, on a CPU."""

SMALL = 2**21
"""Multiplications of a layer below which nothing is looked at: the look takes as long."""

_PLAIN = {nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}


class Ends(NamedTuple):
    """Which units lie along the weights of layers.

    Attributes:
        axes: (size,) int64 each, the unit of each entry of an axis; no two are equal.
        of_layers: {path: (number of the axis of its rows, number of the axis of its columns)}.
    """

    axes: tuple[Tensor, ...]
    of_layers: dict[str, tuple[int | None, int | None]]


class Skippable(NamedTuple):
    """A layer whose dead rows and columns can be left out.

    Attributes:
        params: names of its weight (O, I, ...) and, if it has one, its bias.
        out_units: number of the axis with the unit of each row; None: no row is ever dead.
        in_units: number of the axis with the unit of each column; None: no column is ever dead.
        numbers: of its weight.
        places: at which it is applied to a sample: one, pixels or tokens.
        readers: layers that alone read what it returns, and of that only what their columns meet.
    """

    params: tuple[str, ...]
    out_units: int | None
    in_units: int | None
    numbers: int
    places: int
    readers: tuple[str, ...] = ()


class Skippables(NamedTuple):
    """The layers of a module whose dead rows and columns can be left out.

    Attributes:
        layers: {path: layer}.
        axes: (size,) int64 each, the unit of each entry, numbered as in :class:`~hatfn.wiring.Units`.
    """

    layers: dict[str, Skippable]
    axes: tuple[Tensor, ...]


class Skips(NamedTuple):
    """What a call of the module leaves out; of several tasks at once each tensor leads with T.

    Attributes:
        params: {name: tensor}, smaller weights and biases.
        hooks: {name in the module: tensor}, where a layer's input and output lie.
        bare: layers that return their live rows alone, or dead ones ungated: nobody reads these.
    """

    params: dict[str, Tensor]
    hooks: dict[str, Tensor]
    bare: frozenset[str] = frozenset()


NOTHING = Skips({}, {})
"""Everything is computed."""


class _Side(NamedTuple):
    """The live entries of an axis for T tasks.

    Attributes:
        axis: number of the axis.
        on: (T, size) bool.
        order: (T, live) int64, where they are; as many as the widest task has, and at least one. Where
            a task has fewer, its first one again.
        counts: of each task's live entries.
    """

    axis: int
    on: Tensor
    order: Tensor
    counts: list[int]

    @property
    def live(self) -> int:
        """How many are taken for live."""
        return self.order.shape[1]

    @property
    def size(self) -> int:
        """How many entries the axis has."""
        return self.on.shape[1]

    @property
    def share(self) -> float:
        """Of them the part that is live."""
        return self.live / self.size

    def back(self) -> Tensor:
        """(T, size) int64, the place of each entry among them, ``live`` if it is dead."""
        return torch.where(self.on, self.on.cumsum(1) - 1, self.live)


class _Cut(NamedTuple):
    """How a layer is narrowed.

    Attributes:
        rows: to its live rows, or None.
        cols: to its live columns, or None.
    """

    rows: _Side | None
    cols: _Side | None


def layer_ends(wiring: Wiring) -> Ends:
    """The unit of each row and of each column of the weights of layers.

    None where no gate reaches that side, where an entry has no unit of its own, and where weight and
    bias disagree; a head's rows are classes.
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
    """The layers of a module that may be handed a smaller weight.

    Linear layers and ungrouped convolutions as PyTorch has them: of a layer with a forward of its own
    nobody knows what else it does with its input.

    Args:
        module: any.
        wiring: its wiring.
        device: where to put indices.
    """
    found, ends = {}, layer_ends(wiring)
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


def skipped(
    skippable: Skippables,
    wiring: Wiring,
    params: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    samples: int,
) -> Skips:
    """What the layers are handed that are worth narrowing, for each of T tasks.

    All tasks get the same shapes: where one has fewer live units than another, others fill up.

    Args:
        skippable: from :func:`find_skippable`.
        wiring: of the module.
        params: {name: tensor}; what tasks have of their own leads with T.
        masks: {group: (T, U)} bool.
        samples: in the batch.

    Returns:
        what is left out, of T tasks.
    """
    layers = skippable.layers
    tasks = len(next(iter(masks.values()))) if masks else 0
    # What no gate reaches is the same for all tasks, and in one vmap computed once.
    works = {
        path: samples * layer.places * layer.numbers * (1 if layer.in_units is None else tasks)
        for path, layer in layers.items()
    }
    if not tasks or max(works.values(), default=0) < SMALL:
        return NOTHING
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
    bare = _bare(layers, cuts, side)
    inner = {reader for path in bare if cuts[path].rows is not None for reader in layers[path].readers}
    smaller: dict[str, Tensor] = {}
    hooks: dict[str, Tensor] = {}
    for path, (rows, cols) in cuts.items():
        if rows is None and cols is None:
            continue
        for name in layers[path].params:
            own = wiring.params[name].kind in ("task", "head")
            smaller[name] = _narrow(params[name], own, rows, cols, tasks, path not in bare)
        if rows is not None and path not in bare:
            hooks[f"{path}.{BACK}"] = rows.back()
        if cols is not None and path not in inner:
            hooks[f"{path}.{COLUMNS}"] = cols.order
    return Skips(smaller, hooks, frozenset(bare))


def _bare(
    layers: Mapping[str, Skippable],
    cuts: dict[str, _Cut],
    side: Callable[[int | None], _Side | None],
) -> set[str]:
    """The layers of whose output nothing is read but what is live; their readers are cut to that."""
    found = set()
    for path, layer in layers.items():
        units = side(layer.out_units) if layer.readers else None
        if units is None or min(units.counts) == 0:  # then a dead unit stands for a live one
            continue
        if path in cuts and cuts[path].rows is not None:
            for reader in layer.readers:  # what they would read else would be widened first
                cuts[reader] = _Cut(cuts[reader].rows if reader in cuts else None, units)
        read = [cuts[reader].cols for reader in layer.readers if reader in cuts]
        if len(read) == len(layer.readers) and all(cols and cols.axis == units.axis for cols in read):
            found.add(path)
            cuts.setdefault(path, _Cut(None, None))
    return found


def _live(axis: int, on: Tensor) -> _Side:
    """The live entries of an axis, from (T, size) bool."""
    counts = on.sum(1).tolist()
    live, places = max(1, *counts), on.nonzero()[:, 1]
    if min(counts) == live:
        return _Side(axis, on, places.reshape(-1, live), counts)
    none = places.new_zeros(1)
    filled = [
        torch.cat([own, (own if len(own) else none)[:1].expand(live - len(own))])
        for own in places.split(counts)
    ]
    return _Side(axis, on, torch.stack(filled), counts)


def _best(
    layer: Skippable, out: _Side | None, into: _Side | None, samples: int, tasks: int, work: int
) -> _Cut:
    """The sides that are worth narrowing; neither if none saves as much as it costs."""
    places = samples * layer.places

    def cost(rows: _Side | None, cols: _Side | None) -> float:
        read = layer.numbers * (rows.share if rows else 1.0)
        moved = read + places * ((rows.size if rows else 0) + (cols.live if cols else 0))
        return tasks * (places * read * (cols.share if cols else 1.0) + WORTH * moved)

    ways = [_Cut(*way) for way in ((out, into), (out, None), (None, into)) if any(way)]
    best = min(ways, key=lambda way: cost(*way))
    return best if cost(*best) < work else _Cut(None, None)


def _narrow(
    value: Tensor, own: bool, rows: _Side | None, cols: _Side | None, tasks: int, widened: bool
) -> Tensor:
    """A weight or bias without what is dead, for each task.

    Args:
        value: (O, I, ...) or (O,); of T tasks if it is their ``own``.
        own: whether every task has one.
        rows: to keep, or None for all.
        cols: likewise; a bias has none.
        tasks: T.
        widened: put a row of zeros behind them, for the dead rows.
    """
    shape = value.shape[own:]
    cols = cols if len(shape) > 1 else None
    index = torch.arange(shape[0], device=value.device).expand(tasks, -1)
    if rows is not None:
        index = torch.cat([rows.order, rows.order[:, :1]], 1) if widened else rows.order
    # There is an index for every number that is kept: a narrow one is made in a quarter of the time.
    width = torch.int32 if value.numel() < 2**31 else torch.int64
    index, taken = index.to(width), 1
    if cols is not None:
        index, taken = index[:, :, None] * shape[1] + cols.order.to(width)[:, None, :], 2
    if own:
        task = torch.arange(tasks, dtype=width, device=value.device).reshape(-1, *(1,) * taken)
        index = index + task * shape[:taken].numel()
    # One flat pick of what all tasks keep: many times as fast as one for each axis of each task.
    whole = value.flatten(0, taken - 1 + own).index_select(0, index.flatten())
    whole = whole.reshape(*index.shape, *shape[taken:])
    if cols is not None and min(cols.counts) < cols.live:
        kept = torch.arange(cols.live, device=value.device) < torch.tensor(cols.counts)[:, None].to(
            value.device
        )
        whole = whole * kept.to(whole.dtype).reshape(tasks, 1, -1, *(1,) * len(shape[taken:]))
    if rows is not None and widened:
        whole[:, -1] = 0
    return whole
