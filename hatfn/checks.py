"""What the boundary refuses: each message says where, what was expected, what came, how to mend it."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import optree
import torch
from torch import Tensor, nn

from hatfn.state import HATState
from hatfn.wiring import Wiring, digest


class HATWarning(UserWarning):
    """Something that is allowed and rarely meant: no free capacity, a group switched off."""


def read(tensor: Tensor) -> Any:
    """The numbers of a small tensor, or None inside ``vmap``, where numbers cannot be read."""
    try:
        return tensor.tolist()
    except RuntimeError:
        return None


def check_task(where: str, task: Any, tasks: int) -> int:
    """A task as an int: an int, a numpy integer or a 0-d integer tensor, from 0 to tasks - 1."""
    right = f"Expected an int from 0 to {tasks - 1} ({tasks} tasks)"
    try:
        index = operator.index(task)
    except (TypeError, RuntimeError):
        index = None
    if index is None or isinstance(task, bool):
        raise TypeError(f"{where}: task={task!r} is a {type(task).__name__}. {right}, such as task=0.")
    if not 0 <= index < tasks:
        raise ValueError(
            f"{where}: task={index} is out of range. {right}; negative numbers do not count from the "
            f"end. For more tasks, give build() one entry in classes per task."
        )
    return index


def check_tasks(where: str, task: Any, tasks: int) -> list[int]:
    """One task as a list of one; several in ascending order, each once."""
    if not isinstance(task, list | tuple | range):
        return [check_task(where, task, tasks)]
    rows = [check_task(where, one, tasks) for one in task]
    if not rows or rows != sorted(set(rows)):
        right = f"task={sorted(set(rows))}" if rows else "task=0"
        raise ValueError(
            f"{where}: task={task!r}. Expected tasks in ascending order, each once, as the optimiser's "
            f"moments are kept in that order. Write {right}."
        )
    return rows


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
    if value is None or isinstance(value, list) or isinstance(top, list):
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
        raise ValueError(
            f"{where}: task {missing[0]} has no binary gates: it was never learned. Write state = "
            f"hat.consolidate(state, {missing[0]}) after training it, or give a scale."
        )


def check_chosen(where: str, state: HATState, tasks: Sequence[int] | None, count: int) -> list[int]:
    """Learned tasks by number; all of them, in order, if the choice is left open."""
    if tasks is None:
        tasks = state.learned.nonzero().flatten().tolist()
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
    if isinstance(locked, int | str) or not hasattr(locked, "__iter__"):
        raise TypeError(f"{where}: locked={locked!r}. Expected a list of tasks, such as [0, 1].")
    rows = [check_task(where, other, tasks) for other in locked]
    both = sorted(set(rows) & set(opened))
    if both:
        raise ValueError(
            f"{where}: task {both[0]} cannot be trained and locked at once. Write "
            f"locked={[row for row in rows if row not in opened]}."
        )
    return rows


def check_carried(where: str, carried: Any, fresh: Any, count: int) -> Any:
    """Moments of as many tasks as are open now."""
    shapes = [[leaf.shape for leaf in optree.tree_leaves(tree)] for tree in (carried, fresh)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{where}: carry=True, but the optimiser's moments are not those of {count} tasks trained "
            f"together, or were not saved. Write carry=False to start with new ones."
        )
    return carried


def check_wiring(module: Any, wiring: Any) -> None:
    """The wiring is of this module."""
    if not isinstance(wiring, Wiring):
        raise TypeError(
            f"build: wiring is a {type(wiring).__name__}. Expected what hatfn.trace(module, x) gives: "
            f"hatfn.build(module, hatfn.trace(module, x), classes, optimizer)."
        )
    have = {name: tuple(param.shape) for name, param in module.named_parameters()}
    want = {name: param.shape for name, param in wiring.params.items()}
    differ = sorted(set(have.items()) ^ set(want.items()))
    if differ:
        raise ValueError(
            f"build: the wiring is of another module; they differ in {differ[0][0]} "
            f"(module {have.get(differ[0][0])}, wiring {want.get(differ[0][0])}). Trace this one."
        )
    _check_tensors(module, wiring)


def _check_tensors(module: nn.Module, wiring: Wiring) -> None:
    """Parameters that can be trained, and constants as they were when traced."""
    odd = [name for name, param in module.named_parameters() if not param.is_floating_point()]
    if odd:
        raise TypeError(
            f"build: parameter {odd[0]} is {module.get_parameter(odd[0]).dtype}. Expected floating "
            f"parameters: register it as a buffer."
        )
    buffers = dict(module.named_buffers())
    changed = [name for name, known in wiring.constants if digest(buffers[name]) != known]
    if changed:
        raise ValueError(
            f"build: buffer {changed[0]} has other values than when the wiring was traced, which "
            f"relied on them. Trace the module as it is now: hatfn.trace(module, x)."
        )


def check_classes(classes: Any, num_tasks: int | None, wiring: Wiring) -> int:
    """The number of tasks, from one class count per task or from num_tasks."""
    if classes is None:
        count = 1 if num_tasks is None else operator.index(num_tasks)
        if count < 1:
            raise ValueError(f"build: num_tasks={num_tasks}. Expected at least 1.")
        return count
    if isinstance(classes, int | str):
        raise TypeError(f"build: classes={classes!r}. Expected one count per task, such as [2, 2, 2].")
    counts = [operator.index(count) for count in classes]
    if not counts or min(counts) < 1 or num_tasks not in (None, len(counts)):
        raise ValueError(
            f"build: classes={classes!r}, num_tasks={num_tasks}. Expected one positive count per task, "
            f"such as [2, 2, 2], and no num_tasks."
        )
    if not wiring.heads and "head.weight" in wiring.params:
        raise ValueError(
            "build: classes are given and the module has a layer 'head', but no head was traced. Write "
            "hatfn.trace(module, x, head='head') to give every task its own."
        )
    if not wiring.heads and len(wiring.output_shape) != 1:
        raise ValueError(
            f"build: the module returns (B, {', '.join(map(str, wiring.output_shape))}), and no head "
            f"was traced. Expected features (B, D) to put one behind: pool or flatten them, or name "
            f"the classifier: hatfn.trace(module, x, head='fc')."
        )
    return len(counts)


def check_hyper(s_max: float, sparsity: float, clamp: float, max_norm: float | None) -> None:
    """Settings in their ranges."""
    wrong = {
        "s_max": (s_max, s_max > 1, "above 1"),
        "sparsity": (sparsity, sparsity >= 0, "of at least 0"),
        "clamp": (clamp, clamp > 0, "above 0"),
        "max_norm": (max_norm, max_norm is None or max_norm > 0, "above 0, or None"),
    }
    for name, (value, right, expected) in wrong.items():
        if not right or (value is not None and not math.isfinite(value)):
            raise ValueError(f"build: {name}={value}. Expected a finite number {expected}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """One of a few words."""
    if value not in choices:
        raise ValueError(f"build: {name}={value!r}. Expected one of {', '.join(map(repr, choices))}.")


def check_batches(
    batch: Any, rows: Sequence[int], several: bool, classes: Sequence[int] | None
) -> list[tuple[Tensor, Tensor]]:
    """A batch for each task: the pair itself, or slices of a pair with a leading axis over tasks."""
    counts = [None if classes is None else classes[task] for task in rows]
    if not several:
        return [check_batch(batch, counts[0])]
    x, y = check_batch(batch, None)
    if len(x) != len(rows):
        raise ValueError(
            f"update: x has shape {tuple(x.shape)} for {len(rows)} tasks. Expected an axis over tasks "
            f"in front, (K, B, ...): hat.update(state, (torch.stack(xs), torch.stack(ys)), "
            f"{list(rows)}, scale)."
        )
    return [check_batch((x[k], y[k]), count) for k, count in enumerate(counts)]


def check_batch(batch: Any, classes: int | None, where: str = "update") -> tuple[Tensor, Tensor]:
    """A pair of inputs and targets; class labels from 0 to classes - 1."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise TypeError(
            f"{where}: batch is a {type(batch).__name__}. Expected a pair of tensors (x, y)."
        )
    x, y = batch
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        raise TypeError(
            f"{where}: batch = ({type(x).__name__}, {type(y).__name__}). Expected two tensors: "
            f"torch.as_tensor(...) each."
        )
    if not x.numel():
        raise ValueError(
            f"{where}: the batch is empty. Expected at least one sample: skip such a batch."
        )
    if x.shape[:1] != y.shape[:1]:
        raise ValueError(
            f"{where}: x has {x.shape[0]} samples and y {tuple(y.shape)}. Expected as many targets."
        )
    if classes is not None and (y.dim() == 1 or not y.is_floating_point()):
        if y.dtype != torch.int64:
            raise TypeError(f"{where}: labels are {y.dtype}. Expected torch.int64: write y.long().")
        ends = read(torch.stack([y.min(), y.max()])) if y.numel() else None
        if ends is not None and not 0 <= ends[0] <= ends[1] < classes:
            raise ValueError(
                f"{where}: labels from {ends[0]} to {ends[1]}, but the task has {classes} classes. "
                f"Expected labels from 0 to {classes - 1}, counted within the task: "
                f"y - first_class_of_the_task."
            )
    return x, y


def check_input(where: str, x: Any, wiring: Wiring) -> None:
    """A tensor with as many dimensions as the input that was traced."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: x is a {type(x).__name__}. Expected a tensor.")
    if x.dim() != len(wiring.input_shape) + 1:
        raise ValueError(
            f"{where}: x has shape {tuple(x.shape)}. Expected {_shape(wiring)}, as it was traced: "
            f"x[None] for a single sample, x.flatten(1) for flat ones."
        )


@contextmanager
def explained(x: Tensor, wiring: Wiring) -> Iterator[None]:
    """Say what the module was given when it fails."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"the module failed on x of shape {tuple(x.shape)} and {x.dtype}. Expected "
            f"{_shape(wiring)}, as it was traced. It said: {error}"
        ) from error


def _shape(wiring: Wiring) -> str:
    return f"(B, {', '.join(map(str, wiring.input_shape))})"


def check_free(where: str, rows: Sequence[int], used: Mapping[str, Tensor]) -> None:
    """Warn of groups that the locked tasks use up."""
    full = [group for group, units in used.items() if read(units.bool().all(-1).any()) is True]
    if full:
        warnings.warn(
            f"{where}: no free capacity for task {', '.join(map(str, rows))} in {', '.join(full)}: "
            f"earlier tasks use every "
            f"unit. It can only reuse theirs. Raise sparsity for earlier tasks, or widen the module.",
            HATWarning,
            stacklevel=4,
        )


def check_alive(where: str, task: int, masks: Mapping[str, Tensor]) -> None:
    """Warn of groups in which a task uses no unit."""
    dead = [group for group, mask in masks.items() if read(mask.any(-1).all()) is False]
    if dead:
        warnings.warn(
            f"{where}: task {task} uses no unit of {', '.join(dead)}, so nothing passes there. Lower "
            f"sparsity, or train longer at a small scale.",
            HATWarning,
            stacklevel=4,
        )


def check_groups(wiring: Wiring, tasks: int) -> None:
    """Warn of groups that have fewer units than there are tasks."""
    small = {group: units for group, units in wiring.groups.items() if units < tasks}
    if small:
        listed = ", ".join(f"{group} ({units})" for group, units in small.items())
        warnings.warn(
            f"build: {tasks} tasks, but fewer units in {listed}: later tasks must share them. Widen "
            f"the module, or plan fewer tasks.",
            HATWarning,
            stacklevel=4,
        )


def check_seeds(seeds: Any) -> list[int]:
    """One integer per replica."""
    if isinstance(seeds, int | str) or not hasattr(seeds, "__iter__"):
        raise TypeError(f"replicate: seeds={seeds!r}. Expected one per replica, such as range(8).")
    found = [operator.index(seed) for seed in seeds]
    if not found:
        raise ValueError("replicate: no seeds. Expected one per replica, such as range(8).")
    return found


def check_replicated(
    hyper: Mapping[str, Any], known: Mapping[str, float], replicas: int
) -> dict[str, list[float]]:
    """A value of each setting for every replica."""
    values = {}
    for name, value in hyper.items():
        if name not in known:
            raise ValueError(f"replicate: {name} is no setting. Expected one of {', '.join(known)}.")
        numbers = torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
        if len(numbers) not in (1, replicas):
            raise ValueError(
                f"replicate: {len(numbers)} values of {name} for {replicas} replicas. Expected one "
                f"number, or one for each."
            )
        values[name] = numbers * (replicas // len(numbers))
    for i in range(replicas):
        one = {**known, **{name: value[i] for name, value in values.items()}}
        check_hyper(one["s_max"], one["sparsity"], 1.0, None)
    return values


def check_axis(where: str, x: Tensor, replicas: int) -> None:
    """A batch of its own for every replica."""
    if len(x) != replicas:
        raise ValueError(
            f"{where}: x has shape {tuple(x.shape)} for {replicas} replicas. Expected a batch for "
            f"each, (S, B, ...); for the same one give shared=True."
        )
