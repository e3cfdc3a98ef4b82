"""From a gradient to what a step writes: protection, compensation, clip, the optimiser, the select."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hatfn.engine.optimizer import check_moments
from hatfn.method import transforms
from hatfn.numerics.trees import tree_map
from hatfn.state import Trainable
from hatfn.training.types import Advanced, After, Before, Scale, Seen

if TYPE_CHECKING:
    from hatfn.learner import HAT


def advance(
    hat: HAT,
    before: Before,
    raw: Trainable,
    seen: Seen,
    scale: Scale,
    samples: int,
    axes: int = 0,
) -> Advanced:
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
