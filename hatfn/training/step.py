"""One step of training: what it reads of a state, what it minimises, what it writes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import optree
import torch
from torch import Tensor

from hatfn.checks.calls import (
    check_active,
    check_batches,
    check_scale,
    check_state,
    check_tasks,
    is_several,
)
from hatfn.engine.compiled import Compiler, widened
from hatfn.numerics import concrete
from hatfn.numerics.trees import put_rows, take_rows
from hatfn.state import HATState, Trainable, trainable
from hatfn.training.apply import advance, settled
from hatfn.training.objective import accumulated, refuse_checkpointing, split, total_loss
from hatfn.training.types import Advanced, After, Batches, Before, Info, Scale, Seen

if TYPE_CHECKING:
    from hatfn.learner import HAT


def step(hat: HAT, state: HATState, batch: Any, task: Any, scale: Scale) -> tuple[HATState, Info]:
    """The body of :meth:`hatfn.HAT.update`, which says what goes in and comes out."""
    check_state("update", state, hat.wiring, hat.tasks)
    rows = check_tasks("update", task, hat.tasks)
    check_active("update", state, rows, together=True)
    if scale is not None:
        check_scale("update", scale, state.hyper["s_max"])
    batches = check_batches(batch, task, rows, hat.classes, hat.wiring)
    before = read(hat, state, rows)

    given: list[Any] = optree.tree_leaves((before, batches, scale))  # type: ignore[arg-type]
    derived = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in given)
    nested = derived or concrete.read(state.active) is None
    if nested:
        refuse_checkpointing(hat)

    def slopes(before: Before, batches: Batches, scale: Scale) -> tuple[Trainable, Seen]:
        def objective(own: Trainable, buffers: dict[str, Tensor], part: Any) -> tuple[Tensor, Seen]:
            return total_loss(hat, before._replace(own=own, buffers=buffers), part, rows, scale)

        return accumulated(objective, before, split(batches, hat.accumulate), nested)

    def advanced(before: Before, raw: Trainable, seen: Seen, scale: Scale) -> Advanced:
        return advance(hat, before, raw, seen, scale, len(batches[0][0]))

    compiler = None if nested else hat.compiler
    wide = () if hat.classes is None else tuple(hat.classes[row] for row in rows)
    seen, after, norm, ok = trained(compiler, wide, hat, slopes, advanced, before, batches, scale)
    return write(state, rows, settled(ok, after, before)), report(seen, norm, ok, task)


def trained(
    compiler: Compiler | None,
    name: Hashable,
    parts: tuple[Any, ...],
    slopes: Callable[[Before, Any, Scale], tuple[Trainable, Seen]],
    advanced: Callable[[Before, Trainable, Seen, Scale], Advanced],
    before: Before,
    batches: Any,
    scale: Scale,
    axes: int = 0,
) -> Advanced:
    """From what a step reads, and a batch, to what may be written, in compiled graphs if there are any.

    Args:
        compiler: of the learner, or None.
        name: what the two functions depend on beside their arguments, by its value.
        parts: likewise, by identity.
        slopes: the gradient.
        advanced: all that follows it.
        before: what the step reads.
        batches: of the tasks.
        scale: of the gates.
        axes: 1 where every leaf leads with replicas.

    Returns:
        as :func:`advance`.
    """

    def whole(before: Before, batches: Any, scale: Scale) -> Advanced:
        return advanced(before, *slopes(before, batches, scale), scale)

    if compiler is None:
        return whole(before, batches, scale)
    wide = before._replace(protection=widened(before.protection))
    if scale is not None:
        scale = torch.as_tensor(scale, dtype=before.hyper["s_max"].dtype, device=before.open.device)
    if compiler.part == "step":
        done: Advanced = compiler(whole, ("step", axes, name), parts, wide, batches, scale)
        return done
    raw, seen = slopes(before, batches, scale)
    # What depends on the size of the batch stays outside: the graph fits every batch.
    lean = wide._replace(buffers={}, used={}), raw, seen._replace(logits=())
    then, *rest = compiler(advanced, ("update", axes), parts, *lean, scale)
    return then._replace(logits=seen.logits), *rest


def read(hat: HAT, state: HATState, rows: Sequence[int], axis: int = 0) -> Before:
    """What a step of some tasks reads.

    Args:
        hat: the learner.
        state: before the step.
        rows: the tasks.
        axis: that counts tasks: 0, or 1 where states are stacked.
    """
    own, buffers = trainable(state, rows, axis), take_rows(state.task_buffers, rows, axis)
    opened = torch.stack([state.active.select(axis, row) for row in rows]).all(0)
    of_tasks = {name: value for name, value in state.hyper.items() if value.dim() > axis}
    hyper = state.hyper | take_rows(of_tasks, rows, axis)
    used = hat.used(state)
    return Before(own, buffers, used, state.protection, hyper, state.opt_state, opened)


def write(state: HATState, rows: Sequence[int], after: After, axis: int = 0) -> HATState:
    """The state with what a step of some tasks writes; arguments as in :func:`read`."""
    put = partial(put_rows, rows=rows, axis=axis)
    return state._replace(
        params=after.own.params,
        task_params=put(state.task_params, after.own.task_params),
        task_buffers=put(state.task_buffers, after.buffers),
        embeddings=put(state.embeddings, after.own.embeddings),
        opt_state=after.opt_state,
    )


def report(seen: Seen, norm: Tensor, ok: Tensor, task: Any) -> Info:
    """What the caller is told: of a single task without an axis over tasks."""
    if is_several(task):
        return Info(seen.loss, seen.penalty, seen.logits, norm, ok)
    return Info(seen.loss[..., 0], seen.penalty[..., 0], seen.logits[0], norm, ok)
