"""What a step minimises, and its gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import optree
import torch
from torch import Tensor

from hatfn.network.call import call
from hatfn.network.network import Output
from hatfn.network.outputs import cut_heads
from hatfn.numerics.trees import take, tree_map
from hatfn.state import Trainable
from hatfn.training.types import Batches, Before, Scale, Seen

if TYPE_CHECKING:
    from hatfn.learner import HAT


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
