"""Checks of arguments. A message says where, what came, what was expected and how to mend it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hatfn.checks.values import check_kind, check_learner, check_list
from hatfn.numerics.concrete import integer, read
from hatfn.state import HATState
from hatfn.wiring import Wiring


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


def check_sample_tasks(where: str, task: Any, x: Tensor, tasks: int) -> int | Tensor:
    """One task for all samples, as an int, or one for each, as (B,) int64 on the device of x."""
    if not isinstance(task, Tensor | list | tuple) or (isinstance(task, Tensor) and not task.dim()):
        return check_task(where, task, tasks)
    right = (
        f"Expected one task, or one for each sample: an int64 tensor of shape ({len(x)},), as in "
        f"hat.{where}(state, x, task=torch.tensor([0, 1, ...]))"
    )
    if not isinstance(task, Tensor):
        raise TypeError(f"{where}: task={task!r} is a {type(task).__name__}. {right}.")
    if task.dtype != torch.int64:
        raise TypeError(f"{where}: task is a tensor of {task.dtype}. {right}.")
    if task.shape != x.shape[:1]:
        raise ValueError(
            f"{where}: task has shape {tuple(task.shape)}, but x has {len(x)} samples. {right}."
        )
    for end in task.aminmax() if len(task) else ():
        check_task(where, end, tasks)
    return task.to(x.device)


def check_scale(where: str, scale: Any, s_max: Tensor) -> None:
    """Check that a mask scale is in (0, s_max], if its number can be read."""
    value = read(scale) if isinstance(scale, Tensor) else scale
    top = read(s_max)
    if isinstance(value, list):
        raise ValueError(
            f"{where}: scale has shape {tuple(scale.shape)}. Expected one number; only hatfn.Replicas "
            f"takes several, one for each replica."
        )
    if value is None or isinstance(top, list):
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{where}: scale={scale!r}. Expected a number, or None for binary gates.")
    if not math.isfinite(value) or value <= 0 or (top is not None and value > top * (1 + 1e-6)):
        raise ValueError(
            f"{where}: scale={value}. Expected a number in (0, s_max={top}]: at 0 every gate is 1/2, "
            f"and a negative scale inverts masks. Write hatfn.schedule.linear(s_max)(progress), or "
            f"set another s_max: build(s_max=...)."
        )


def check_active(where: str, state: HATState, rows: Sequence[int], together: bool = False) -> None:
    """Check that ``begin`` opened the tasks; with ``together`` also that it opened no others."""
    active = read(state.active)
    if active is None:
        return
    opened, asked = [i for i, on in enumerate(active) if on], list(rows)
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


def check_learned(where: str, state: HATState, tasks: Sequence[int]) -> None:
    """Check that tasks are learned, because other tasks have no binary gates."""
    learned = read(state.learned)
    missing = [] if learned is None else [task for task in tasks if not learned[task]]
    if missing:
        task = missing[0]
        why = "it is open for training" if read(state.active[task]) else "it was never learned"
        raise ValueError(
            f"{where}: task {task} has no binary gates: {why}. Write state = hat.consolidate(state, "
            f"{task}) after training it, or give a scale."
        )


def check_chosen(where: str, state: HATState, tasks: Sequence[int] | None, count: int) -> list[int]:
    """The tasks as ints, after a check that they are learned; None stands for all learned tasks."""
    if tasks is None:
        tasks = state.learned.nonzero().flatten().tolist()
    check_list(where, "tasks", tasks, "a list of tasks, such as [0, 1]")
    rows = [check_task(where, task, count) for task in tasks]
    if not rows:
        raise ValueError(
            f"{where}: no tasks. Expected at least one learned task: call hat.consolidate first."
        )
    check_learned(where, state, rows)
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


def check_class_batch(
    where: str, batch: Any, classes: Sequence[int] | None, wiring: Wiring
) -> tuple[Tensor, Tensor]:
    """A pair of inputs and targets; if tasks have classes, of at least two samples."""
    x, y = check_batch(batch, None, where)
    check_input(where, x, wiring)
    if classes is not None and (y.dim() != 1 or y.dtype != torch.int64 or len(y) < 2):
        raise TypeError(
            f"{where}: y has shape {tuple(y.shape)} and type {y.dtype}. Expected the classes of at "
            f"least two samples: shape (B,) and type torch.int64."
        )
    return x, y


def check_batches(
    batch: Any,
    task: Any,
    rows: Sequence[int],
    classes: Sequence[int] | None,
    wiring: Wiring,
    lead: int = 0,
) -> tuple[tuple[Tensor, Tensor], ...]:
    """One batch (x, y) for each task, after checks.

    Args:
        batch: the batch as the caller gave it.
        task: the task as the caller gave it; if it is a list, x and y have an axis over tasks.
        rows: the tasks as ints.
        classes: the number of classes of each task of the learner.
        wiring: the wiring of the module.
        lead: number of axes in front that count states.
    """
    x, y = check_pair("update", batch)
    if not is_several(task):
        batches = [(x, y)]
    elif min(x.dim(), y.dim()) <= lead or not (x.shape[lead] == y.shape[lead] == len(rows)):
        raise ValueError(
            f"update: x has shape {tuple(x.shape)} and y {tuple(y.shape)} for {len(rows)} tasks. "
            f"Expected a first axis over tasks, (K, B, ...): hat.update(state, (torch.stack(xs), "
            f"torch.stack(ys)), {list(rows)}, scale)."
        )
    else:
        batches = list(zip(x.unbind(lead), y.unbind(lead), strict=True))
    for row, (x, y) in zip(rows, batches, strict=True):
        check_samples("update", x, y, None if classes is None else classes[row], lead)
        check_input("update", x, wiring, lead)
    return tuple(batches)


def check_batch(batch: Any, classes: int | None, where: str = "update") -> tuple[Tensor, Tensor]:
    """The batch as a pair of inputs and targets; class labels must be from 0 to classes - 1."""
    x, y = check_pair(where, batch)
    check_samples(where, x, y, classes)
    return x, y


def check_pair(where: str, batch: Any) -> tuple[Tensor, Tensor]:
    """The batch as a pair of tensors."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise TypeError(
            f"{where}: batch is a {type(batch).__name__}. Expected a pair of tensors (x, y)."
        )
    x, y = batch
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        raise TypeError(
            f"{where}: batch = ({type(x).__name__}, {type(y).__name__}). Expected two tensors: "
            f"torch.as_tensor(x).float(), torch.as_tensor(y)."
        )
    return x, y


def check_samples(where: str, x: Tensor, y: Tensor, classes: int | None, lead: int = 0) -> None:
    """Check that there are as many targets as samples, and at least one.

    Args:
        where: the function that was called.
        x: (B, ...), behind the axes that count states.
        y: (B, ...), behind the same axes.
        classes: the number of classes of the task; None: the targets are not class labels.
        lead: number of axes in front that count states.
    """
    check_filled(where, x)
    if x.shape[: lead + 1] != y.shape[: lead + 1]:
        raise ValueError(
            f"{where}: x has {x.shape[0]} samples and y has shape {tuple(y.shape)}. Expected as many "
            f"targets as samples."
        )
    check_labels(y, classes, where, lead)


def check_inputs(
    where: str, batches: Any, wiring: Wiring, lead: int = 0, replicas: int = 0
) -> Iterator[Tensor]:
    """The inputs of batches, each a pair (x, y) or x alone; each is checked when it is read.

    Args:
        where: the function that was called.
        batches: the batches as the caller gave them.
        wiring: the wiring of the module.
        lead: number of axes in front that count states.
        replicas: the number of states that the first axis counts.
    """
    check_list(where, "batches", batches, "a list of batches [(x, y)], or of inputs [x], or a loader")
    for batch in batches:
        x = check_pair(where, batch)[0] if isinstance(batch, tuple | list) else batch
        if lead:
            check_axis(where, x, replicas)
        check_input(where, x, wiring, lead)
        check_filled(where, x)
        yield x


def check_axis(where: str, x: Any, replicas: int, shared: bool | None = False) -> None:
    """Check that the first axis of x counts replicas.

    Args:
        where: the function that was called.
        x: a batch of its own for every replica.
        replicas: the number of replicas.
        shared: None if the function cannot take one batch for all replicas.
    """
    check_kind(where, "x", x, Tensor, "a tensor")
    if x.dim() < 2 or len(x) != replicas:
        other = "" if shared is None else "; for one batch for all replicas write shared=True"
        raise ValueError(
            f"{where}: x has shape {tuple(x.shape)} for {replicas} replicas. Expected a batch for "
            f"each, (S, B, ...){other}."
        )


def check_filled(where: str, x: Tensor) -> None:
    """Check that a batch is not empty."""
    if not x.numel():
        raise ValueError(
            f"{where}: the batch is empty. Expected at least one sample: skip such a batch."
        )


def check_labels(y: Tensor, classes: int | None, where: str, lead: int = 0) -> None:
    """Check that targets, if they are class labels, are from 0 to classes - 1."""
    if classes is not None and (y.dim() == 1 + lead or not y.is_floating_point()):
        if y.dtype != torch.int64:
            raise TypeError(f"{where}: labels are {y.dtype}. Expected torch.int64: write y.long().")
        ends = read(torch.stack([y.min(), y.max()])) if y.numel() else None
        if ends is not None and not 0 <= ends[0] <= ends[1] < classes:
            raise ValueError(
                f"{where}: labels from {ends[0]} to {ends[1]}, but the task has {classes} classes. "
                f"Expected labels from 0 to {classes - 1}, counted within the task: "
                f"y - first_class_of_the_task."
            )


def check_input(where: str, x: Any, wiring: Wiring, lead: int = 0) -> None:
    """Check that x is a tensor with the dimensions of the traced input, and ``lead`` more in front."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{where}: x is a {type(x).__name__}. Expected a tensor: torch.as_tensor(x).float()."
        )
    if x.dim() != len(wiring.input_shape) + 1 + lead:
        shape = ", ".join(["S"] * lead + ["B", *map(str, wiring.input_shape)])
        raise ValueError(
            f"{where}: x has shape {tuple(x.shape)}. Expected ({shape}), as the module was traced: "
            f"write x[None] for a single sample, x.flatten(1) for flat samples."
        )
