"""Warnings of calls that are allowed but rarely intended, such as using up all units of a group."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hatfn.numerics.concrete import is_concrete, read
from hatfn.state import HATState
from hatfn.wiring import Wiring

_PACKAGE = str(Path(__file__).parents[1])


class HATWarning(UserWarning):
    """Something that is allowed but rarely intended: no free capacity, a group switched off."""


def warn(message: str) -> None:
    """Give a warning that points at the line outside of hatfn that caused it."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, HATWarning, stacklevel=level)


def check_free(where: str, rows: Sequence[int], used: Mapping[str, Tensor]) -> None:
    """Warn of groups in which the protected tasks leave no free unit, or only one."""
    left = {group: read((~units.bool()).sum(-1).amin()) for group, units in used.items()}
    for count, what, rest in (
        (0, "no free capacity", "every unit"),
        (1, "a single free unit", "all others"),
    ):
        groups = [g for g, free in left.items() if free == count < used[g].shape[-1]]
        if groups:
            warn(
                f"{where}: {what} for task {', '.join(map(str, rows))} in {_listed(groups)}: earlier "
                f"tasks use {rest}. A new task can only reuse these. Raise sparsity for earlier tasks, "
                f"or widen the module."
            )


def check_left(where: str, task: int, before: HATState, after: HATState) -> None:
    """Warn of groups in which a task leaves fewer free units than there are tasks to come.

    With stacked states, it warns if this holds in one of them.
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
            f"{_listed(taken)}. These tasks can only reuse learned units. Raise the sparsity of task "
            f"{task}, as in build(sparsity=[2.0, 0.75, ...]), or widen the module."
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def check_alive(where: str, task: int, masks: Mapping[str, Tensor]) -> None:
    """Warn of groups in which a task uses no unit."""
    dead = [group for group, mask in masks.items() if read(mask.any(-1).all()) is False]
    if dead:
        warn(
            f"{where}: task {task} uses no unit of {_listed(dead)}, so no signal passes through. Lower "
            f"sparsity, or train longer at a small scale."
        )


def check_forgotten(where: str, asked: Sequence[int], forgotten: Sequence[int]) -> None:
    """Warn of tasks that had nothing to forget, and of a call without tasks."""
    if untouched := [task for task in asked if task not in forgotten]:
        which = ", ".join(map(str, untouched))
        warn_untouched(where, f"task {which} was never trained, or was forgotten already")
    if not asked:
        warn_untouched(where, "no task was given")


def warn_untouched(where: str, why: str) -> None:
    """Warn that tasks have only their initial values."""
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


def check_shared(wiring: Wiring, where: str = "build") -> None:
    """Warn of a wiring under which tasks share less than half of the parameters, with the reason.

    A single layer has no units between layers, so there is nothing that tasks could share.
    """
    trained = {n: p for n, p in wiring.params.items() if p.kind not in ("head", "untrained")}
    sizes = {name: torch.Size(param.shape).numel() for name, param in trained.items()}
    own = {name: size for name, size in sizes.items() if wiring.params[name].kind == "task"}
    shared = 1 - sum(own.values()) / max(sum(sizes.values()), 1)
    layers = {name.rpartition(".")[0] for name in sizes}
    if shared < 0.5 and own and len(layers) > 1:
        largest = sorted(own, key=lambda name: -own[name])[:4]
        why = f"No gate reaches {_listed(largest)}"
        if wiring.fallbacks:
            why += f"; no rule explains {_listed([*dict.fromkeys(wiring.fallbacks)])}"
        warn(
            f"{where}: tasks share only {shared:.0%} of the parameters; each has a copy of the others."
            f" {why}. print(wiring.summary()) lists them all."
        )


def check_unfinished(where: str, rows: Sequence[int], state: HATState) -> None:
    """Warn of open tasks that were not consolidated: opening other tasks ends their training.

    Args:
        where: the function that opens tasks.
        rows: the tasks that it opens.
        state: the state before. Stacked states all have the same open tasks.
    """
    active = state.active.nonzero().flatten().tolist() if is_concrete(state.active) else []
    lost = [task for task in active if task not in rows]
    if lost:
        one = lost[0]
        warn(
            f"{where}: task {one} is open and was not consolidated, so nothing protects what it "
            f"learned. Write state = hat.consolidate(state, {one}) before {where}."
        )


def check_statistics(where: str, task: int, state: HATState) -> None:
    """Warn of running statistics that mix the mask scales of a whole training.

    Args:
        where: the function that closes the task.
        task: the task.
        state: the state before. Of stacked states, each one is read.
    """
    counts = (
        read(leaf.select(leaf.dim() - 1, task).amax())
        for name, leaf in state.task_buffers.items()
        if name.rpartition(".")[2] == "num_batches_tracked"
    )
    if any(count for count in counts if count is not None):
        warn(
            f"{where}: the running statistics of task {task} mix all mask scales of its training, but "
            f"the task is served with binary gates. Write hat.consolidate(state, {task}, batches), "
            f"with batches of its training data: a list of (x, y) or a loader; batches=[] keeps the "
            f"statistics as they are."
        )
