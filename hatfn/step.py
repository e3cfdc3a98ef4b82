"""One step of training: what is minimised, and the order in which its gradient becomes a new state."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import optree
import torch
from torch import Tensor

from hatfn import checks, kinds, transforms
from hatfn.forward import Output, call, cut_heads
from hatfn.optimizer import check_moments
from hatfn.state import HATState, Trainable, put_rows, take, take_rows, trainable, tree_map

if TYPE_CHECKING:
    from hatfn.learner import HAT

Batches = Sequence[tuple[Tensor, Tensor]]
"""Inputs and targets of each of the K tasks that are trained."""

Scale = float | Tensor | None
"""The mask scale; None: binary gates."""


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


class Before(NamedTuple):
    """What a step of K tasks reads of a state.

    Attributes:
        own: what it trains.
        buffers: {name: (K, ...)}, the tasks' running statistics.
        used: {group: (U,)}, the cumulative mask.
        protection: {name: tensor}, of the shared weights.
        hyper: {name: ()}, or {name: (T,)} for what each task has of its own.
        opt_state: the optimiser's.
        open: () bool, whether the tasks may be written to.
    """

    own: Trainable
    buffers: dict[str, Tensor]
    used: dict[str, Tensor]
    protection: dict[str, Tensor]
    hyper: dict[str, Tensor]
    opt_state: Any
    open: Tensor


class After(NamedTuple):
    """What a step writes: fields as in :class:`Before`."""

    own: Trainable
    buffers: dict[str, Tensor]
    opt_state: Any


class Seen(NamedTuple):
    """What the forward pass of a step leaves behind.

    Attributes:
        loss: (K,).
        penalty: (K,).
        logits: K outputs.
        buffers: {name: (K, ...)}, new running statistics.
    """

    loss: Tensor
    penalty: Tensor
    logits: tuple[Output, ...]
    buffers: dict[str, Tensor]


def step(hat: HAT, state: HATState, batch: Any, task: Any, scale: Scale) -> tuple[HATState, Info]:
    """The body of :meth:`hatfn.HAT.update`, which says what goes in and comes out."""
    checks.check_state("update", state, hat.wiring, hat.tasks)
    rows = checks.check_tasks("update", task, hat.tasks)
    checks.check_active("update", state, rows, together=True)
    if scale is not None:
        checks.check_scale("update", scale, state.hyper["s_max"])
    batches = checks.check_batches(batch, task, rows, hat.classes, hat.wiring)
    before = read(hat, state, rows)

    def objective(own: Trainable, buffers: dict[str, Tensor], part: Batches) -> tuple[Tensor, Seen]:
        return total_loss(hat, before._replace(own=own, buffers=buffers), part, rows, scale)

    given: list[Tensor] = optree.tree_leaves((before, batches))  # type: ignore[arg-type]
    nested = kinds.read(state.active) is None or any(leaf.requires_grad for leaf in given)
    if nested:
        refuse_checkpointing(hat)
    parts = split(batches, hat.accumulate)
    raw, seen = accumulated(objective, before, parts, nested)
    seen, after, norm, ok = advance(hat, before, raw, seen, scale, len(batches[0][0]))
    return write(state, rows, settled(ok, after, before)), report(seen, norm, ok, task)


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
    used = hat.used(state)
    return Before(own, buffers, used, state.protection, state.hyper, state.opt_state, opened)


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
        penalty = hat.regularizer(gates, before.used, before.hyper["quota"][rows[k]])
        return hat.loss(logits, y), penalty, logits, buffers

    # A loop: every task's head is cut to its own classes, and the loss sees no padding.
    losses, penalties, logits, buffers = zip(*map(of_task, range(len(rows))), strict=True)
    loss, penalty = torch.stack(losses), torch.stack(penalties)
    weights = torch.stack([before.hyper["sparsity"][row] for row in rows])
    total = loss.sum() + (weights * penalty).sum().to(loss.dtype)
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


def advance(
    hat: HAT,
    before: Before,
    raw: Trainable,
    seen: Seen,
    scale: Scale,
    samples: int,
    axes: int = 0,
) -> tuple[Seen, After, Tensor, Tensor]:
    """From a gradient to what may be written.

    Args:
        hat: the learner.
        before: what the step read.
        raw: the gradient.
        seen: what the forward pass left.
        scale: of the gates.
        samples: in this process's batch, by which gradients of several processes are weighted.
        axes: 1 where every leaf leads with replicas, whose optimiser then is one of stacked trees.

    Returns:
        what the forward pass left, losses averaged over processes; what may be written; the norm of
        the gradient, (); whether all of it is finite, () bool. Both (S,) of S replicas.
    """
    own, protection, hyper = before.own, before.protection, before.hyper
    firm = protection
    if hat.lock.on == "update":  # what may move a little has its moments like anything else
        firm = {name: p == 1 for name, p in protection.items()}
    gradients = raw._replace(params=transforms.protect(raw.params, firm))
    if scale is not None and hat.compensated:
        s, s_max, factor = (  # of embeddings (K, U), or (S, K, U)
            transforms.spread(number, 2 + axes) if isinstance(number, Tensor) else number
            for number in (scale, hyper["s_max"], hyper["compensation"])
        )
        steeper = transforms.compensate(raw.embeddings, own.embeddings, s, s_max, factor)
        gradients = gradients._replace(embeddings=steeper)
    sound = transforms.finite((seen.loss, seen.buffers), axes).to(seen.loss.dtype)
    gradients, loss, penalty, sound = hat.ranks.mean(
        (gradients, seen.loss, seen.penalty, sound), samples
    )
    seen = seen._replace(loss=loss, penalty=penalty)
    gradients, norm = transforms.clip_by_norm(gradients, hat.max_norm, axes)
    decayed = own if hat.decay_embeddings else own._replace(embeddings=_zeros(own.embeddings))
    steps, opt_state = _optimized(hat, gradients, before.opt_state, decayed)
    if scale is None:
        steps = steps._replace(embeddings=_zeros(own.embeddings))
    if hat.lock.on == "update":
        steps = steps._replace(params=transforms.protect(steps.params, protection))
    new = transforms.apply_updates(own, steps, hyper["lr"], protection)
    frozen = {name: own.task_params[name] for name in hat.network.frozen & own.task_params.keys()}
    clamped = transforms.clamp_embeddings(new.embeddings, hat.clamp)
    new = new._replace(task_params=new.task_params | frozen, embeddings=clamped)

    # A step that one process must refuse is refused by all.
    ok = transforms.finite((new, opt_state), axes) & (sound == 1) & before.open
    return seen, After(new, seen.buffers, opt_state), norm, ok


def _optimized(hat: HAT, gradients: Trainable, opt_state: Any, own: Trainable) -> tuple[Any, Any]:
    """The optimiser's answer. Moments of other tasks may broadcast instead of failing."""
    try:
        steps, new = hat.optimizer.update(gradients, opt_state, params=own)
    except RuntimeError:
        check_moments("update", opt_state, hat.optimizer.init(own))
        raise
    check_moments("update", steps, own)
    return steps, new


def settled(ok: Tensor, after: After, before: Before) -> After:
    """What is written: something new, or what was there before a step that is refused.

    Args:
        ok: () bool, or (S,) where states are stacked.
        after: from :func:`advance`.
        before: what the step read.
    """
    old = After(before.own, before.buffers, before.opt_state)
    chosen: After = transforms.choose(ok, after, old)
    return chosen


def _zeros(tree: dict[str, Tensor]) -> dict[str, Tensor]:
    return tree_map(torch.zeros_like, tree)  # type: ignore[no-any-return]
