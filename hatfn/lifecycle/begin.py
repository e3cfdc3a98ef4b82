"""Opening tasks for training, and warm starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from hatfn.checks.batches import Batch
from hatfn.engine.optimizer import check_carried
from hatfn.lifecycle.similarity import errors
from hatfn.numerics.concrete import read
from hatfn.numerics.ownership import aliased
from hatfn.numerics.trees import over_groups, put, take
from hatfn.spec import Spec
from hatfn.state import HATState, trainable


def begin(
    spec: Spec,
    state: HATState,
    rows: Sequence[int],
    locked: Sequence[int] | None,
    carry: bool,
) -> HATState:
    """The state with open tasks; see :meth:`hatfn.HAT.begin`."""
    spec.memory.clear()
    active = spec.flags(state, rows)
    learned, masks = state.learned & ~active, state.masks
    again = read(state.learned[[*rows]].any())
    if again is not False:  # None inside a transform
        masks = {group: mask & ~active[:, None] for group, mask in masks.items()}
    opened = state._replace(
        masks=masks,
        learned=learned,
        locked=learned if locked is None else spec.flags(state, locked),
        active=active,
    )
    opt_state = spec.optimizer.init(trainable(opened, rows))
    if carry:
        opt_state = check_carried("begin", state.opt_state, opt_state, len(rows))
    protection, used = spec.protect(opened, state)
    return aliased(opened._replace(protection=protection, used=used, opt_state=opt_state))


def warm_start(
    spec: Spec,
    state: HATState,
    task: int,
    source: int | Literal["similar"],
    batch: Batch | None,
) -> HATState:
    """The state in which a task starts from the gates, norms and statistics of a learned task.

        e <- (clip(e_source, -1, 1) + e) / sqrt(2)

    Learned embeddings are so large that their gates hardly move. A task that copied them could not
    choose other units and would have little capacity of its own. So the source's embeddings are clipped
    to the range of initial ones, and mixed with the embeddings of the task.

    Args:
        spec: the settings of the learner.
        state: any state.
        task: the task that starts.
        source: a learned task, or "similar" for the most similar one, if any is learned.
        batch: x and y of the task, for "similar".
    """
    row = source
    if row == "similar":
        others = [other for other in state.learned.nonzero().flatten().tolist() if other != task]
        if not others or batch is None:
            return state
        row = others[int(errors(spec, state, batch, others).argmin())]
    mixed = over_groups(
        lambda e_source, e: (e_source.clamp(-1, 1) + e) / math.sqrt(2),
        take(state.embeddings, row),
        take(state.embeddings, task),
    )
    heads = spec.network.heads if spec.classes else ()
    norms = {name: leaf for name, leaf in state.task_params.items() if name not in heads}
    return state._replace(
        task_params=state.task_params | put(norms, task, take(norms, row)),
        task_buffers=put(state.task_buffers, task, take(state.task_buffers, row)),
        embeddings=put(state.embeddings, task, mixed),
    )
