"""Checks of inputs, of targets, and of batches of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hatfn.checks.calls import is_several
from hatfn.checks.values import check_list
from hatfn.numerics.arguments import ALONE, Inputs, Leaf, named_leaves
from hatfn.numerics.concrete import is_at_hand, read
from hatfn.wiring import Wiring

_IGNORED = -100
"""The label of positions that PyTorch's cross entropy leaves out by default."""

Batch = tuple[Inputs, Tensor]
"""Inputs, and targets that lead with the same samples."""


def check_input(where: str, x: Any, wiring: Wiring, lead: int = 0) -> Inputs:
    """The inputs, after a check that they are those of the trace: paths, types and numbers of axes.

    Args:
        where: the function that was called.
        x: the inputs as the caller gave them.
        wiring: the wiring of the module.
        lead: number of axes in front that count states, of every tensor that leads with samples.
    """
    signature = wiring.signature
    leaves = _leaves(where, x, wiring)
    for leaf in signature.leaves:
        _check_leaf(where, leaf, leaves[leaf.path], lead)
    inputs = signature.inputs(leaves)
    first, *others = signature.batched
    for leaf in others:
        if leaves[leaf.path].shape[: lead + 1] != inputs.batched[0].shape[: lead + 1]:
            raise ValueError(
                f"{where}: {leaf.path} has shape {tuple(leaves[leaf.path].shape)} and {first.path} "
                f"{tuple(inputs.batched[0].shape)}. Expected as many samples in both. If an input does "
                f"not lead with samples, name it when you trace the module: "
                f"hatfn.trace(module, x, unbatched=[{leaf.path!r}])."
            )
    return inputs


def _leaves(where: str, x: Any, wiring: Wiring) -> dict[str, Tensor]:
    """The tensors of the inputs by path, after a check that the paths are those of the trace."""
    known = [leaf.path for leaf in wiring.signature.leaves]
    if known == [ALONE] and not isinstance(x, Tensor):
        raise TypeError(
            f"{where}: x is a {type(x).__name__}. Expected a tensor: torch.as_tensor(x).float()."
        )
    if not isinstance(x, Tensor | tuple | list | dict):
        raise TypeError(
            f"{where}: x is a {type(x).__name__}. Expected a tuple of positional arguments or a dict "
            f"of keyword arguments, as it was traced: {', '.join(known)}."
        )
    leaves = named_leaves(x)
    for path in [*known, *leaves]:
        if path not in leaves or path not in known:
            what = "is missing" if path not in leaves else "is not an input of the traced module"
            raise ValueError(
                f"{where}: the input {path!r} {what}. Expected the inputs that were traced: "
                f"{', '.join(known)}."
            )
    return leaves


def _check_leaf(where: str, leaf: Leaf, value: Any, lead: int) -> None:
    """Check that a value is a tensor with the type of number and the number of axes of the trace."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{where}: {leaf.path} is a {type(value).__name__}. Expected a tensor: "
            f"torch.as_tensor(...)."
        )
    if value.is_floating_point() != leaf.dtype.is_floating_point:
        raise TypeError(
            f"{where}: {leaf.path} is {value.dtype}. Expected {leaf.dtype}, as it was traced: "
            f"{leaf.path}.to({leaf.dtype})."
        )
    front = [*["S"] * lead, "B"] if leaf.batched else []
    if value.dim() != len(front) + len(leaf.shape):
        shape = ", ".join([*front, *map(str, leaf.shape)])
        mend = ": write x[None] for a single sample, x.flatten(1) for flat samples"
        raise ValueError(
            f"{where}: {leaf.path} has shape {tuple(value.shape)}. Expected ({shape}), as the module "
            f"was traced{mend if leaf.path == ALONE else ''}."
        )


def check_batch(
    where: str, batch: Any, wiring: Wiring, classes: int | None = None, lead: int = 0
) -> Batch:
    """The batch as a pair of inputs and targets; class labels must be from 0 to classes - 1.

    Args:
        where: the function that was called.
        batch: the batch as the caller gave it.
        wiring: the wiring of the module.
        classes: the number of classes of the task; None: the targets are not class labels.
        lead: number of axes in front that count states.
    """
    x, y = check_pair(where, batch)
    inputs = check_input(where, x, wiring, lead)
    check_samples(where, inputs, y, classes, lead)
    return inputs, y


def check_class_batch(
    where: str, batch: Any, classes: Sequence[int] | None, wiring: Wiring, reals: bool = False
) -> Batch:
    """A pair of inputs and targets; if tasks have classes, of at least two samples."""
    inputs, y = check_batch(where, batch, wiring)
    labels = y.dim() == 1 and y.dtype == torch.int64
    real = reals and y.dim() > 1 and y.is_floating_point()
    if classes is not None and (len(y) < 2 or not (labels or real)):
        raise TypeError(
            f"{where}: y has shape {tuple(y.shape)} and type {y.dtype}. Expected the classes of at "
            f"least two samples: shape (B,) and type torch.int64."
        )
    return inputs, y


def check_batches(
    batch: Any,
    task: Any,
    rows: Sequence[int],
    labels: Sequence[int | None],
    wiring: Wiring,
    lead: int = 0,
) -> tuple[Batch, ...]:
    """One batch (x, y) for each task, after checks.

    Args:
        batch: the batch as the caller gave it.
        task: the task as the caller gave it; if it is a list, x and y have an axis over tasks.
        rows: the tasks as ints.
        labels: for each row, the number of its class labels; None: its targets are no class labels.
        wiring: the wiring of the module.
        lead: number of axes in front that count states.
    """
    x, y = check_pair("update", batch)
    if not is_several(task):
        batches = [(check_input("update", x, wiring, lead), y)]
    else:
        batches = _of_tasks(x, y, rows, wiring, lead)
    for count, (inputs, targets) in zip(labels, batches, strict=True):
        check_samples("update", inputs, targets, count, lead, waits=False)
    return tuple(batches)


def _of_tasks(x: Any, y: Tensor, rows: Sequence[int], wiring: Wiring, lead: int) -> list[Batch]:
    """The slices of a batch with an axis over tasks."""
    leaves = _leaves("update", x, wiring)
    batched = [leaf.path for leaf in wiring.signature.batched]
    for path, value in [*((path, leaves[path]) for path in batched), ("y", y)]:
        if value.dim() <= lead or value.shape[lead] != len(rows):
            raise ValueError(
                f"update: {path} has shape {tuple(value.shape)} for {len(rows)} tasks. Expected a "
                f"first axis over tasks, (K, B, ...): hat.update(state, (torch.stack(xs), "
                f"torch.stack(ys)), {list(rows)}, scale)."
            )
    batches = []
    for k, target in enumerate(y.unbind(lead)):
        of_task = {path: v.select(lead, k) if path in batched else v for path, v in leaves.items()}
        for leaf in wiring.signature.leaves:
            _check_leaf("update", leaf, of_task[leaf.path], lead)
        batches.append((wiring.signature.inputs(of_task), target))
    return batches


def check_pair(where: str, batch: Any) -> tuple[Any, Tensor]:
    """The batch as a pair: inputs that are not checked yet, and a tensor of targets."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise TypeError(
            f"{where}: batch is a {type(batch).__name__}. Expected a pair of tensors (x, y)."
        )
    x, y = batch
    if not (isinstance(x, Tensor | dict | tuple | list) and isinstance(y, Tensor)):
        raise TypeError(
            f"{where}: batch = ({type(x).__name__}, {type(y).__name__}). Expected two tensors: "
            f"torch.as_tensor(x).float(), torch.as_tensor(y)."
        )
    return x, y


def check_samples(
    where: str,
    x: Inputs,
    y: Tensor,
    classes: int | None,
    lead: int = 0,
    waits: bool = True,
) -> None:
    """Check that there are as many targets as samples, and at least one.

    Args:
        where: the function that was called.
        x: (B, ...), behind the leading axes.
        y: (B, ...), behind the same axes.
        classes: the number of classes of the task; None: the targets are not class labels.
        lead: number of axes in front that count states.
        waits: see :func:`check_labels`.
    """
    check_filled(where, x)
    shape = x.batched[0].shape
    if shape[: lead + 1] != y.shape[: lead + 1]:
        raise ValueError(
            f"{where}: x has {shape[0]} samples and y has shape {tuple(y.shape)}. Expected as many "
            f"targets as samples."
        )
    check_labels(y, classes, where, lead, waits)


def check_inputs(
    where: str, batches: Any, wiring: Wiring, lead: int = 0, replicas: int = 0
) -> Iterator[Inputs]:
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
        x = inputs_alone(where, batch)
        if lead:
            check_axis(where, x, wiring, replicas)
        inputs = check_input(where, x, wiring, lead)
        check_filled(where, inputs)
        yield inputs


def inputs_alone(where: str, batch: Any) -> Any:
    """The inputs of a batch, which is a pair (x, y), or x alone: a tensor or a dict."""
    return check_pair(where, batch)[0] if isinstance(batch, tuple | list) else batch


def check_axis(where: str, x: Any, wiring: Wiring, replicas: int, shared: bool | None = False) -> None:
    """Check that the first axis of every batched input counts replicas.

    Args:
        where: the function that was called.
        x: a batch of its own for every replica.
        wiring: the wiring of the module.
        replicas: the number of replicas.
        shared: None if the function cannot take one batch for all replicas, which the message then
            does not suggest.
    """
    leaves = _leaves(where, x, wiring)
    for leaf in wiring.signature.batched:
        value = leaves[leaf.path]
        if not isinstance(value, Tensor) or value.dim() < 2 or len(value) != replicas:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            other = "" if shared is None else "; for one batch for all replicas write shared=True"
            raise ValueError(
                f"{where}: {leaf.path} has shape {shape} for {replicas} replicas. Expected a batch for "
                f"each, (S, B, ...){other}."
            )


def axes_of(x: Any, wiring: Wiring) -> int:
    """The number of axes of the first input that leads with samples; 0 if it is missing."""
    if not isinstance(x, Tensor | tuple | list | dict) or not wiring.signature.leaves:
        return 0
    first = named_leaves(x).get(wiring.signature.batched[0].path)
    return first.dim() if isinstance(first, Tensor) else 0


def check_filled(where: str, x: Inputs) -> None:
    """Check that a batch is not empty."""
    if not all(leaf.numel() for leaf in x.batched):
        raise ValueError(
            f"{where}: the batch is empty. Expected at least one sample: skip such a batch."
        )


def check_labels(
    y: Tensor,
    classes: int | None,
    where: str,
    lead: int = 0,
    waits: bool = True,
) -> None:
    """Check that targets, if they are class labels, are from 0 to classes - 1.

    Args:
        y: the targets.
        classes: the number of classes of the task; None: the targets are not class labels.
        where: the function that was called.
        lead: number of axes in front that count states.
        waits: also read labels on a GPU, which must do all its work first.
    """
    if classes is not None and (y.dim() == 1 + lead or not y.is_floating_point()):
        if y.dtype != torch.int64:
            raise TypeError(f"{where}: labels are {y.dtype}. Expected torch.int64: write y.long().")
        known = y.numel() and (waits or is_at_hand(y))
        ends = read(torch.stack([y.min(), y.max()])) if known else None
        if ends is not None and ends[0] == _IGNORED and y.dim() > 1 + lead:
            check_labels(y[y != _IGNORED], classes, where, lead)
        elif ends is not None and not 0 <= ends[0] <= ends[1] < classes:
            raise ValueError(
                f"{where}: labels from {ends[0]} to {ends[1]}, but the task has {classes} classes. "
                f"Expected labels from 0 to {classes - 1}, counted within the task: "
                f"y - first_class_of_the_task."
            )
