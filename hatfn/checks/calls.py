"""Checks of arguments. A message says where, what came, what was expected and how to mend it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from hatfn.checks.values import check_kind, check_learner, check_list
from hatfn.numerics.arguments import Inputs
from hatfn.numerics.concrete import integer, is_at_hand, is_concrete, read, reads_freely
from hatfn.numerics.ownership import is_exported
from hatfn.state import HATState, is_spent
from hatfn.wiring import Wiring

ABOVE = 1 + 1e-6
"""A scale may be larger than s_max by this factor, which a rounding error stays below."""


def check_task(where: str, task: Any, tasks: int) -> int:
    """The task as an int, after a check that it is an integer from 0 to tasks - 1.

    An int, a numpy integer and a 0-d integer tensor are integers; a bool is not.
    """
    right = f"Expected an int from 0 to {tasks - 1} ({tasks} tasks)"
    index = integer(task)
    if index is None:
        raise TypeError(f"{where}: task={task!r} is a {type(task).__name__}. {right}, such as task=0.")
    if not 0 <= index < tasks:
        raise ValueError(
            f"{where}: task={index} is out of range. {right}; negative numbers do not count from the "
            f"end. For more tasks: hat, state = hatfn.grow(hat, state, classes=[2])."
        )
    return index


def check_state(where: str, state: Any, wiring: Wiring, tasks: int | None = None) -> None:
    """Check that ``state`` is a single state of the learner, of ``tasks`` tasks if that is given."""
    if not isinstance(state, HATState):
        raise TypeError(
            f"{where}: state is a {type(state).__name__}. Expected a HATState, as hat.init(seed=0) "
            f"gives; update, forget and prune return it with a report: state, info = hat.update(...)."
        )
    check_unspent(where, state)
    shape = tuple(state.learned.shape)
    if len(shape) != 1 or tasks not in (None, *shape):
        raise ValueError(
            f"{where}: state.learned has shape {shape}. Expected ({tasks or 'T'},), one state of this "
            f"learner. For stacked states write hatfn.replica(states, i), or hatfn.Replicas(hat) for "
            f"all of them; for a grown learner take the state that hatfn.grow returned."
        )
    groups = {group: e.shape[-1] for group, e in state.embeddings.items()}
    if groups != wiring.groups:
        raise ValueError(
            f"{where}: the state is of another learner: it has the groups {groups}. Expected a state "
            f"of this learner, such as hat.init(seed=0), with the groups {dict(wiring.groups)}."
        )


def check_unspent(where: str, state: HATState) -> None:
    """Check that a state was not donated."""
    if is_spent(state):
        raise ValueError(
            f"{where}: the state is spent: an update with donate=True took its memory, or that of a "
            f"copy that shares its tensors. Use the state that this update returned: state, info = "
            f"hat.update(state, ..., donate=True); or leave donate out to keep the old state."
        )


def check_donatable(where: str, donate: Any, state: HATState, nested: bool) -> None:
    """Check that a state can give its memory away, if ``donate`` says that it does."""
    check_kind(where, "donate", donate, bool, "True or False")
    if not donate:
        return
    if nested:
        raise ValueError(
            f"{where}: donate=True inside a transform, or on a state that requires gradients: its "
            f"memory is still needed. Expected donate=False."
        )
    leaves: list[Tensor]
    paths, leaves, _ = optree.tree_flatten_with_path(state)  # type: ignore[arg-type]
    for path, leaf in zip(paths, leaves, strict=True):
        if is_exported(leaf):
            name = "/".join(map(str, (HATState._fields[path[0]], *path[1:])))
            raise ValueError(
                f"{where}: donate=True, but state.{name} is also held by a view of it, such as "
                f"leaf[0], by an array made by DLPack or by a graph of autograd. Expected "
                f"donate=False, or a copy in their place: leaf.clone()."
            )


def check_owned(where: str, hat: Any, state: Any) -> None:
    """Check that ``hat`` is a learner, and ``state`` a single state of it."""
    check_learner(where, hat)
    check_state(where, state, hat.wiring, hat.tasks)


def is_several(task: Any) -> bool:
    """Whether tasks are given as a list, so that batches and reports have an axis over them."""
    return isinstance(task, list | tuple | range)


def check_tasks(where: str, task: Any, tasks: int) -> list[int]:
    """The tasks as a list of ints: one task, or several in ascending order, each once."""
    if not is_several(task):
        return [check_task(where, task, tasks)]
    rows = [check_task(where, one, tasks) for one in task]
    if not rows or rows != sorted(set(rows)):
        right = f"task={sorted(set(rows))}" if rows else "task=0"
        raise ValueError(
            f"{where}: task={task!r}. Expected tasks in ascending order, each once, because the "
            f"optimizer state has them in that order. Write {right}."
        )
    return rows


def check_each_task(where: str, task: Any, tasks: int) -> list[int]:
    """The tasks as a list of ints in ascending order: one task, or several in any order."""
    if not is_several(task):
        return [check_task(where, task, tasks)]
    return sorted({check_task(where, one, tasks) for one in task})


def check_sample_tasks(where: str, task: Any, x: Inputs, tasks: int) -> int | Tensor:
    """One task for all samples, as an int, or one for each, as (B,) int64 on the CPU.

    The tasks decide which outputs are computed, so they are read, once.
    """
    if not isinstance(task, Tensor | list | tuple) or (isinstance(task, Tensor) and not task.dim()):
        return check_task(where, task, tasks)
    right = (
        f"Expected one task, or one for each sample: an int64 tensor of shape ({x.samples},), as in "
        f"hat.{where}(state, x, task=torch.tensor([0, 1, ...]))"
    )
    if not isinstance(task, Tensor):
        raise TypeError(f"{where}: task={task!r} is a {type(task).__name__}. {right}.")
    if task.dtype != torch.int64:
        raise TypeError(f"{where}: task is a tensor of {task.dtype}. {right}.")
    if tuple(task.shape) != (x.samples,):
        raise ValueError(
            f"{where}: task has shape {tuple(task.shape)}, but x has {x.samples} samples. {right}."
        )
    known: Tensor = task.cpu()
    for end in known.aminmax() if len(known) else ():
        check_task(where, end, tasks)
    return known


def check_scale(where: str, scale: Any, s_max: Tensor) -> None:
    """Check that a mask scale is in (0, s_max], if its number can be read."""
    _check_scale(where, scale, read(scale) if isinstance(scale, Tensor) else scale, read(s_max))


def bounded_scale(where: str, scale: Any, s_max: Tensor) -> float | Tensor:
    """The mask scale, after a check that it is in (0, s_max].

    If s_max is on a GPU, it is not read. The scale is then a tensor, which is nan if it is too large:
    it makes outputs nan, and a step with it is refused.

    Args:
        where: the function that was called.
        scale: the scale as the caller gave it.
        s_max: (); for stacked states (S,) with a scale for each.
    """
    if reads_freely(s_max.device):
        check_scale(where, scale, s_max)
        return scale  # type: ignore[no-any-return]
    number: Any = scale
    if isinstance(scale, Tensor):
        number = read(scale) if is_at_hand(scale) and not scale.dim() else None
        scale = scale.to(s_max.device, non_blocking=True)
    _check_scale(where, scale, number, None)
    if not isinstance(scale, Tensor):
        scale = s_max.new_full((), scale)
    return torch.where((scale > 0) & (scale <= s_max * ABOVE), scale, torch.nan)


def _check_scale(where: str, scale: Any, value: Any, top: Any) -> None:
    """Check a mask scale by its number and that of s_max; None: the number is not known."""
    if isinstance(scale, Tensor) and scale.dim():
        raise ValueError(
            f"{where}: scale has shape {tuple(scale.shape)}. Expected one number; only hatfn.Replicas "
            f"takes several, one for each replica."
        )
    if value is None or isinstance(top, list):
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{where}: scale={scale!r}. Expected a number, or None for binary gates.")
    if not math.isfinite(value) or value <= 0 or (top is not None and value > top * ABOVE):
        most = "s_max" if top is None else f"s_max={top}"
        raise ValueError(
            f"{where}: scale={value}. Expected a number in (0, {most}]: at 0 every gate is 1/2, "
            f"and a negative scale inverts masks. Write hatfn.schedule.linear(s_max)(progress), or "
            f"set another s_max: build(s_max=...)."
        )


def check_active(
    where: str,
    state: HATState,
    rows: Sequence[int],
    together: bool = False,
    waits: bool = True,
) -> None:
    """Check that ``begin`` opened the tasks.

    Args:
        where: the function that was called.
        state: the state.
        rows: the tasks.
        together: also check that ``begin`` opened no others.
        waits: also read a state on a GPU, which must do all its work first.
    """
    if not (is_concrete(state.active) if waits else is_at_hand(state.active)):
        return
    opened, asked = state.active.nonzero().flatten().tolist(), list(rows)
    one = asked[0] if len(asked) == 1 else asked
    if not set(asked) <= set(opened):
        raise ValueError(
            f"{where}: task {one} is not open (open: {opened or 'none'}), so its parameters must not "
            f"change. Write state = hat.begin(state, {one}) first."
        )
    if together and asked != opened:
        raise ValueError(
            f"{where}: task={one}, but {opened} were opened together, and share one optimizer state. "
            f"Write task={opened}, or state = hat.begin(state, {one}) first."
        )


def check_learned(where: str, state: HATState, tasks: Sequence[int], waits: bool = True) -> None:
    """Check that tasks are learned, because other tasks have no binary gates.

    Args:
        where: the function that was called.
        state: the state.
        tasks: the tasks.
        waits: also read a state on a GPU, which must do all its work first.
    """
    known = is_concrete(state.learned) if waits else is_at_hand(state.learned)
    learned = state.learned[[*tasks]].tolist() if known else [True] * len(tasks)
    missing = [task for task, is_learned in zip(tasks, learned, strict=True) if not is_learned]
    if missing:
        task = missing[0]
        why = "it is open for training" if read(state.active[task]) else "it was never learned"
        raise ValueError(
            f"{where}: task {task} has no binary gates: {why}. Write state = hat.consolidate(state, "
            f"{task}) after training it, or give a scale."
        )


def check_chosen(
    where: str, state: HATState, tasks: Sequence[int] | None, count: int, waits: bool = True
) -> list[int]:
    """The tasks as ints, after a check that they are learned.

    Args:
        where: the function that was called.
        state: the state.
        tasks: the tasks as the caller gave them; None: all learned tasks, which are always read.
        count: the number of tasks of the learner.
        waits: see :func:`check_learned`.
    """
    if tasks is None:
        tasks = state.learned.nonzero().flatten().tolist()
    check_list(where, "tasks", tasks, "a list of tasks, such as [0, 1]")
    rows = [check_task(where, task, count) for task in tasks]
    if not rows:
        raise ValueError(
            f"{where}: no tasks. Expected at least one learned task: call hat.consolidate first."
        )
    check_learned(where, state, rows, waits)
    return rows


def check_locked(
    where: str, locked: Sequence[int] | None, opened: Sequence[int], tasks: int
) -> list[int] | None:
    """The tasks to protect, as ints, after a check that they are not opened; None stays None."""
    if locked is None:
        return None
    check_list(where, "locked", locked, "a list of tasks, such as [0, 1]")
    rows = [check_task(where, other, tasks) for other in locked]
    both = sorted(set(rows) & set(opened))
    if both:
        raise ValueError(
            f"{where}: task {both[0]} cannot be changed and protected at the same time. Write "
            f"locked={[row for row in rows if row not in opened]}."
        )
    return rows


def check_init_from(
    where: str, state: HATState, opened: Sequence[int], source: Any, batch: Any, tasks: int
) -> None:
    """Check that ``source`` is a learned task, not the opened one, or "similar" with a batch."""
    if len(opened) > 1:
        raise ValueError(
            f"{where}: init_from={source!r} for tasks {list(opened)}. Expected a single task: open "
            f"each task with init_from, then all of them with hat.begin(state, {list(opened)})."
        )
    if source == "similar":
        if batch is None:
            raise ValueError(
                f'{where}: init_from="similar" without data to compare tasks with. Write '
                f'hat.{where}(state, {opened[0]}, init_from="similar", batch=(x, y)).'
            )
        return
    if isinstance(source, str):
        raise ValueError(f'{where}: init_from={source!r}. Expected "similar", or a learned task.')
    if check_task(where, source, tasks) == opened[0]:
        raise ValueError(f"{where}: task {source} cannot start from itself: leave init_from out.")
    check_learned(where, state, [source])
