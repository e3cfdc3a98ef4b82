"""Dead units are not computed: under binary gates a layer works on its live rows and columns alone.

A unit that is off is zero wherever it is read, so a product may leave it out on both sides, and what it
makes may be left at zero. The module stays as it is: a layer is handed a smaller weight, its input is
narrowed on the way in and its output widened on the way out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hatfn.modules import BACK, COLUMNS
from hatfn.wiring import Wiring

WORTH = 16
"""Multiplications that take about as long as moving a number, on a CPU."""

SMALL = 2**21
"""Multiplications of a layer below which nothing is looked at: the look takes as long."""

_PLAIN = {nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}


class Skippable(NamedTuple):
    """A layer whose dead rows and columns can be left out.

    Attributes:
        params: names of its weight (O, I, ...) and, if it has one, its bias.
        out: (O,) int64, the unit of each row, numbered as in :class:`~hatfn.wiring.Units`; None: no
            row is ever dead.
        into: (I,) int64, the unit of each column; None likewise.
        numbers: of its weight.
        places: at which it is applied to a sample: one, pixels or tokens.
    """

    params: tuple[str, ...]
    out: Tensor | None
    into: Tensor | None
    numbers: int
    places: int


class _Side(NamedTuple):
    """The live entries of an axis for T tasks.

    Attributes:
        order: (T, live) int64, where they are; as many as the widest task has, and at least one.
        back: (T, size) int64, the place of each entry among them, ``live`` if it is dead.
    """

    order: Tensor
    back: Tensor

    @property
    def live(self) -> int:
        """How many are taken for live."""
        return self.order.shape[1]

    @property
    def size(self) -> int:
        """How many entries the axis has."""
        return self.back.shape[1]

    @property
    def share(self) -> float:
        """Of them the part that is live."""
        return self.live / self.size


def find_skippable(module: nn.Module, wiring: Wiring, device: torch.device) -> dict[str, Skippable]:
    """The layers of a module that may be handed a smaller weight, by their path.

    Linear layers and ungrouped convolutions as PyTorch has them: of a layer with a forward of its own
    nobody knows what else it does with its input.

    Args:
        module: any.
        wiring: its wiring.
        device: where to put indices.
    """
    placed: dict[int, Tensor] = {}  # equal axes are one object, and looked up once per call

    def put(axis: Tensor | None) -> Tensor | None:
        return None if axis is None else placed.setdefault(id(axis), axis.to(device))

    found = {}
    for path, (out, into) in wiring.ends.items():
        child, layer = module.get_submodule(path), wiring.layers[path]
        plain = type(child).forward in _PLAIN and "forward" not in vars(child)
        if plain and getattr(child, "groups", 1) == 1 and not (out is None and into is None):
            shape = wiring.params[layer.params[0]].shape
            places = layer.size // shape[0]
            found[path] = Skippable(
                layer.params, put(out), put(into), torch.Size(shape).numel(), places
            )
    return found


def skipped(
    layers: Mapping[str, Skippable],
    wiring: Wiring,
    params: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    samples: int,
) -> dict[str, Tensor]:
    """What the layers are handed that are worth narrowing, for each of T tasks.

    All tasks get the same shapes: where one has fewer live units than another, dead ones fill up.

    Args:
        layers: from :func:`find_skippable`.
        wiring: of the module.
        params: {name: tensor}; what tasks have of their own leads with T.
        masks: {group: (T, U)} bool.
        samples: in the batch.

    Returns:
        {name: (T, ...)}: smaller weights and biases, and where a layer's input and output lie.
    """
    tasks = len(next(iter(masks.values()))) if masks else 0
    # What no gate reaches is the same for all tasks, and in one vmap computed once.
    works = {
        path: samples * layer.places * layer.numbers * (1 if layer.into is None else tasks)
        for path, layer in layers.items()
    }
    works = {path: work for path, work in works.items() if work >= SMALL}
    if not works or not tasks:
        return {}
    flat = [masks[group] for group in wiring.groups]
    on = torch.cat([*flat, torch.ones_like(flat[0][:, :1])], 1)  # OPEN is -1, the last, which is on
    sides: dict[int, _Side] = {}

    def side(units: Tensor | None) -> _Side | None:
        if units is None:
            return None
        return sides.get(id(units)) or sides.setdefault(id(units), _live(on[:, units]))

    found: dict[str, Tensor] = {}
    for path, work in works.items():
        layer = layers[path]
        rows, cols = _best(layer, side(layer.out), side(layer.into), samples, tasks, work)
        if rows is None and cols is None:
            continue
        for name in layer.params:
            own = wiring.params[name].kind == "task"
            each = [params[name][t] if own else params[name] for t in range(tasks)]
            found[name] = _narrow(each, rows, cols)
        if rows is not None:
            found[f"{path}.{BACK}"] = rows.back
        if cols is not None:
            found[f"{path}.{COLUMNS}"] = cols.order
    return found


def _live(on: Tensor) -> _Side:
    """Of (T, size) bool the live entries; where a task has fewer than another, its first dead one."""
    live = max(1, int(on.sum(1).max()))
    back = torch.where(on, on.cumsum(1) - 1, live)
    dead = on.to(torch.uint8).argmin(1, keepdim=True).expand(-1, live + 1)
    places = torch.arange(on.shape[1], device=on.device).expand_as(back)
    return _Side(dead.scatter(1, back, places)[:, :live], back)


def _best(
    layer: Skippable, out: _Side | None, into: _Side | None, samples: int, tasks: int, work: int
) -> tuple[_Side | None, _Side | None]:
    """The sides that are worth narrowing; (None, None) if none saves as much as it costs."""
    places = samples * layer.places

    def cost(rows: _Side | None, cols: _Side | None) -> float:
        read = layer.numbers * (rows.share if rows else 1.0)
        moved = read + places * ((rows.size if rows else 0) + (cols.live if cols else 0))
        return tasks * (places * read * (cols.share if cols else 1.0) + WORTH * moved)

    ways = [way for way in ((out, into), (out, None), (None, into)) if any(way)]
    best = min(ways, key=lambda way: cost(*way))
    return best if cost(*best) < work else (None, None)


def _narrow(values: list[Tensor], rows: _Side | None, cols: _Side | None) -> Tensor:
    """Weights or biases without what is dead, and a row of zeros behind them for the dead rows."""
    if rows is not None:
        values = [value.index_select(0, row) for value, row in zip(values, rows.order, strict=True)]
    if cols is not None and values[0].dim() > 1:
        values = [value.index_select(1, col) for value, col in zip(values, cols.order, strict=True)]
    whole = torch.stack(values) if len(values) > 1 else values[0][None]
    return whole if rows is None else nn.functional.pad(whole, [0, 0] * (whole.dim() - 2) + [0, 1])
