"""Gates on some groups of units alone, such as those of adapters in a frozen module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from hatfn.checks.values import check_kind, check_list
from hatfn.wiring import OPEN, ParamWiring, Units, Wiring


def select(wiring: Wiring, groups: Iterable[str]) -> Wiring:
    """The wiring with gates on some groups alone; all other units are on in every task.

    A parameter without a gate on one of its entries is per task, unless it has ``requires_grad=False``:
    then all tasks use it as it is. So a frozen module with adapters needs gates on the adapters alone.

    Args:
        wiring: the wiring of a module.
        groups: the names of the groups that keep their gates.

    Raises:
        TypeError, ValueError: no wiring; no group, or a name that is no group.

    Example:
        >>> import hatfn
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6), torch.nn.ReLU(),
        ...     torch.nn.Linear(6, 2),
        ... )
        >>> wiring = hatfn.trace(net, torch.zeros(1, 4))
        >>> dict(select(wiring, ["2"]).groups)
        {'2': 6}
    """
    check_kind("select", "wiring", wiring, Wiring, "what hatfn.trace(module, x) gives")
    check_list("select", "groups", groups, "names of groups, such as those in wiring.groups")
    names = [*groups]
    if unknown := [name for name in names if name not in wiring.groups]:
        raise ValueError(
            f"select: {unknown[0]!r} is no group of the wiring. Expected some of "
            f"{', '.join(map(repr, wiring.groups))}."
        )
    if not names:
        raise ValueError("select: groups is empty. Expected at least one group, or no select().")
    return _selected(wiring, {*names})


def _selected(wiring: Wiring, names: set[str]) -> Wiring:
    """The body of :func:`select`, also for the wirings that a wiring holds."""
    sizes = {name: count for name, count in wiring.groups.items() if name in names}
    parts = [
        torch.full((count,), OPEN) if name not in names else torch.arange(count) + _first(sizes, name)
        for name, count in wiring.groups.items()
    ]
    number = torch.cat([*parts, torch.full((1,), OPEN)])  # the last entry is read by OPEN

    def units(old: Units | None) -> Units | None:
        if old is None:
            return None
        index = number.to(old.index.device)[old.index]
        kept = old.group if old.group in names else None
        return None if bool((index == OPEN).all()) else Units(index, kept)

    def role(old: ParamWiring) -> ParamWiring:
        new = old._replace(out_units=units(old.out_units), in_units=units(old.in_units))
        return new._replace(kind="task") if old.kind == "shared" and _loose(new) else new

    gated, headless = (w and _selected(w, names) for w in (wiring.gated, wiring.headless))
    return replace(
        wiring,
        groups=sizes,
        params={name: role(old) for name, old in wiring.params.items()},
        input=units(wiring.input),
        output=units(wiring.output),
        gated=gated,
        headless=headless,
    )


def _first(sizes: dict[str, int], name: str) -> int:
    """The number of the first unit of a group."""
    names = [*sizes]
    return sum(sizes[other] for other in names[: names.index(name)])


def _loose(role: ParamWiring) -> bool:
    """Whether no gate governs some entry of a parameter."""
    out, into = (
        torch.tensor(OPEN) if units is None else units.index
        for units in (role.out_units, role.in_units)
    )
    return bool(((out == OPEN) & (into == OPEN)).any())
