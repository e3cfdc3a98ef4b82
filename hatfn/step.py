"""One step of training: the order in which gradients become a new state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hatfn import checks, transforms
from hatfn.forward import Output, call, cut_heads
from hatfn.state import HATState, Trainable, put, take, trainable, tree_map

if TYPE_CHECKING:
    from hatfn.learner import HAT


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


def step(
    hat: HAT, state: HATState, batch: Any, task: Any, scale: float | Tensor | None
) -> tuple[HATState, Info]:
    """The body of :meth:`hatfn.HAT.update`, which says what goes in and comes out."""
    rows = checks.check_tasks("update", task, hat.tasks)
    checks.check_active("update", state, rows, together=True)
    if scale is not None:
        checks.check_scale("update", scale, state.hyper["s_max"])
    several = isinstance(task, list | tuple | range)
    batches = checks.check_batches(batch, rows, several, hat.classes)
    own, used = trainable(state, rows), hat.used(state)

    def of_task(own: Trainable, k: int) -> tuple[Tensor, Tensor, Output, dict[str, Tensor]]:
        x, y = batches[k]
        checks.check_input("update", x, hat.wiring)
        gates = hat.gates(take(own.embeddings, k), scale)
        params = {**own.params, **cut_heads(hat.network, take(own.task_params, k), rows[k])}
        before = take(state.task_buffers, rows[k])
        logits, buffers = call(hat.network, hat.network.train, params, before, gates, x)
        return hat.loss(logits, y), hat.regularizer(gates, used), logits, buffers

    def objective(own: Trainable) -> tuple[Tensor, Any]:
        # A loop: every task's head is cut to its own classes, and the loss sees no padding.
        parts = [of_task(own, k) for k in range(len(rows))]
        losses, penalties, logits, buffers = zip(*parts, strict=True)
        loss, penalty = torch.stack(losses), torch.stack(penalties)
        total = loss.sum() + (state.hyper["sparsity"] * penalty.sum()).to(loss.dtype)
        stacked = {name: torch.stack([b[name] for b in buffers]) for name in buffers[0]}
        return total, (loss, penalty, logits, stacked)

    raw, (loss, penalty, logits, buffers) = torch.func.grad(objective, has_aux=True)(own)
    gradients, norm = transforms.clip_by_norm(_corrected(hat, raw, state, own, scale), hat.max_norm)
    seen = own if hat.decay_embeddings else own._replace(embeddings=_zeros(own.embeddings))
    steps, opt_state = hat.optimizer.update(gradients, state.opt_state, params=seen)
    if scale is None:
        steps = steps._replace(embeddings=_zeros(own.embeddings))
    new = transforms.apply_updates(own, steps, state.hyper["lr"], state.protection)
    new = new._replace(embeddings=transforms.clamp_embeddings(new.embeddings, hat.clamp))

    frozen = hat.network.frozen & own.task_params.keys()
    kept = {name: own.task_params[name] for name in frozen}
    new = new._replace(task_params=new.task_params | kept)

    ok = transforms.finite((loss, new, buffers, opt_state))
    ok = ok & torch.stack([state.active[t] for t in rows]).all()
    before = {name: torch.stack([leaf[t] for t in rows]) for name, leaf in state.task_buffers.items()}
    new, buffers, opt_state = transforms.choose(
        ok, (new, buffers, opt_state), (own, before, state.opt_state)
    )
    state = state._replace(
        params=new.params,
        task_params=put(state.task_params, rows, new.task_params),
        task_buffers=put(state.task_buffers, rows, buffers),
        embeddings=put(state.embeddings, rows, new.embeddings),
        opt_state=opt_state,
    )
    if several:
        return state, Info(loss, penalty, logits, norm, ok)
    return state, Info(loss[0], penalty[0], logits[0], norm, ok)


def _corrected(
    hat: HAT, raw: Trainable, state: HATState, own: Trainable, scale: float | Tensor | None
) -> Trainable:
    """Gradients with earlier tasks protected and embeddings compensated."""
    gradients = raw._replace(params=transforms.protect(raw.params, state.protection))
    if scale is None or not hat.compensated:
        return gradients
    hyper = state.hyper
    return gradients._replace(
        embeddings=transforms.compensate(
            raw.embeddings, own.embeddings, scale, hyper["s_max"], hyper["compensation"]
        )
    )


def _zeros(tree: dict[str, Tensor]) -> dict[str, Tensor]:
    return tree_map(torch.zeros_like, tree)  # type: ignore[no-any-return]
