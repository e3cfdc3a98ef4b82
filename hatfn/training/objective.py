"""The function that a step minimises, and its gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import optree
import torch
from torch import Tensor

from hatfn.engine.memory import HUGE, ProductsIn, Room
from hatfn.method.losses import explained
from hatfn.network.call import call
from hatfn.network.network import Output
from hatfn.network.outputs import cut_heads
from hatfn.numerics.arguments import Inputs
from hatfn.numerics.concrete import is_transformed
from hatfn.numerics.trees import map_output, take, tree_map
from hatfn.numerics.vmap import batched
from hatfn.spec import Spec
from hatfn.state import Trainable
from hatfn.training.types import Batches, ForwardResult, Scale, StepInputs


def total_loss(
    spec: Spec,
    inputs: StepInputs,
    batches: Batches,
    rows: Sequence[int],
    scale: Scale,
    lead: int = 0,
    shared: bool = False,
) -> tuple[Tensor, ForwardResult]:
    """The function that a step minimises: the sum over its tasks of loss + sparsity * penalty.

    For S stacked states it is also the sum over states. States share no tensor, so the gradient of the
    sum holds the gradient of each.

    Args:
        spec: the settings of the learner.
        inputs: the inputs of the step.
        batches: the inputs and targets of each task.
        rows: the tasks.
        scale: the mask scale; None: binary gates.
        lead: the number of axes, 0 or 1, in front of every leaf that count states.
        shared: whether all states get the same batches.

    Returns:
        The sum, (), and the results of the forward pass.

    Source:
        Serrà et al. 2018, equation 4.
    """
    if not lead:
        return _of_state(spec, inputs, batches, rows, scale)

    def each(inputs: StepInputs, batches: Batches, scale: Scale) -> tuple[Tensor, ForwardResult]:
        return _of_state(spec, inputs, batches, rows, scale)

    per_scale = 0 if isinstance(scale, Tensor) and scale.dim() else None
    per_batch = None if shared else tuple((Inputs(0, None), 0) for _ in batches)  # type: ignore[arg-type]
    lean = inputs._replace(protection={}, opt_state=())
    totals, seen = batched(each, (0, per_batch, per_scale))(lean, batches, scale)
    return totals.sum(), seen


def _of_state(
    spec: Spec, inputs: StepInputs, batches: Batches, rows: Sequence[int], scale: Scale
) -> tuple[Tensor, ForwardResult]:
    def of_task(k: int) -> tuple[Tensor, Tensor, Output, dict[str, Tensor]]:
        x, y = batches[k]
        own, buffers = inputs.own, take(inputs.buffers, k)
        gates = spec.gates(take(own.embeddings, k), scale)
        params = {**own.params, **cut_heads(spec.network, take(own.task_params, k), rows[k])}
        logits, buffers = call(spec.network, spec.network.train, params, buffers, gates, x)
        penalty = spec.regularizer(gates, inputs.used, inputs.hyper["quota"][k])
        return explained(spec.loss_of(rows[k]), rows[k], logits, y), penalty, logits, buffers

    # A loop, not a vmap: heads differ in their number of classes, and the loss must see no padding.
    losses, penalties, logits, buffers = zip(*map(of_task, range(len(rows))), strict=True)
    loss, penalty = torch.stack(losses), torch.stack(penalties)
    total = loss.sum() + (inputs.hyper["sparsity"] * penalty).sum().to(loss.dtype)
    stacked = {name: torch.stack([b[name] for b in buffers]) for name in buffers[0]}
    return total, ForwardResult(loss, penalty, logits, stacked)


def split(batches: Batches, count: int, axis: int = 0) -> list[tuple[float, Batches]]:
    """Split batches into micro-batches, whose sizes differ by one sample at most.

    Args:
        batches: the inputs and targets of each task.
        count: the number of micro-batches; there are fewer if a batch has fewer samples.
        axis: the axis that counts samples.

    Returns:
        Pairs of a share and a micro-batch. The share is the micro-batch's number of samples, divided
        by that of all micro-batches up to and including it.
    """
    if count == 1:
        return [(1.0, batches)]
    samples = batches[0][1].shape[axis]
    count = min(count, samples)
    sizes = [samples // count + (i < samples % count) for i in range(count)]
    starts = [0, *itertools.accumulate(sizes)][:-1]

    def part(start: int, size: int) -> Batches:
        return tuple(
            (x.map(lambda value: value.narrow(axis, start, size)), y.narrow(axis, start, size))
            for x, y in batches
        )

    shares = [size / done for size, done in zip(sizes, itertools.accumulate(sizes), strict=True)]
    parts = itertools.starmap(part, zip(starts, sizes, strict=True))
    return list(zip(shares, parts, strict=True))


def accumulated(
    objective: Callable[[Trainable, dict[str, Tensor], Any], tuple[Tensor, ForwardResult]],
    inputs: StepInputs,
    parts: Sequence[tuple[float, Any]],
    nested: bool,
    lead: int = 0,
    room: Room | None = None,
) -> tuple[Trainable, ForwardResult]:
    """The gradient of a batch, as the weighted mean of the gradients of its micro-batches.

    Only the activations of one micro-batch are in memory.

    Args:
        objective: a function (trained tensors, running statistics, micro-batch) -> (loss, results).
            Each micro-batch gets the running statistics that the one before leaves.
        inputs: the inputs of the step.
        parts: the shares and micro-batches, from :func:`split`.
        nested: see :func:`is_nested`.
        lead: the number of axes of outputs in front of the one that counts samples.
        room: memory for huge gradients; None: new memory.

    Returns:
        The gradient, and the results of the forward pass for the whole batch.
    """

    def of_part(buffers: dict[str, Tensor], part: Any) -> tuple[Trainable, ForwardResult]:
        return gradient(lambda own: objective(own, buffers, part), inputs.own, nested, room)

    (_, first), *rest = parts
    raw, seen = of_part(inputs.buffers, first)
    for share, part in rest:
        new, then = of_part(seen.buffers, part)
        raw, loss, penalty = tree_map(
            lambda old, new, share=share: torch.lerp(old, new, share),
            (raw, seen.loss, seen.penalty),
            (new, then.loss, then.penalty),
        )
        logits = map_output(lambda *both: torch.cat(both, lead), seen.logits, then.logits)
        seen = ForwardResult(loss, penalty, logits, then.buffers)
    return raw, seen


def is_nested(*trees: Any) -> bool:
    """Whether a step runs inside ``vmap``, or is differentiated itself."""
    leaves: list[Any] = optree.tree_leaves(trees)  # type: ignore[arg-type]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return any(t.requires_grad or is_transformed(t) for t in tensors)


def gradient(
    objective: Callable[[Trainable], tuple[Tensor, ForwardResult]],
    own: Trainable,
    nested: bool,
    room: Room | None = None,
) -> tuple[Trainable, ForwardResult]:
    """The gradient of an objective, and the other results of the objective.

    Args:
        objective: a function of the trained tensors -> (loss (), results).
        own: the trained tensors, at which to take the gradient.
        nested: from :func:`is_nested`. If True, ``torch.func.grad`` computes the gradient. Else
            autograd does, which takes a third off the time of a small network's step.
        room: memory for huge gradients; None: new memory.

    Raises:
        ValueError: the module recomputes activations, and hatfn does not know it.
    """
    if nested:
        found: tuple[Trainable, ForwardResult] = torch.func.grad(objective, has_aux=True)(own)
        return found
    leaves: list[Tensor]
    leaves, structure = optree.tree_flatten(own)  # type: ignore[arg-type]
    with torch.enable_grad():
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        total, seen = objective(optree.tree_unflatten(structure, leaves))  # type: ignore[arg-type]
        try:
            with _memory_of(leaves, room):
                slopes = [
                    slope.detach()  # without the base that a view holds
                    for slope in torch.autograd.grad(
                        total, leaves, allow_unused=True, materialize_grads=True
                    )
                ]
        except RuntimeError as error:
            if "meta" not in str(error):
                raise
            raise ValueError(
                "update: the module recomputes activations in the backward pass, and does not say so. "
                "Expected module.grad_checkpointing = True, set before build()."
            ) from error
    raw: Trainable = optree.tree_unflatten(structure, slopes)  # type: ignore[assignment]
    return raw, map_output(torch.Tensor.detach, seen)


def _memory_of(leaves: Sequence[Tensor], room: Room | None) -> AbstractContextManager[object]:
    """Where the gradients of these tensors go: into memory from ``room`` if one of them is huge."""
    if room is None or all(leaf.nbytes < HUGE for leaf in leaves):
        return nullcontext()
    return ProductsIn(room)
