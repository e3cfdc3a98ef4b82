"""Warnings: what is allowed and rarely meant, such as a group without a free unit."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from hatfn.numerics.concrete import read
from hatfn.state import HATState
from hatfn.wiring import Wiring

_PACKAGE = str(Path(__file__).parents[1])


class HATWarning(UserWarning):
    """Something that is allowed and rarely meant: no free capacity, a group switched off."""


def warn(message: str) -> None:
    """Warn of something at the line outside of hatfn that led to it."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, HATWarning, stacklevel=level)


def check_free(where: str, rows: Sequence[int], used: Mapping[str, Tensor]) -> None:
    """Warn of groups that the locked tasks use up, and of those of which they leave one unit."""
    left = {group: read((~units.bool()).sum(-1).amin()) for group, units in used.items()}
    for count, what, rest in (
        (0, "no free capacity", "every unit"),
        (1, "a single free unit", "all others"),
    ):
        groups = [g for g, free in left.items() if free == count < used[g].shape[-1]]
        if groups:
            warn(
                f"{where}: {what} for task {', '.join(map(str, rows))} in {_listed(groups)}: earlier "
                f"tasks use {rest}. It can only reuse theirs. Raise sparsity for earlier tasks, or "
                f"widen the module."
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
        warn(
            f"{where}: task {task} leaves fewer units than there are tasks to come ({to_come}) in "
            f"{_listed(taken)}. They can only reuse what is learned. Raise its sparsity, as in "
            f"build(sparsity=[2.0, 0.75, ...]), or widen the module."
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def check_alive(where: str, task: int, masks: Mapping[str, Tensor]) -> None:
    """Warn of groups in which a task uses no unit."""
    dead = [group for group, mask in masks.items() if read(mask.any(-1).all()) is False]
    if dead:
        warn(
            f"{where}: task {task} uses no unit of {_listed(dead)}, so nothing passes there. Lower "
            f"sparsity, or train longer at a small scale."
        )


def warn_untouched(where: str, why: str) -> None:
    """Warn that tasks hold nothing but initial values."""
    warn(f"{where}: nothing to forget: {why}.")


def check_groups(wiring: Wiring, tasks: int, where: str = "build") -> None:
    """Warn of groups that have fewer units than there are tasks."""
    small = {group: units for group, units in wiring.groups.items() if units < tasks}
    if small:
        listed = ", ".join(f"{group} ({units})" for group, units in small.items())
        warn(
            f"{where}: {tasks} tasks, but fewer units in {listed}: later tasks must share them. Widen "
            f"the module, or plan fewer tasks."
        )


def check_unfinished(where: str, rows: Sequence[int], state: HATState) -> None:
    """Warn of tasks that are open and that nobody closed: opening others ends their training.

    Args:
        where: the function that opens tasks.
        rows: the tasks that it opens.
        state: before; stacked ones agree on what is open.
    """
    active = read(state.active)
    lost = [task for task, on in enumerate(active or ()) if on and task not in rows]
    if lost:
        one = lost[0]
        warn(
            f"{where}: task {one} is open and was not consolidated, so that nothing protects what it "
            f"learned. Write state = hat.consolidate(state, {one}) before {where}."
        )


def check_statistics(where: str, task: int, state: HATState) -> None:
    """Warn of running statistics that mix the mask scales of a whole training.

    Args:
        where: the function that closes the task.
        task: which.
        state: before; stacked ones are all looked at.
    """
    counts = (
        read(leaf.select(leaf.dim() - 1, task).amax())
        for name, leaf in state.task_buffers.items()
        if name.rpartition(".")[2] == "num_batches_tracked"
    )
    if any(count for count in counts if count is not None):
        warn(
            f"{where}: the running statistics of task {task} were taken under all mask scales of its "
            f"training, and it is served under binary gates. Write hat.consolidate(state, {task}, "
            f"batches), with batches of its training data: a list of (x, y) or a loader; batches=[] "
            f"keeps the statistics as they are."
        )
