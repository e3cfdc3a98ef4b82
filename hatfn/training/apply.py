"""From the gradient to new values: protection, compensation, clip, optimizer, refusal of bad steps."""

from __future__ import annotations

import torch
from torch import Tensor

from hatfn.engine.memory import Room, new_memory
from hatfn.engine.optimizer import advanced, stacked
from hatfn.method import transforms
from hatfn.numerics.ownership import owned
from hatfn.numerics.trees import tree_map
from hatfn.spec import Spec
from hatfn.state import Trainable
from hatfn.training import pieces
from hatfn.training.pieces import Moved
from hatfn.training.types import Applied, ForwardResult, Scale, StepInputs, StepOutputs


def apply(
    spec: Spec,
    inputs: StepInputs,
    raw: Trainable,
    seen: ForwardResult,
    scale: Scale,
    samples: int,
    lead: int = 0,
    eager: bool = False,
    room: Room | None = None,
) -> Applied:
    """Compute the values that a step may write from the gradient.

    Args:
        spec: the settings of the learner.
        inputs: the inputs of the step.
        raw: the gradient, before protection.
        seen: the results of the forward pass.
        scale: the mask scale; None: binary gates.
        samples: the number of samples in this process's batch; the mean over processes weights
            gradients by it.
        lead: the number of axes, 0 or 1, in front of every leaf that count states.
        eager: whether the gradient is on a CPU, outside of transforms and graphs, so that its memory
            is used again for the new values.
        room: from a shape and a type to memory for a new optimizer state; None: new memory.
    """
    own, protection, hyper = inputs.own, inputs.protection, inputs.hyper
    on_update = spec.protection.on == "update"
    whole = protection
    if on_update:  # the optimizer sees the full gradient of entries that may change a little
        whole = {name: p == 1 for name, p in protection.items()}
    if eager:
        raw = owned(raw)  # it is overwritten, and a hook of the module may have kept it
        shared = pieces.protect(raw.params, whole, spec.memory)
    else:
        shared = transforms.protect(raw.params, whole)
    gradients = raw._replace(params=shared)
    if scale is not None and spec.compensated:
        s, s_max, factor = (  # of embeddings (K, U), or (S, K, U)
            transforms.spread(number, 2 + lead) if isinstance(number, Tensor) else number
            for number in (scale, hyper["s_max"], hyper["compensation"])
        )
        steeper = transforms.compensate(raw.embeddings, own.embeddings, s, s_max, factor)
        gradients = gradients._replace(embeddings=steeper)
    sound = transforms.finite((seen.loss, seen.buffers), lead).to(seen.loss.dtype)
    gradients, loss, penalty, sound = spec.ranks.mean(
        (gradients, seen.loss, seen.penalty, sound), samples
    )
    seen = seen._replace(loss=loss, penalty=penalty)
    gradients, norm = transforms.clip_by_norm(gradients, spec.max_norm, lead)
    decayed = own if spec.decay_embeddings else own._replace(embeddings=_zeros(own.embeddings))
    given = spec, gradients, inputs, decayed, scale, lead
    moved = (pieces.moved(*given, room or new_memory) if eager else None) or _moved(*given)
    new = moved.own._replace(embeddings=transforms.clamp_embeddings(moved.own.embeddings, spec.clamp))
    # ``sound`` is the mean over processes: if one process must refuse the step, all refuse it.
    ok = moved.finite & transforms.finite(new.embeddings, lead) & (sound == 1) & inputs.open
    return Applied(seen, StepOutputs(new, seen.buffers, moved.opt_state), norm, ok)


def _moved(
    spec: Spec, gradients: Trainable, inputs: StepInputs, decayed: Trainable, scale: Scale, lead: int
) -> Moved:
    """The new values by an update of all tensors at once; the arguments are those of :func:`apply`."""
    own, protection = inputs.own, inputs.protection
    optimizer = stacked(spec.optimizer) if lead else spec.optimizer
    steps, opt_state = advanced(optimizer, gradients, inputs.opt_state, decayed)
    if scale is None:
        steps = steps._replace(embeddings=_zeros(own.embeddings))
    if spec.protection.on == "update":
        steps = steps._replace(params=transforms.protect(steps.params, protection))
    new = transforms.apply_updates(own, steps, inputs.hyper["lr"], protection)
    return Moved(new, opt_state, transforms.finite((new._replace(embeddings={}), opt_state), lead))


def chosen(ok: Tensor, outputs: StepOutputs, inputs: StepInputs) -> StepOutputs:
    """The values to write: the new ones, or the old ones if the step is refused.

    Args:
        ok: () bool; for stacked states (S,).
        outputs: the new values, from :func:`apply`.
        inputs: the inputs of the step.
    """
    old = StepOutputs(inputs.own, inputs.buffers, inputs.opt_state)
    written: StepOutputs = transforms.choose(ok, outputs, old)
    return written


def _zeros(tree: dict[str, Tensor]) -> dict[str, Tensor]:
    return tree_map(torch.zeros_like, tree)  # type: ignore[no-any-return]
