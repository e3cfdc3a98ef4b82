"""One training step, of one state or of S stacked states at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor

from hatfn.engine.compiled import widened
from hatfn.engine.memory import Room
from hatfn.numerics.concrete import reads_freely
from hatfn.numerics.ownership import aliased, empty, write_rows
from hatfn.numerics.trees import put_rows, take_rows
from hatfn.spec import Spec
from hatfn.state import HATState, Trainable, trainable
from hatfn.training.apply import apply, chosen
from hatfn.training.objective import accumulated, split, total_loss
from hatfn.training.types import (
    Applied,
    Batches,
    ForwardResult,
    Scale,
    StepInputs,
    StepOutputs,
)


def step(
    spec: Spec,
    state: HATState,
    batches: Batches,
    rows: Sequence[int],
    scale: Scale,
    *,
    nested: bool = False,
    lead: int = 0,
    shared: bool = False,
    donate: bool = False,
) -> tuple[HATState, Applied]:
    """Train the open tasks for one step.

    Args:
        spec: the settings of the learner.
        state: the state before the step; with ``lead`` 1, stacked states.
        batches: the inputs and targets of each task.
        rows: the tasks.
        scale: the mask scale; for stacked states one number, or (S,).
        nested: whether the step runs inside a transform, see
            :func:`~hatfn.training.objective.is_nested`.
        lead: the number of axes, 0 or 1, in front of every leaf that count states.
        shared: whether all states get the same batches.
        donate: whether the state gives its memory away. It stays whole if the step raises an error.

    Returns:
        The state after the step, and the results of the step.
    """
    room = spec.memory.take if donate and state.learned.is_cpu else None
    outputs, applied = _computed(spec, state, batches, rows, scale, nested, lead, shared, room)
    new = write(state, rows, outputs, lead, donate)
    if room:
        spec.memory.give(optree.tree_leaves((state.params, state.opt_state)))  # type: ignore[arg-type]
    if donate:
        empty(state)
    return new, applied


def _computed(
    spec: Spec,
    state: HATState,
    batches: Batches,
    rows: Sequence[int],
    scale: Scale,
    nested: bool,
    lead: int,
    shared: bool,
    room: Room | None,
) -> tuple[StepOutputs, Applied]:
    """The values to write, and the results of the step; the arguments are those of :func:`step`.

    ``room`` gives memory of earlier donated steps; None: the step takes new memory.
    """
    inputs = read_inputs(spec, state, rows, lead)
    eager = not nested and spec.compile is None and reads_freely(state.learned.device)

    def gradient(inputs: StepInputs, batches: Batches, scale: Scale) -> tuple[Trainable, ForwardResult]:
        def objective(
            own: Trainable, buffers: dict[str, Tensor], part: Batches
        ) -> tuple[Tensor, ForwardResult]:
            of_part = inputs._replace(own=own, buffers=buffers)
            return total_loss(spec, of_part, part, rows, scale, lead, shared)

        parts = split(batches, spec.accumulate, axis=0 if shared else lead)
        return accumulated(objective, inputs, parts, nested, lead, room)

    def after(inputs: StepInputs, raw: Trainable, seen: ForwardResult, scale: Scale) -> Applied:
        return apply(spec, inputs, raw, seen, scale, batches[0][0].samples, lead, eager, room)

    def whole(inputs: StepInputs, batches: Batches, scale: Scale) -> Applied:
        return after(inputs, *gradient(inputs, batches, scale), scale)

    if spec.compile is None or nested:
        applied = whole(inputs, batches, scale)
    else:
        wide = inputs._replace(protection=widened(inputs.protection))
        if scale is not None:
            scale = torch.as_tensor(scale, dtype=inputs.hyper["s_max"].dtype, device=inputs.open.device)
        if spec.compile == "step":
            classes = spec.classes and tuple(spec.classes[row] for row in rows)
            losses = tuple(spec.loss_of(row) for row in rows)
            name = ("step", lead, shared, classes, losses)
            applied = spec.graphs.run(whole, name, wide, batches, scale)
        else:
            raw, seen = gradient(wide, batches, scale)
            # Logits depend on the size of the batch. Without them one graph serves every batch.
            lean: tuple[Any, ...] = wide._replace(buffers={}, used={}), raw, seen._replace(logits=())
            applied = spec.graphs.run(after, ("update", lead), *lean, scale)
            applied = applied._replace(forward=applied.forward._replace(logits=seen.logits))
    return chosen(applied.ok, applied.outputs, inputs), applied


def read_inputs(spec: Spec, state: HATState, rows: Sequence[int], lead: int = 0) -> StepInputs:
    """The part of a state that a step reads; see :func:`step` for the arguments."""
    own, buffers = trainable(state, rows, lead), take_rows(state.task_buffers, rows, lead)
    opened = torch.stack([state.active.select(lead, row) for row in rows]).all(0)
    of_tasks = {name: value for name, value in state.hyper.items() if value.dim() > lead}
    hyper = state.hyper | take_rows(of_tasks, rows, lead)
    return StepInputs(own, buffers, state.used, state.protection, hyper, state.opt_state, opened)


def write(
    state: HATState, rows: Sequence[int], new: StepOutputs, lead: int = 0, donate: bool = False
) -> HATState:
    """The state with the values that a step writes; see :func:`step` for the arguments."""
    put = partial(write_rows if donate else put_rows, rows=rows, lead=lead)
    written = state._replace(
        params=new.own.params,
        task_params=put(state.task_params, new.own.task_params),
        task_buffers=put(state.task_buffers, new.buffers),
        embeddings=put(state.embeddings, new.own.embeddings),
        opt_state=new.opt_state,
    )
    return aliased(written)
