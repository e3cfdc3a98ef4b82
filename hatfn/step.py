"""One step of training: what it reads of a state, what it minimises, what it writes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import optree
import torch
from torch import Tensor

from hatfn import checks, kinds
from hatfn.advance import Advanced, After, Before, Scale, Seen, advance, settled
from hatfn.compiled import Compiler, widened
from hatfn.forward import Output, call, cut_heads
from hatfn.state import HATState, Trainable, put_rows, take, take_rows, trainable, tree_map

if TYPE_CHECKING:
    from hatfn.learner import HAT

Batches = Sequence[tuple[Tensor, Tensor]]
"""Inputs and targets of each of the K tasks that are trained."""


class Info(NamedTuple):
    """What one update reports; every leaf a tensor. K: tasks trained together.

    Attributes:
        loss: (), the criterion without the penalty; (K,) for several tasks.
        penalty: () or (K,), the sparsity before its weight.
        logits: (B, classes of the task), or the module's several outputs, before the step, in train
            mode; for several tasks a tuple of them.
        grad_norm: (), of everything trained, after protection and compensation, before the clip.
        ok: () bool; False: something was not finite, and the step was refused.
    """

    loss: Tensor
    penalty: Tensor
    logits: Output
    grad_norm: Tensor
    ok: Tensor


def step(hat: HAT, state: HATState, batch: Any, task: Any, scale: Scale) -> tuple[HATState, Info]:
    """The body of :meth:`hatfn.HAT.update`, which says what goes in and comes out."""
    checks.check_state("update", state, hat.wiring, hat.tasks)
    rows = checks.check_tasks("update", task, hat.tasks)
    checks.check_active("update", state, rows, together=True)
    if scale is not None:
        checks.check_scale("update", scale, state.hyper["s_max"])
    batches = checks.check_batches(batch, task, rows, hat.classes, hat.wiring)
    before = read(hat, state, rows)

    given: list[Any] = optree.tree_leaves((before, batches, scale))  # type: ignore[arg-type]
    derived = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in given)
    nested = derived or kinds.read(state.active) is None
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
    if checks.several(task):
        return Info(seen.loss, seen.penalty, seen.logits, norm, ok)
    return Info(seen.loss[..., 0], seen.penalty[..., 0], seen.logits[0], norm, ok)


def refuse_checkpointing(hat: HAT) -> None:
    """PyTorch computes nothing again in a backward pass that it batches or differentiates.

    Raises:
        ValueError: the module checkpoints activations.
    """
    if hat.network.recomputes:
        raise ValueError(
            "update: the module checkpoints activations, which goes neither with replicas nor with "
            "vmap nor where the step is differentiated. Turn it off: build without "
            "grad_checkpointing=True, from a module after module.set_grad_checkpointing(False)."
        )


def total_loss(
    hat: HAT, before: Before, batches: Batches, rows: Sequence[int], scale: Scale
) -> tuple[Tensor, Seen]:
    """What a step minimises: over its tasks, the sum of the loss and the weighted sparsity penalty."""

    def of_task(k: int) -> tuple[Tensor, Tensor, Output, dict[str, Tensor]]:
        x, y = batches[k]
        own, buffers = before.own, take(before.buffers, k)
        gates = hat.gates(take(own.embeddings, k), scale)
        params = {**own.params, **cut_heads(hat.network, take(own.task_params, k), rows[k])}
        logits, buffers = call(hat.network, hat.network.train, params, buffers, gates, x)
        penalty = hat.regularizer(gates, before.used, before.hyper["quota"][k])
        return hat.loss(logits, y), penalty, logits, buffers

    # A loop: every task's head is cut to its own classes, and the loss sees no padding.
    losses, penalties, logits, buffers = zip(*map(of_task, range(len(rows))), strict=True)
    loss, penalty = torch.stack(losses), torch.stack(penalties)
    total = loss.sum() + (before.hyper["sparsity"] * penalty).sum().to(loss.dtype)
    stacked = {name: torch.stack([b[name] for b in buffers]) for name in buffers[0]}
    return total, Seen(loss, penalty, logits, stacked)


def split(batch: Any, count: int, axis: int = 0) -> list[tuple[float, Any]]:
    """A batch in parts, as many as wanted or as it has samples.

    Args:
        batch: any tree of tensors.
        count: of the parts, which differ by one sample at most.
        axis: that counts samples.

    Returns:
        Each part behind the share that its samples have of all up to its last.
    """
    leaves: list[Tensor]
    leaves, structure = optree.tree_flatten(batch)
    if count == 1 or min(leaf.dim() for leaf in leaves) <= axis:  # refused when read
        return [(1.0, batch)]
    count = min(count, leaves[0].shape[axis])
    cut = list(zip(*(leaf.tensor_split(count, axis) for leaf in leaves), strict=True))
    sizes = [part[0].shape[axis] for part in cut]
    shares = [size / done for size, done in zip(sizes, itertools.accumulate(sizes), strict=True)]
    return [(s, optree.tree_unflatten(structure, p)) for s, p in zip(shares, cut, strict=True)]


def accumulated(
    objective: Callable[[Trainable, dict[str, Tensor], Any], tuple[Tensor, Seen]],
    before: Before,
    parts: Sequence[tuple[float, Any]],
    nested: bool,
    axis: int = 0,
) -> tuple[Trainable, Seen]:
    """The gradient of a batch from those of its parts, of which one at a time is in memory.

    Args:
        objective: of what is trained, running statistics, which go on from part to part, and a part.
        before: what the step reads.
        parts: of the batch, from :func:`split`.
        nested: as :func:`gradient` takes it.
        axis: of outputs that counts samples: 0, or 1 where states are stacked.
    """

    def of_part(buffers: dict[str, Tensor], part: Any) -> tuple[Trainable, Seen]:
        return gradient(lambda own: objective(own, buffers, part), before.own, nested)

    (_, first), *rest = parts
    raw, seen = of_part(before.buffers, first)
    for share, part in rest:
        new, then = of_part(seen.buffers, part)
        raw, loss, penalty = tree_map(
            lambda old, new, share=share: torch.lerp(old, new, share),
            (raw, seen.loss, seen.penalty),
            (new, then.loss, then.penalty),
        )
        logits = tree_map(lambda *both: torch.cat(both, axis), seen.logits, then.logits)
        seen = Seen(loss, penalty, logits, then.buffers)
    return raw, seen


def gradient(
    objective: Callable[[Trainable], tuple[Tensor, Seen]], own: Trainable, nested: bool
) -> tuple[Trainable, Seen]:
    """The gradient of an objective, and what else it returns.

    Args:
        objective: of what is trained; returns a () loss and something more.
        own: where.
        nested: inside ``vmap``, or where somebody differentiates through the step. There it is
            ``torch.func.grad``; elsewhere autograd itself, which does the same for a third less of a
            small network's step.
    """
    if nested:
        found: tuple[Trainable, Seen] = torch.func.grad(objective, has_aux=True)(own)
        return found
    leaves: list[Tensor]
    leaves, structure = optree.tree_flatten(own)  # type: ignore[arg-type]
    with torch.enable_grad():
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        total, seen = objective(optree.tree_unflatten(structure, leaves))  # type: ignore[arg-type]
        try:
            slopes = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        except RuntimeError as error:
            if "meta" not in str(error):
                raise
            raise ValueError(
                "update: the module computes parts of itself again in the backward pass and does not "
                "say so. Tell it: module.grad_checkpointing = True, before build()."
            ) from error
    raw: Trainable = optree.tree_unflatten(structure, slopes)  # type: ignore[assignment]
    return raw, tree_map(torch.Tensor.detach, seen)
