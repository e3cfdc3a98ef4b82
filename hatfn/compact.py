"""compact(): one task's subnetwork, with its dead units sliced out of the parameters.

What a module fixes in its attributes (``groups``, ``normalized_shape``, the size of a reshape) does
not follow a slice, and nothing static tells where that is. So slices are tried on a small input: a
group is sliced if the module still gives what the masked one gives, and stays whole if not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import optree
import pandas as pd
import torch
from torch import Tensor

from hatfn.checks import check_input
from hatfn.forward import Network, Output, call, cut_heads
from hatfn.initial import lively
from hatfn.seeds import seeded
from hatfn.state import HATState, take
from hatfn.wiring import ParamWiring, Units

_TOLERANCE = 1e-9
"""How far sliced and masked outputs may lie apart in float64, relative to the largest of them."""

_SAMPLES = 2
"""Samples of a trial: one would not show a reshape that mixes samples and channels."""

Values = Mapping[str, Tensor]
Rows = Mapping[str, Mapping[int, Tensor]]
"""{name: {axis: the entries to keep}}."""
Trial = Callable[[Sequence[str]], bool]
"""Whether the module still agrees if these groups are sliced."""


class Subnet(NamedTuple):
    """One task's subnetwork: the numbers with which the module gives the task's logits with less work.

    Where the head is the module's own and the input has no gate, the module itself takes them:
    ``torch.func.functional_call(module.eval(), {**small.params, **small.buffers}, (x,))``. Calling the
    subnetwork, ``small(x)``, always works.

    Attributes:
        params: {name: tensor}, sliced, gates folded in, the head cut to the task's classes.
        buffers: {name: tensor}, all of the module's, the task's running statistics among them, sliced.
        report: a row per group: its "units", how many are "used" by the task and "kept", and what
            "became" of it: "sliced", "whole" (the module would not follow), or "full" (all are used).
        sizes: how many numbers the parameters hold before and after, one task's head counted.
        network: the module's structure.
        seen: bool, the input features that the task reads, if the input has gates.
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    report: pd.DataFrame
    sizes: tuple[int, int]
    network: Network
    seen: Tensor | None

    def __call__(self, x: Tensor) -> Output:
        """The task's output in eval mode.

        Args:
            x: (B, ...).

        Returns:
            What ``hat.forward`` gives for the task, but for rounding.

        Raises:
            TypeError, ValueError: an input of another shape.
        """
        check_input("Subnet", x, self.network.wiring)
        return _run(self.network, {**self.params, **self.buffers}, self.seen, x)


class _Task(NamedTuple):
    """What a trial needs to know of the task.

    Attributes:
        network: the static half.
        roles: {name: what takes part}, the parameters of the module and of a head behind it.
        axes: {name: {axis: the units along it}}, where a parameter or statistic can be sliced.
        masks: {group: (U,) bool}, the task's gates.
        alive: {group: (U,) bool}, the units to keep: those that are on, or one.
        seen: which input features are on.
    """

    network: Network
    roles: dict[str, ParamWiring]
    axes: dict[str, dict[int, Units]]
    masks: dict[str, Tensor]
    alive: dict[str, Tensor]
    seen: Tensor | None


def compact(network: Network, state: HATState, task: int, x: Tensor | None = None) -> Subnet:
    """Slice the dead units of a learned task out of parameters and running statistics.

    What dead units leave in entries that stay is selected away, not multiplied by zero, so that
    nothing that later training puts there matters. A group keeps at least one unit.

    Slices are tried in float64: for shapes alone first, which costs no arithmetic, then for values,
    with the task's weights and with random ones, behind which no dead layer hides a wrong slice.

    Args:
        network: the static half of the learner.
        state: with ``task`` learned.
        task: which.
        x: (B, ...), an input to try slices on (two of its samples); None: random numbers.

    Returns:
        The subnetwork.

    Raises:
        ValueError: the module fails on random numbers and no ``x`` is given.
    """
    wiring, masks = network.wiring, take(state.masks, task)
    own = cut_heads(network, take(state.task_params, task), task)
    raw = {**state.params, **own, **take(state.task_buffers, task), **network.constants}
    look, roles = wiring.lookup(masks), _roles(network, raw)
    values = _all_cleared(raw, roles, look)
    this = _Task(
        network,
        roles,
        _axes(values, roles),
        masks,
        {group: _one_at_least(mask) for group, mask in masks.items()},
        None if wiring.input is None else look(wiring.input),
    )
    sliced = [group for group, alive in this.alive.items() if not bool(alive.all())]
    if sliced:
        with warnings.catch_warnings(), torch.no_grad(), seeded(this.masks[sliced[0]].device, 0):
            warnings.simplefilter("ignore")  # what is tried and refused is nobody's concern
            sliced = _sliceable(this, raw, x, sliced)
    small = _cut(values, _rows(this, sliced))
    return Subnet(
        {name: small[name] for name in roles},
        {name: value for name, value in small.items() if name not in roles},
        _report(this, sliced),
        (_count(raw[name] for name in roles), _count(small[name] for name in roles)),
        network._replace(initial={}, constants={name: small[name] for name in network.constants}),
        this.seen,
    )


def _roles(network: Network, values: Values) -> dict[str, ParamWiring]:
    """The part of every parameter, of those of a head put behind the module as well."""
    roles = dict(network.wiring.params)
    if network.added and network.classes is not None:
        weight, bias = network.heads
        output = network.wiring.output
        roles[weight] = ParamWiring(tuple(values[weight].shape), "head", None, output)
        roles[bias] = ParamWiring(tuple(values[bias].shape), "head")
    return roles


def _cleared(value: Tensor, role: ParamWiring, look: Callable[[Units], Tensor]) -> Tensor:
    """A parameter with zeros where the unit it produces or the unit that feeds it is off.

    Also where a later norm holds the gate: what the norm makes of zeros is switched off like anything.
    """
    for units in (role.out, role.into):
        if units is not None:
            value = torch.where(look(units), value, 0)
    return value


def _all_cleared(
    values: Values, roles: Mapping[str, ParamWiring], look: Callable[[Units], Tensor]
) -> dict[str, Tensor]:
    return {**values, **{name: _cleared(values[name], role, look) for name, role in roles.items()}}


def _axes(values: Values, roles: Mapping[str, ParamWiring]) -> dict[str, dict[int, Units]]:
    """Along which axis of each parameter and statistic units lie."""
    axes = {name: _param_axes(role, values[name].dim()) for name, role in roles.items()}
    for name in values.keys() - roles.keys():
        path = name.rpartition(".")[0]
        for affine in (f"{path}.weight".lstrip("."), f"{path}.bias".lstrip(".")):
            # A norm's statistics lie beside its scale and shift, one for each channel.
            if affine in roles and values[affine].shape == values[name].shape:
                axes[name] = axes[affine]
    return axes


def _param_axes(role: ParamWiring, dims: int) -> dict[int, Units]:
    """An axis can be sliced if some units lie along it alone; an axis with both, by what it makes."""
    axes: dict[int, Units] = {}
    for units in (role.into, role.out):
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


def _rows(this: _Task, sliced: Iterable[str]) -> Rows:
    """What is left of every axis if these groups are sliced."""
    chosen = set(sliced)
    keep = {g: on if g in chosen else torch.ones_like(on) for g, on in this.alive.items()}
    look = this.network.wiring.lookup(keep)
    rows: dict[str, dict[int, Tensor]] = {}
    for name, axes in this.axes.items():
        keeps = {axis: look(units).flatten() for axis, units in axes.items()}
        rows[name] = {a: on.nonzero().flatten() for a, on in keeps.items() if not bool(on.all())}
    return rows


def _cut(values: Values, rows: Rows) -> dict[str, Tensor]:
    small = dict(values)
    for name, axes in rows.items():
        for axis, kept in axes.items():
            small[name] = small[name].index_select(axis, kept)
    return small


def _outline(values: Values, rows: Rows) -> dict[str, Tensor]:
    """The shapes of :func:`_cut`, without numbers."""
    shapes = {name: list(value.shape) for name, value in values.items()}
    for name, axes in rows.items():
        for axis, kept in axes.items():
            shapes[name][axis] = len(kept)
    return {n: torch.empty(s, dtype=values[n].dtype, device="meta") for n, s in shapes.items()}


def _run(
    network: Network,
    values: Values,
    seen: Tensor | None,
    x: Tensor,
    gates: Mapping[str, Tensor] | None = None,
) -> Output:
    """The module's output from all of its numbers in one dict."""
    constants = {name: values[name] for name in network.constants}
    buffers = {name: values[name] for name in network.wiring.buffers}
    params = {n: v for n, v in values.items() if n not in constants and n not in buffers}
    if seen is not None and gates is None:
        x = torch.where(seen, x, 0)
    network = network._replace(constants=constants)
    return call(network, network.evaluate, params, buffers, gates, x)[0]


def _sliceable(this: _Task, raw: Values, x: Tensor | None, groups: list[str]) -> list[str]:
    """Those of the groups that can be sliced together, found by trial."""
    network, generator = this.network, torch.Generator().manual_seed(0)
    task = {name: _double(value).nan_to_num(0, 0, 0) for name, value in raw.items()}
    drawn = lively({n: v for n, v in task.items() if n not in network.constants}, generator)
    look = network.wiring.lookup(this.masks)
    x = _sample(this, x, generator)
    cases = []
    for values in (task, task | drawn):
        output = _leaves(_run(network, values, this.seen, x, this.masks))
        if any(bool(leaf.isfinite().any()) for leaf in output):  # else it could tell nothing
            cases.append((_all_cleared(values, this.roles, look), output))
    if not cases:
        return []
    hollow, seen = x.to("meta"), None if this.seen is None else this.seen.to("meta")

    def fits(sliced: Sequence[str]) -> bool:
        values, output = cases[0]
        tried = _leaves(_run(network, _outline(values, _rows(this, sliced)), seen, hollow))
        return [leaf.shape for leaf in tried] == [leaf.shape for leaf in output]

    def agrees(sliced: Sequence[str]) -> bool:
        rows = _rows(this, sliced)
        return all(
            _close(_leaves(_run(network, _cut(values, rows), this.seen, x)), output)
            for values, output in cases
        )

    if _holds(fits, []):  # else the module cannot be run without numbers
        groups = _largest(fits, groups)
    groups = _largest(agrees, groups)
    if not groups and not agrees([]):
        raise RuntimeError(
            "compact: the module gives other outputs with dead weights set to zero than with gates. "
            "Expected the same: two calls of it must agree, and hatfn.testing.verify_wiring must pass. "
            "If both do, please report it."
        )
    return groups


def _holds(trial: Trial, groups: Sequence[str]) -> bool:
    """A trial that fails in whichever way says no."""
    try:
        return trial(groups)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False


def _largest(trial: Trial, groups: list[str]) -> list[str]:
    """As many of the groups as pass the trial together: all, or half by half."""

    def grow(found: list[str], more: list[str]) -> list[str]:
        if not more or _holds(trial, found + more):
            return found + more
        if len(more) == 1:
            return found
        middle = len(more) // 2
        return grow(grow(found, more[:middle]), more[middle:])

    return grow([], groups)


def _sample(this: _Task, x: Tensor | None, generator: torch.Generator) -> Tensor:
    """The input of the trials; drawn ones are tried on the module, which may want integers."""
    if x is not None:
        return _double(x[:_SAMPLES])
    device = next(iter(this.masks.values())).device
    shape = (_SAMPLES, *this.network.wiring.input_shape)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


def _double(value: Tensor) -> Tensor:
    return value.detach().double() if value.is_floating_point() else value


def _leaves(output: Output) -> list[Tensor]:
    return [leaf for leaf in optree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _close(tried: list[Tensor], output: list[Tensor]) -> bool:
    """Whether outputs are the same but for rounding, shapes and non-finite numbers included."""

    def same(a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape:
            return False
        largest = b.abs().nan_to_num(0, 0, 0).max().item() if b.numel() else 0.0
        return torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE * largest, equal_nan=True)

    return len(tried) == len(output) and all(map(same, tried, output))


def _count(values: Iterable[Tensor]) -> int:
    return sum(value.numel() for value in values)


def _report(this: _Task, sliced: Sequence[str]) -> pd.DataFrame:
    rows = {}
    for group, alive in this.alive.items():
        units, used, kept = len(alive), int(this.masks[group].sum()), int(alive.sum())
        became = "full" if kept == units else "sliced" if group in sliced else "whole"
        kept = units if became == "whole" else kept
        rows[group] = {"units": units, "used": used, "kept": kept, "became": became}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["units", "used", "kept", "became"])
