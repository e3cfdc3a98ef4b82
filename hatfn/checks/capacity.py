"""Warnings: what is allowed and rarely meant, such as a group without a free unit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor

from hatfn.numerics.concrete import read
from hatfn.state import HATState
from hatfn.wiring import Wiring


class HATWarning(UserWarning):
    """Something that is allowed and rarely meant: no free capacity, a group switched off."""


def check_free(where: str, rows: Sequence[int], used: Mapping[str, Tensor]) -> None:
    """Warn of groups that the locked tasks use up, and of those of which they leave one unit."""
    left = {group: read((~units.bool()).sum(-1).amin()) for group, units in used.items()}
    for count, what, rest in (
        (0, "no free capacity", "every unit"),
        (1, "a single free unit", "all others"),
    ):
        groups = [g for g, free in left.items() if free == count < used[g].shape[-1]]
        if groups:
            warnings.warn(
                f"{where}: {what} for task {', '.join(map(str, rows))} in {_listed(groups)}: earlier "
                f"tasks use {rest}. It can only reuse theirs. Raise sparsity for earlier tasks, or "
                f"widen the module.",
                HATWarning,
                stacklevel=4,
            )


def check_left(where: str, task: int, before: HATState, after: HATState) -> None:
    """Warn of groups in which a task leaves fewer free units than there are tasks to come.

    Of states that are stacked, if it does so in any of them.
    """
    to_come = read((~after.learned).sum(-1).amax())
    taken = []
    for group, masks in after.masks.items() if to_come else ():
        free = [read((~on.any(-2)).sum(-1).amin()) for on in (before.masks[group], masks)]
        if None not in free and free[1] < to_come <= free[0]:
            taken.append(f"{group} ({free[1]} of {masks.shape[-1]} free)")
    if taken:
        warnings.warn(
            f"{where}: task {task} leaves fewer units than there are tasks to come ({to_come}) in "
            f"{_listed(taken)}. They can only reuse what is learned. Raise its sparsity, as in "
            f"build(sparsity=[2.0, 0.75, ...]), or widen the module.",
            HATWarning,
            stacklevel=4,
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def check_alive(where: str, task: int, masks: Mapping[str, Tensor]) -> None:
    """Warn of groups in which a task uses no unit."""
    dead = [group for group, mask in masks.items() if read(mask.any(-1).all()) is False]
    if dead:
        warnings.warn(
            f"{where}: task {task} uses no unit of {_listed(dead)}, so nothing passes there. Lower "
            f"sparsity, or train longer at a small scale.",
            HATWarning,
            stacklevel=4,
        )


def warn_untouched(where: str, why: str) -> None:
    """Warn that tasks hold nothing but initial values."""
    warnings.warn(f"{where}: nothing to forget: {why}.", HATWarning, stacklevel=4)


def check_groups(wiring: Wiring, tasks: int, where: str = "build") -> None:
    """Warn of groups that have fewer units than there are tasks."""
    small = {group: units for group, units in wiring.groups.items() if units < tasks}
    if small:
        listed = ", ".join(f"{group} ({units})" for group, units in small.items())
        warnings.warn(
            f"{where}: {tasks} tasks, but fewer units in {listed}: later tasks must share them. Widen "
            f"the module, or plan fewer tasks.",
            HATWarning,
            stacklevel=4,
        )
