"""What the boundary refuses: each message says where, what was expected, what came, how to mend it."""

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
    """A task as an int: an int, a numpy integer or a 0-d integer tensor, from 0 to tasks - 1."""
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
    """A single state of the learner; of as many tasks, if that is known."""
    if not isinstance(state, HATState):
        raise TypeError(
            f"{where}: state is a {type(state).__name__}. Expected a HATState, as hat.init(seed=0) "
            f"gives; update, forget and prune return it with a report: state, info = hat.update(...)."
        )
    shape = tuple(state.learned.shape)
    if len(shape) != 1 or tasks not in (None, *shape):
        raise ValueError(
            f"{where}: state.learned has shape {shape}. Expected ({tasks or 'T'},), one state of this "
            f"learner: of stacked ones hatfn.replica(states, i), or hatfn.Replicas(hat) for "
            f"all; of a grown learner the state that came with it."
        )
    groups = {group: e.shape[-1] for group, e in state.embeddings.items()}
    if groups != wiring.groups:
        raise ValueError(
            f"{where}: the state is of another learner: it has the groups {groups}. Expected "
            f"{dict(wiring.groups)}: a state of hat.init(seed)."
        )


def check_owned(where: str, hat: Any, state: Any) -> None:
    """A learner, and a state of it."""
    check_learner(where, hat)
    check_state(where, state, hat.wiring, hat.tasks)


def is_several(task: Any) -> bool:
    """Whether tasks are given as a list, so that batches and reports have an axis over them."""
    return isinstance(task, list | tuple | range)


def check_tasks(where: str, task: Any, tasks: int) -> list[int]:
    """One task as a list of one; several in ascending order, each once."""
    if not is_several(task):
        return [check_task(where, task, tasks)]
    rows = [check_task(where, one, tasks) for one in task]
    if not rows or rows != sorted(set(rows)):
        right = f"task={sorted(set(rows))}" if rows else "task=0"
        raise ValueError(
            f"{where}: task={task!r}. Expected tasks in ascending order, each once, as the optimiser's "
            f"moments are kept in that order. Write {right}."
        )
    return rows


def check_each_task(where: str, task: Any, tasks: int) -> list[int]:
    """One task or several, in any order, as an ascending list."""
    if not is_several(task):
        return [check_task(where, task, tasks)]
    return sorted({check_task(where, one, tasks) for one in task})


def check_sample_tasks(where: str, task: Any, x: Tensor, tasks: int) -> int | Tensor:
    """One task for all samples as an int, or one for each as (B,) int64 on the device of x."""
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
            f"{where}: task has shape {tuple(task.shape)} and x {len(x)} samples. {right}."
        )
    for end in task.aminmax() if len(task) else ():
        check_task(where, end, tasks)
    return task.to(x.device)


def check_scale(where: str, scale: Any, s_max: Tensor) -> None:
    """A mask scale in (0, s_max], if its number can be read."""
    value = read(scale) if isinstance(scale, Tensor) else scale
    top = read(s_max)
    if isinstance(value, list):
        raise ValueError(
            f"{where}: scale has shape {tuple(scale.shape)}. Expected one number; hatfn.Replicas takes "
            f"one for each replica."
        )
    if value is None or isinstance(top, list):
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{where}: scale={scale!r}. Expected a number, or None for binary gates.")
    if not math.isfinite(value) or value <= 0 or (top is not None and value > top * (1 + 1e-6)):
        raise ValueError(
            f"{where}: scale={value}. Expected a number in (0, s_max={top}]; at 0 every gate is 1/2, "
            f"below it masks invert. Write hatfn.schedule.linear(s_max)(progress), or build(s_max=...)."
        )


def check_active(where: str, state: HATState, rows: Sequence[int], together: bool = False) -> None:
    """``begin`` must have opened the tasks; ``together``: these and no others."""
    active = read(state.active)
    if active is None:
        return
    opened, asked = [i for i, on in enumerate(active) if on], list(rows)
    one = asked[0] if len(asked) == 1 else asked
    if not set(asked) <= set(opened):
        raise ValueError(
            f"{where}: task {one} is not open (open: {opened or 'none'}), and its parameters must "
            f"not move. Write state = hat.begin(state, {one}) first."
        )
    if together and asked != opened:
        raise ValueError(
            f"{where}: task={one}, but {opened} were opened together, and so are the optimiser's "
            f"moments. Write task={opened}, or state = hat.begin(state, {one}) first."
        )


def check_learned(where: str, state: HATState, tasks: Sequence[int]) -> None:
    """Binary gates are those of learned tasks."""
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
    """Learned tasks by number; all of them, in order, if the choice is left open."""
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
    """Tasks to lock; None if the choice is left open."""
    if locked is None:
        return None
    check_list(where, "locked", locked, "a list of tasks, such as [0, 1]")
    rows = [check_task(where, other, tasks) for other in locked]
    both = sorted(set(rows) & set(opened))
    if both:
        raise ValueError(
            f"{where}: task {both[0]} cannot be changed and locked at once. Write "
            f"locked={[row for row in rows if row not in opened]}."
        )
    return rows


def check_init_from(
    where: str, state: HATState, opened: Sequence[int], source: Any, batch: Any, tasks: int
) -> None:
    """A learned task that is not the opened one, or "similar" with a batch to choose by."""
    if len(opened) > 1:
        raise ValueError(
            f"{where}: init_from={source!r} for tasks {list(opened)}. Expected it for a single task: "
            f"open each with it, then all with hat.begin(state, {list(opened)})."
        )
    if source == "similar":
        if batch is None:
            raise ValueError(
                f'{where}: init_from="similar" without data to choose by. Write hat.{where}(state, '
                f'{opened[0]}, init_from="similar", batch=(x, y)).'
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
    """A pair of inputs and targets; where there are classes, those of two samples or more."""
    x, y = check_batch(batch, None, where)
    check_input(where, x, wiring)
    if classes is not None and (y.dim() != 1 or y.dtype != torch.int64 or len(y) < 2):
        raise TypeError(
            f"{where}: y is {tuple(y.shape)} of {y.dtype}. Expected the classes of at least two "
            f"samples, (B,) of torch.int64."
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
    """A batch for each task: the pair itself, or slices of a pair with an axis over tasks.

    Args:
        batch: anything.
        task: as the caller gave it; a list: x and y have an axis over tasks.
        rows: the tasks.
        classes: of each task of the learner.
        wiring: of the module.
        lead: number of axes in front that count states.
    """
    x, y = check_pair("update", batch)
    if not is_several(task):
        batches = [(x, y)]
    elif min(x.dim(), y.dim()) <= lead or not (x.shape[lead] == y.shape[lead] == len(rows)):
        raise ValueError(
            f"update: x has shape {tuple(x.shape)} and y {tuple(y.shape)} for {len(rows)} tasks. "
            f"Expected an axis over tasks in front, (K, B, ...): hat.update(state, (torch.stack(xs), "
            f"torch.stack(ys)), {list(rows)}, scale)."
        )
    else:
        batches = list(zip(x.unbind(lead), y.unbind(lead), strict=True))
    for row, (x, y) in zip(rows, batches, strict=True):
        check_samples("update", x, y, None if classes is None else classes[row], lead)
        check_input("update", x, wiring, lead)
    return tuple(batches)


def check_batch(batch: Any, classes: int | None, where: str = "update") -> tuple[Tensor, Tensor]:
    """A pair of inputs and targets; class labels from 0 to classes - 1."""
    x, y = check_pair(where, batch)
    check_samples(where, x, y, classes)
    return x, y


def check_pair(where: str, batch: Any) -> tuple[Tensor, Tensor]:
    """A pair of tensors."""
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
    """As many targets as samples, and at least one.

    Args:
        where: the function that was called.
        x: (B, ...), behind the leading axes.
        y: (B, ...), likewise.
        classes: of the task; None: any targets.
        lead: number of axes in front that count states.
    """
    check_filled(where, x)
    if x.shape[: lead + 1] != y.shape[: lead + 1]:
        raise ValueError(
            f"{where}: x has {x.shape[0]} samples and y {tuple(y.shape)}. Expected as many targets."
        )
    check_labels(y, classes, where, lead)


def check_inputs(
    where: str, batches: Any, wiring: Wiring, lead: int = 0, replicas: int = 0
) -> Iterator[Tensor]:
    """The inputs of batches, each a pair (x, y) or x alone, checked as they are read.

    Args:
        where: the function that was called.
        batches: anything.
        wiring: of the module.
        lead: number of axes in front that count states.
        replicas: how many states the axis in front counts.
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
    """A batch of its own for every replica; ``shared``: None where there is no other way."""
    check_kind(where, "x", x, Tensor, "a tensor")
    if x.dim() < 2 or len(x) != replicas:
        other = "" if shared is None else "; for the same one give shared=True"
        raise ValueError(
            f"{where}: x has shape {tuple(x.shape)} for {replicas} replicas. Expected a batch for "
            f"each, (S, B, ...){other}."
        )


def check_filled(where: str, x: Tensor) -> None:
    """At least one number."""
    if not x.numel():
        raise ValueError(
            f"{where}: the batch is empty. Expected at least one sample: skip such a batch."
        )


def check_labels(y: Tensor, classes: int | None, where: str, lead: int = 0) -> None:
    """Class labels, if that is what the targets are, from 0 to classes - 1."""
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
    """A tensor with as many dimensions as the input that was traced, and ``lead`` more."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{where}: x is a {type(x).__name__}. Expected a tensor: torch.as_tensor(x).float()."
        )
    if x.dim() != len(wiring.input_shape) + 1 + lead:
        shape = ", ".join(["S"] * lead + ["B", *map(str, wiring.input_shape)])
        raise ValueError(
            f"{where}: x has shape {tuple(x.shape)}. Expected ({shape}), as it was traced: "
            f"x[None] for a single sample, x.flatten(1) for flat ones."
        )
