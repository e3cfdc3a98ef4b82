"""Find where units lie along the parameters of a module, and cut them out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from hatfn.network.call import call
from hatfn.network.network import Network, Output
from hatfn.network.outputs import cut_heads
from hatfn.numerics.arguments import Inputs
from hatfn.numerics.trees import take
from hatfn.state import HATState
from hatfn.wiring import ParamWiring, Units

Values = Mapping[str, Tensor]
"""All parameters and buffers of a module, by name."""

Rows = Mapping[str, Mapping[int, Tensor]]
"""{name: {axis: the entries to keep}}; other names and axes stay whole."""

_FIXED = {"groups": 1, "num_groups": None, "normalized_shape": None}
"""Attributes that fix a layer's number of channels, and the value with which they do not fix it."""


class Layout(NamedTuple):
    """Where the units of one task lie along the parameters of the module.

    Attributes:
        network: the static half of the learner.
        axes: {name: {axis: the units along it}}, the axes at which parameters and statistics can be
            cut.
        masks: {group: (U,) bool}, the task's gates.
        alive: {group: (U,) bool}, the units to keep: those that are on, but at least one.
    """

    network: Network
    axes: dict[str, dict[int, Units]]
    masks: dict[str, Tensor]
    alive: dict[str, Tensor]


def numbers(network: Network, state: HATState, task: int) -> Values:
    """The module's parameters and buffers for one task, without gates, heads cut to its classes."""
    task_params = cut_heads(network, take(state.task_params, task), task)
    fixed = {**network.untrained, **network.constants}
    return {**state.params, **task_params, **take(state.task_buffers, task), **fixed}


def layout(network: Network, values: Values, masks: dict[str, Tensor]) -> Layout:
    """Find where the units of a task lie.

    Args:
        network: the static half of the learner.
        values: the module's parameters and buffers for the task, see :func:`numbers`.
        masks: {group: (U,) bool}, the task's gates.
    """
    roles = network.wiring.params
    axes = {name: _param_axes(role, values[name].dim()) for name, role in roles.items()}
    for name in values.keys() - roles.keys():
        path = name.rpartition(".")[0]
        for affine in (f"{path}.weight".lstrip("."), f"{path}.bias".lstrip(".")):
            # The statistics of a norm have an entry for each channel, as its scale and shift have.
            if affine in roles and values[affine].shape == values[name].shape:
                axes[name] = axes[affine]
    alive = {group: _one_at_least(mask) for group, mask in masks.items()}
    return Layout(network, axes, masks, alive)


def _param_axes(role: ParamWiring, dims: int) -> dict[int, Units]:
    """The axes at which a parameter can be cut, with the units along each.

    An axis can be cut if its units lie along no other axis. If both in units and out units lie along an
    axis, it is cut by the out units.
    """
    axes: dict[int, Units] = {}
    for units in (role.in_units, role.out_units):
        if units is not None:
            shape = units.index.shape
            along = [axis + dims - len(shape) for axis, size in enumerate(shape) if size > 1]
            if len(along) == 1:
                axes[along[0]] = units
    return axes


def _one_at_least(mask: Tensor) -> Tensor:
    """The mask, or its first unit if none is on: a layer cannot be empty."""
    first = torch.arange(len(mask), device=mask.device) == 0
    return mask | (first & ~mask.any())


def cleared(this: Layout, values: Values) -> dict[str, Tensor]:
    """The values with 0 (``role.off``) in every entry whose out unit or in unit is off.

    Entries are replaced, not multiplied by 0, so nan and infinity become 0 too. This is right even if
    a later norm applies the gate of the unit, because the gate switches off the norm's result.
    """
    lookup = this.network.wiring.lookup(this.masks)

    def clear(value: Tensor, role: ParamWiring) -> Tensor:
        ends = [lookup(units) for units in (role.out_units, role.in_units) if units is not None]
        return torch.where(reduce(torch.logical_and, ends), value, role.off) if ends else value

    roles = this.network.wiring.params
    return {**values, **{name: clear(values[name], role) for name, role in roles.items()}}


def input_mask(this: Layout) -> Tensor | None:
    """Bool, broadcastable to x: the input features that the task reads; None without input gates."""
    gate = this.network.wiring.input
    return None if gate is None else this.network.wiring.lookup(this.masks)(gate)


def fixed_groups(network: Network) -> set[str]:
    """The groups that cannot be cut because a layer with a fixed number of channels uses them."""
    wiring, found = network.wiring, set()
    names = ["", "", *wiring.groups]  # the lookup gives 1 for an entry without a unit
    numbers = {
        group: torch.full((units,), number)
        for number, (group, units) in enumerate(wiring.groups.items(), start=2)
    }
    lookup = wiring.to("cpu").lookup(numbers)
    for name, role in wiring.to("cpu").params.items():
        layer = network.evaluate.get_submodule(network.names.get(name, name).rpartition(".")[0])
        if any(getattr(layer, attribute, free) != free for attribute, free in _FIXED.items()):
            ends = [
                lookup(units).unique().tolist() for units in (role.out_units, role.in_units) if units
            ]
            found |= {names[number] for end in ends for number in end}
    return found


def rows_of(this: Layout, groups: Iterable[str]) -> Rows:
    """The entries that stay along every axis if the dead units of these groups are cut out."""
    chosen = set(groups)
    keep = {g: on if g in chosen else torch.ones_like(on) for g, on in this.alive.items()}
    lookup = this.network.wiring.lookup(keep)

    def rows(axes: Mapping[int, Units]) -> dict[int, Tensor]:
        kept = {axis: lookup(units).flatten() for axis, units in axes.items()}
        return {axis: on.nonzero().flatten() for axis, on in kept.items() if not bool(on.all())}

    return {name: rows(axes) for name, axes in this.axes.items()}


def cut(values: Values, rows: Rows) -> dict[str, Tensor]:
    """The values with only the entries in ``rows``."""
    small = dict(values)
    for name, axes in rows.items():
        for axis, kept in axes.items():
            small[name] = small[name].index_select(axis, kept)
    return small


def outline(values: Values, rows: Rows) -> dict[str, Tensor]:
    """Tensors on the meta device with the shapes that :func:`cut` would give."""
    shapes = {name: list(value.shape) for name, value in values.items()}
    for name, axes in rows.items():
        for axis, kept in axes.items():
            shapes[name][axis] = len(kept)
    return {n: torch.empty(s, dtype=values[n].dtype, device="meta") for n, s in shapes.items()}


def run(
    network: Network,
    values: Values,
    x: Inputs,
    *,
    mask: Tensor | None = None,
    gates: Mapping[str, Tensor] | None = None,
) -> Output:
    """The module's output in eval mode.

    Args:
        network: the static half of the learner.
        values: all parameters and buffers, of any widths that fit together.
        x: (B, ...).
        mask: bool, broadcastable to x: the input features to read; None: all.
        gates: {group: (U,)}, only for values as wide as the module's own; None: no gates.
    """
    constants = {name: values[name] for name in network.constants}
    buffers = {name: values[name] for name in network.wiring.buffers}
    params = {n: v for n, v in values.items() if n not in constants and n not in buffers}
    if mask is not None:
        x = x.map(lambda value: torch.where(mask, value, 0))
    network = network._replace(constants=constants)
    return call(network, network.evaluate, params, buffers, gates, x)[0]
